"""Whether the name in a signature is right for the image that is asked for.

containers-policy.json(5), "signedIdentity".  ``wanted`` is the image's own logical name,
with its tag or digest; None where the transport gives images no such name.  ``signed`` is
the text in the signature, which never gets a tag that it does not have.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final, Self

from layerstore.copy import strictjson
from layerstore.copy.strictjson import NotStrict
from layerstore.errors import InvalidReference
from layerstore.image import Reference

_PREFIX: Final = re.compile(r"[a-zA-Z0-9.-]+(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")


@dataclass(frozen=True, slots=True)
class _Name:
    """A normalised name; ``exact`` is its text with tag and digest, None without either."""

    repository: str
    exact: str | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        try:
            reference = Reference.parse(text)
        except InvalidReference:
            return None
        named_only = "@" not in text and text.rfind(":") <= text.rfind("/")
        return cls(reference.name, None if named_only else str(reference))


class SignedIdentity(ABC):
    """One rule."""

    @abstractmethod
    def accepts(self, wanted: Reference | None, signed: str) -> bool:
        """Whether a signature for ``signed`` is one for ``wanted``."""


class MatchExact(SignedIdentity):
    """The same name with the same tag or digest."""

    def accepts(self, wanted: Reference | None, signed: str) -> bool:
        """See ``SignedIdentity``."""
        name = _Name.parse(signed)
        return wanted is not None and name is not None and name.exact == str(wanted)


class MatchRepoDigestOrExact(SignedIdentity):
    """As ``MatchExact``; but whoever asks by digest is content with any tag of the repository."""

    def accepts(self, wanted: Reference | None, signed: str) -> bool:
        """See ``SignedIdentity``."""
        name = _Name.parse(signed)
        if wanted is None or name is None or name.exact is None:
            return False
        if wanted.tag is None:
            return name.repository == wanted.name
        return name.exact == str(wanted)


class MatchRepository(SignedIdentity):
    """The same repository."""

    def accepts(self, wanted: Reference | None, signed: str) -> bool:
        """See ``SignedIdentity``."""
        name = _Name.parse(signed)
        return wanted is not None and name is not None and name.repository == wanted.name


@dataclass(frozen=True, slots=True)
class ExactReference(SignedIdentity):
    """A name that the policy gives, whatever the image is called."""

    reference: str

    def accepts(self, wanted: Reference | None, signed: str) -> bool:
        """See ``SignedIdentity``."""
        name, given = _Name.parse(signed), _Name.parse(self.reference)
        return name is not None and given is not None and name.exact == given.exact is not None


@dataclass(frozen=True, slots=True)
class ExactRepository(SignedIdentity):
    """A repository that the policy gives."""

    repository: str

    def accepts(self, wanted: Reference | None, signed: str) -> bool:
        """See ``SignedIdentity``."""
        name, given = _Name.parse(signed), _Name.parse(self.repository)
        return name is not None and given is not None and name.repository == given.repository


@dataclass(frozen=True, slots=True)
class RemapIdentity(SignedIdentity):
    """As ``MatchRepoDigestOrExact`` after ``prefix`` was replaced: for mirrors."""

    prefix: str
    signed_prefix: str

    def accepts(self, wanted: Reference | None, signed: str) -> bool:
        """See ``SignedIdentity``."""
        if wanted is None:
            return False
        text, rest = str(wanted), str(wanted).removeprefix(self.prefix)
        if rest != text and (not rest or rest[0] in "/:@"):
            try:
                wanted = Reference.parse(self.signed_prefix + rest)
            except InvalidReference:
                return False
        return MatchRepoDigestOrExact().accepts(wanted, signed)


def parse_signed_identity(value: Any) -> SignedIdentity:
    """Read ``signedIdentity`` of a policy; raises ``NotStrict``."""
    kind = value.get("type") if isinstance(value, dict) else None
    what = f"signedIdentity {kind!r}"
    match kind:
        case "matchExact":
            strictjson.members(value, what, ("type",))
            return MatchExact()
        case "matchRepoDigestOrExact":
            strictjson.members(value, what, ("type",))
            return MatchRepoDigestOrExact()
        case "matchRepository":
            strictjson.members(value, what, ("type",))
            return MatchRepository()
        case "exactReference":
            strictjson.members(value, what, ("type", "dockerReference"))
            return ExactReference(_name(value["dockerReference"], what, exact=True))
        case "exactRepository":
            strictjson.members(value, what, ("type", "dockerRepository"))
            return ExactRepository(_name(value["dockerRepository"], what, exact=False))
        case "remapIdentity":
            strictjson.members(value, what, ("type", "prefix", "signedPrefix"))
            return RemapIdentity(_prefix(value["prefix"]), _prefix(value["signedPrefix"]))
    raise NotStrict(f"{what} is not known")


def _name(value: Any, what: str, *, exact: bool) -> str:
    text = strictjson.text(value, what)
    name = _Name.parse(text)
    if name is None:
        raise NotStrict(f"{what}: {text!r} is no reference")
    if exact and name.exact is None:
        raise NotStrict(f"{what}: {text!r} has neither tag nor digest")
    return text


def _prefix(value: Any) -> str:
    text = strictjson.text(value, "a prefix of remapIdentity")
    if _PREFIX.fullmatch(text) is None:
        raise NotStrict(f"remapIdentity: {text!r} is no registry, namespace or repository")
    return text
