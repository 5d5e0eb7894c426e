"""Image references, normalised as containers/image and Docker do.

``alpine`` means ``docker.io/library/alpine:latest``; the canonical text is what
an additional layer store finds, base64 encoded, in its paths.  Grammar:
github.com/distribution/reference ("reference.go", "normalize.go").
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Self

from layerstore import limits
from layerstore.errors import InvalidDigest, InvalidReference
from layerstore.image.digest import Digest

DOCKER_HUB: Final = "docker.io"
_OLD_HUB: Final = "index.docker.io"
DEFAULT_TAG: Final = "latest"

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
# No IPv6 address: newer Docker takes them, Podman up to 5 does not, and one image with such a
# name makes its `podman images` fail for all.
_DOMAIN: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG: Final = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{limits.TAG_CHARS - 1}}}")
_IDENTIFIER: Final = re.compile(r"[a-f0-9]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """One normalised reference: at least one of ``tag`` and ``digest`` is set.

    ``domain`` is the registry's host with an optional port, ``path`` the
    repository inside it.  Build it with ``parse``: the constructor trusts its
    arguments.
    """

    domain: str
    path: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read and normalise ``text``; raises ``InvalidReference``."""
        if len(text) > limits.REFERENCE_CHARS:
            raise InvalidReference(
                f"a reference has at most {limits.REFERENCE_CHARS} characters",
                subject=text[:160],
            )
        if _IDENTIFIER.fullmatch(text):
            raise InvalidReference("64 hex digits are an image ID, not a name", subject=text)
        rest, at, digest_text = text.partition("@")
        digest: Digest | None = None
        if at:
            try:
                digest = Digest.parse(digest_text)
            except InvalidDigest as error:
                raise InvalidReference("the part behind @ is no digest", subject=text) from error
        tag: str | None = None
        colon = rest.rfind(":")
        if colon > rest.rfind("/"):
            rest, tag = rest[:colon], rest[colon + 1 :]
            if _TAG.fullmatch(tag) is None:
                raise InvalidReference("the part behind : is no tag", subject=text)
        domain, path = _split_domain(rest)
        if _DOMAIN.fullmatch(domain) is None:
            advice = "give an IPv6 address a host name (/etc/hosts)" if "[" in domain else ""
            raise InvalidReference("the registry is no host name", subject=text, advice=advice)
        if _PATH.fullmatch(path) is None:
            advice = "repository names are lower case" if path != path.lower() else ""
            raise InvalidReference("not a repository name", subject=text, advice=advice)
        if len(path) > limits.REPOSITORY_CHARS:
            raise InvalidReference(
                f"a repository name has at most {limits.REPOSITORY_CHARS} characters",
                subject=text[:160],
            )
        if tag is None and digest is None:
            tag = DEFAULT_TAG
        return cls(domain, path, tag, digest)

    @property
    def name(self) -> str:
        """``domain/path``, the repository's full name."""
        return f"{self.domain}/{self.path}"

    def with_digest(self, digest: Digest) -> Self:
        """The same repository, pinned; the tag is dropped."""
        return replace(self, tag=None, digest=digest)

    def with_tag(self, tag: str) -> Self:
        """The same repository at ``tag``, without a digest; raises ``InvalidReference``."""
        if _TAG.fullmatch(tag) is None:
            raise InvalidReference("not a tag", subject=tag[:160])
        return replace(self, tag=tag, digest=None)

    def __str__(self) -> str:
        text = self.name
        if self.tag is not None:
            text += f":{self.tag}"
        if self.digest is not None:
            text += f"@{self.digest}"
        return text


def _split_domain(name: str) -> tuple[str, str]:
    # A first component is a host only if it could not be a path component of
    # Docker Hub: it has a dot, a port or a capital letter, or is "localhost".
    first, slash, rest = name.partition("/")
    is_host = "." in first or ":" in first or first == "localhost" or first != first.lower()
    domain, path = (first, rest) if slash and is_host else (DOCKER_HUB, name)
    if domain == _OLD_HUB:
        domain = DOCKER_HUB
    if domain == DOCKER_HUB and "/" not in path:
        path = f"library/{path}"
    return domain, path
