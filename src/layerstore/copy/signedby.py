"""The requirement ``signedBy`` of policy.json: OpenPGP signatures of simple signing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from layerstore import limits
from layerstore.copy import gpg, strictjson
from layerstore.copy.requirement import Requirement, Unchecked, Unsupported
from layerstore.copy.signedidentity import (
    MatchRepoDigestOrExact,
    SignedIdentity,
    parse_signed_identity,
)
from layerstore.copy.simplesigning import parse_claim
from layerstore.copy.strictjson import NotStrict
from layerstore.errors import PolicyRejected

_KEY_TYPES: Final = ("GPGKeys", "signedByGPGKeys", "X509Certificates", "signedByX509CAs")


@dataclass(frozen=True, slots=True)
class SignedBy(Requirement):
    """``signedBy`` with OpenPGP keys: one good signature is enough."""

    key_paths: tuple[Path, ...]
    key_data: bytes | None
    identity: SignedIdentity

    needs_signatures = True

    def check(self, image: Unchecked) -> None:
        """See ``Requirement``."""
        if not image.signatures:
            raise PolicyRejected("a signature was required, but no signature exists")
        keys = [self.key_data] if self.key_data is not None else list(map(_key, self.key_paths))
        reasons: list[str] = []
        for signature in image.signatures[: limits.SIGNATURES]:
            try:
                self._check_one(signature, keys, image)
            except PolicyRejected as error:
                if error.advice:
                    raise
                reasons.append(error.what)
            else:
                return
        if len(reasons) == 1:
            raise PolicyRejected(reasons[0])
        raise PolicyRejected(f"none of the signatures was accepted: {'; '.join(reasons)}")

    def _check_one(self, signature: bytes, keys: Sequence[bytes], image: Unchecked) -> None:
        payload = gpg.verified_payload(signature, keys)
        try:
            claim = parse_claim(payload)
        except NotStrict as error:
            raise PolicyRejected(f"the signature is malformed: {error}") from error
        if not claim.covers(image.manifest):
            raise PolicyRejected(f"the signature is for another manifest, {claim.manifest}")
        if not self.identity.accepts(image.reference, claim.reference):
            raise PolicyRejected(f"the signature is for another name, {claim.reference!r}")


def signed_by(value: Any) -> Requirement:
    """Read the requirement; raises ``NotStrict``."""
    members = strictjson.members(
        value,
        "signedBy",
        ("type", "keyType"),
        ("keyPath", "keyPaths", "keyData", "signedIdentity"),
    )
    if members["keyType"] not in _KEY_TYPES:
        raise NotStrict(f"signedBy: the keyType {members['keyType']!r} is not known")
    given = [key for key in ("keyPath", "keyPaths", "keyData") if key in members]
    if len(given) != 1:
        raise NotStrict("signedBy needs exactly one of keyPath, keyPaths and keyData")
    identity: SignedIdentity = MatchRepoDigestOrExact()
    if "signedIdentity" in members:
        identity = parse_signed_identity(members["signedIdentity"])
    paths: tuple[Path, ...] = ()
    data: bytes | None = None
    match given[0]:
        case "keyPath":
            paths = (_path(members["keyPath"]),)
        case "keyPaths":
            if not isinstance(members["keyPaths"], list) or not members["keyPaths"]:
                raise NotStrict("signedBy: keyPaths is no list with at least one path")
            paths = tuple(map(_path, members["keyPaths"]))
        case _:
            data = _base64(members["keyData"])
    if members["keyType"] != "GPGKeys":
        return Unsupported(f"signatures by {members['keyType']}")
    return SignedBy(paths, data, identity)


def _path(value: Any) -> Path:
    text = strictjson.text(value, "signedBy: a key path")
    if not text:
        raise NotStrict("signedBy: a key path is empty")
    return Path(text)


def _base64(value: Any) -> bytes:
    try:
        return base64.b64decode(strictjson.text(value, "signedBy: keyData"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise NotStrict("signedBy: keyData is not base64") from error


def _key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limits.POLICY_BYTES)
    except OSError as error:
        raise PolicyRejected(
            f"the policy's key {path} cannot be read: {error.strerror}",
            advice="put the key there or correct policy.json",
        ) from error
