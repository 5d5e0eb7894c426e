"""What a simple signature says: the payload inside the OpenPGP message.

containers/image "docs/containers-signature.5.md" ("atomic container signature"):

    {"critical": {"type": "atomic container signature",
                  "image": {"docker-manifest-digest": "sha256:…"},
                  "identity": {"docker-reference": "registry.example/repository:tag"}},
     "optional": {"creator": "…", "timestamp": 1470000000}}

All of ``critical`` must be understood, nothing of ``optional`` matters.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from layerstore.copy import strictjson
from layerstore.copy.strictjson import NotStrict
from layerstore.errors import InvalidDigest
from layerstore.image import Digest

_TYPE: Final = "atomic container signature"


@dataclass(frozen=True, slots=True)
class Claim:
    """Which manifest the signer means, and under which name."""

    manifest: Digest
    reference: str

    def covers(self, manifest: bytes) -> bool:
        """Whether the claim is about this very manifest."""
        found = hashlib.new(self.manifest.algorithm, manifest).hexdigest()
        return found == self.manifest.hex


def parse_claim(payload: bytes) -> Claim:
    """Read a payload; raises ``NotStrict`` for any that is not exactly of this form."""
    top = strictjson.members(strictjson.decode(payload), "the signature", ("critical", "optional"))
    _check_optional(top["optional"])
    critical = strictjson.members(top["critical"], "critical", ("type", "image", "identity"))
    if critical["type"] != _TYPE:
        raise NotStrict(f"critical.type is {critical['type']!r}")
    image = strictjson.members(critical["image"], "critical.image", ("docker-manifest-digest",))
    identity = strictjson.members(critical["identity"], "critical.identity", ("docker-reference",))
    try:
        digest = Digest.parse(strictjson.text(image["docker-manifest-digest"], "the digest"))
    except InvalidDigest as error:
        raise NotStrict(f"docker-manifest-digest: {error.what}") from error
    return Claim(digest, strictjson.text(identity["docker-reference"], "docker-reference"))


def _check_optional(value: Any) -> None:
    if not isinstance(value, dict):
        raise NotStrict("optional is no object")
    if "creator" in value:
        strictjson.text(value["creator"], "optional.creator")
    time = value.get("timestamp", 0)
    if isinstance(time, bool) or not isinstance(time, (int, float)) or time != time // 1:
        raise NotStrict("optional.timestamp is no integer")
