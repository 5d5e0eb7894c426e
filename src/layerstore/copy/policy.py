"""Which images this machine accepts: policy.json.

containers-policy.json(5).  ``{"default": [...], "transports": {"docker": {"SCOPE":
[...]}}}``: the most specific scope that applies to an image decides, and all of its
requirements must be met.  For ``docker`` a scope is a reference with tag or digest, a
repository, a namespace, a host, or ``*.DOMAIN``; for transports of files a path or a
directory above it; ``""`` stands for the whole transport.

The file is read strictly: a key that is not known or stands there twice makes it useless,
because whoever wrote it meant something by it.  Without the file nothing may be copied.
What cannot be checked here (``sigstoreSigned``, ``signedBaseLayer``, keys that are not
OpenPGP) is refused when an image depends on it, never passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from layerstore import limits
from layerstore.copy import strictjson
from layerstore.copy.requirement import (
    AcceptAnything,
    Reject,
    Requirement,
    Unchecked,
    Unsupported,
)
from layerstore.copy.strictjson import NotStrict
from layerstore.errors import ConfigError, PolicyRejected
from layerstore.image import Reference

_SIGSTORE_KEYS: Final = (
    *("keyPath", "keyPaths", "keyData", "keyDatas", "fulcio", "pki", "signedIdentity"),
    *("rekorPublicKeyPath", "rekorPublicKeyPaths", "rekorPublicKeyData", "rekorPublicKeyDatas"),
)
_PATH_TRANSPORTS: Final = ("dir", "oci", "oci-archive")


class Policy(msgspec.Struct, frozen=True):
    """A whole policy; ``transports`` has lists of requirements by transport and scope."""

    default: tuple[Requirement, ...]
    transports: Mapping[str, Mapping[str, tuple[Requirement, ...]]]

    @classmethod
    def load(
        cls, path: Path | None = None, *, home: Path | None = None, etc: Path = Path("/etc")
    ) -> Self:
        """Read ``path``, else the user's file, else the machine's.

        Raises ``ConfigError`` if there is none or it does not hold to the rules.
        """
        if path is not None:
            places = [path]
        else:
            places = [] if home is None else [home / ".config/containers/policy.json"]
            places.append(etc / "containers/policy.json")
        for place in places:
            try:
                with place.open("rb") as file:
                    raw = file.read(limits.POLICY_BYTES + 1)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise ConfigError(
                    f"cannot be read: {error.strerror}", subject=str(place)
                ) from error
            return cls.parse(raw, subject=str(place))
        raise ConfigError(
            "no policy.json says which images to accept, so none is",
            subject=" or ".join(map(str, places)),
            advice='to accept all: {"default": [{"type": "insecureAcceptAnything"}]}',
        )

    @classmethod
    def parse(cls, raw: bytes, *, subject: str = "policy.json") -> Self:
        """Read a policy's text; raises ``ConfigError``."""
        if len(raw) > limits.POLICY_BYTES:
            raise ConfigError("too large for a policy", subject=subject)
        try:
            top = strictjson.members(
                strictjson.decode(raw), "the policy", ("default",), ("transports",)
            )
            default = _requirements(top["default"], "default")
            transports = {
                name: _scopes(name, scopes)
                for name, scopes in _object(top.get("transports", {}), "transports").items()
            }
        except NotStrict as error:
            raise ConfigError(f"no valid policy: {error}", subject=subject) from error
        return cls(default, transports)

    def requirements(self, transport: str, identity: Reference | str) -> tuple[Requirement, ...]:
        """What an image must meet: the list of the most specific scope that applies."""
        scopes = self.transports.get(transport)
        if scopes is None:
            return self.default
        for scope in (*scopes_of(transport, identity), ""):
            found = scopes.get(scope)
            if found is not None:
                return found
        return self.default

    def needs_signatures(self, transport: str, identity: Reference | str) -> bool:
        """Whether ``check`` looks at signatures, so that they must be fetched first."""
        return any(each.needs_signatures for each in self.requirements(transport, identity))

    def check(
        self,
        transport: str,
        identity: Reference | str,
        manifest: bytes,
        signatures: Sequence[bytes] = (),
        *,
        reference: Reference | None = None,
    ) -> None:
        """Raise ``PolicyRejected`` unless the image may be copied.

        ``manifest`` are the exact bytes of the image's own manifest (of the chosen platform),
        ``signatures`` OpenPGP messages.  ``reference`` is the logical name that signatures
        are held against, where ``identity`` is none.
        """
        if isinstance(identity, Reference):
            reference = identity
        image = Unchecked(reference, manifest, signatures)
        for requirement in self.requirements(transport, identity):
            try:
                requirement.check(image)
            except PolicyRejected as error:
                if not error.subject:
                    error.subject = f"{transport}:{identity}"
                raise


def scopes_of(transport: str, identity: Reference | str) -> Iterator[str]:
    """The scopes that an image falls under, the most specific first, without ``""``."""
    if isinstance(identity, Reference):
        yield from _docker_scopes(identity)
    elif identity.startswith("["):
        yield from _storage_scopes(identity)
    elif identity:
        yield from _path_scopes(identity)


def _docker_scopes(reference: Reference) -> Iterator[str]:
    pinned = reference if reference.digest is None else reference.with_digest(reference.digest)
    yield str(pinned)
    name = reference.name
    yield name
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
    host = name.partition(":")[0]
    while "." in host:
        host = host.partition(".")[2]
        yield f"*.{host}"


def _path_scopes(identity: str) -> Iterator[str]:
    yield identity
    path, colon, tag = identity.rpartition(":")
    if colon and "/" not in tag:
        identity = path
        yield identity
    parents = identity.rpartition("/")[0]
    while parents:
        yield parents
        parents = parents.rpartition("/")[0]


def _storage_scopes(identity: str) -> Iterator[str]:
    """``[overlay@/root]name:tag``, the name's parents, ``[overlay@/root]``, ``[/root]``."""
    yield identity
    store, _, name = identity.partition("]")
    store += "]"
    shorter, at, _ = name.rpartition("@")
    if at and shorter:
        yield store + shorter
        name = shorter
    repository = name.rpartition(":")[0] if name.rfind(":") > name.rfind("/") else name
    while repository:
        yield store + repository
        repository = repository.rpartition("/")[0]
    yield store
    driver, at, root = store[1:].partition("@")
    if at and driver:
        yield f"[{root}"


# -- reading ------------------------------------------------------------------------


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NotStrict(f"{what} is no object")
    return value


def _scopes(transport: str, value: Any) -> dict[str, tuple[Requirement, ...]]:
    scopes = _object(value, f"transports.{transport}")
    for scope in scopes:
        if scope and transport in _PATH_TRANSPORTS:
            path = Path(scope)
            if not path.is_absolute() or str(path) != scope or ".." in path.parts or scope == "/":
                raise NotStrict(f"transports.{transport}: {scope!r} is no plain absolute path")
    return {scope: _requirements(each, f"{transport} {scope}") for scope, each in scopes.items()}


def _requirements(value: Any, what: str) -> tuple[Requirement, ...]:
    if not isinstance(value, list) or not value:
        raise NotStrict(f"{what} is no list with at least one requirement")
    return tuple(_requirement(each) for each in value)


def _requirement(value: Any) -> Requirement:
    kind = _object(value, "a requirement").get("type")
    match kind:
        case "insecureAcceptAnything":
            strictjson.members(value, kind, ("type",))
            return AcceptAnything()
        case "reject":
            strictjson.members(value, kind, ("type",))
            return Reject()
        case "signedBy":
            from layerstore.copy.signedby import signed_by  # noqa: PLC0415 - few policies have it

            return signed_by(value)
        case "sigstoreSigned":
            strictjson.members(value, kind, ("type",), _SIGSTORE_KEYS)
            return Unsupported("a sigstore signature (sigstoreSigned)")
        case "signedBaseLayer":
            strictjson.members(value, kind, ("type", "baseLayerIdentity"))
            return Unsupported("a signed base layer (signedBaseLayer)")
    raise NotStrict(f"the requirement type {kind!r} is not known")
