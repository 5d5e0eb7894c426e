"""Content digests: ``algorithm:hex`` (OCI image specification, "Digests").

Only the registered algorithms sha256 and sha512 are taken.  layerstore itself
computes sha256 only; sha512 is checked when somebody else announced it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, Self

from layerstore.errors import InvalidDigest, VerificationError

_PATTERN: Final = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


class Digest(str):
    """A checked digest; compares, hashes and prints as its text."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check ``text``; raises ``InvalidDigest``."""
        if _PATTERN.fullmatch(text) is None:
            raise InvalidDigest("not a sha256 or sha512 digest", subject=text[:160])
        return cls(text)

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Self:
        """The sha256 digest of ``data``."""
        return cls(f"sha256:{hashlib.sha256(data).hexdigest()}")

    @property
    def algorithm(self) -> str:
        """``sha256`` or ``sha512``."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The part behind the colon."""
        return self.partition(":")[2]

    def verify(self, data: bytes | bytearray | memoryview, *, subject: str) -> None:
        """Raise ``VerificationError`` unless ``data`` has this digest.

        ``subject`` names what was checked in the error.
        """
        found = hashlib.new(self.algorithm, data).hexdigest()
        if found != self.hex:
            raise VerificationError(
                f"expected {self}, found {self.algorithm}:{found} in {len(data)} bytes",
                subject=subject,
                advice="the content was damaged or replaced on its way",
            )


def decode_digest(kind: type, value: object) -> object:
    """The ``dec_hook`` with which msgspec reads a ``Digest`` field."""
    if kind is Digest and isinstance(value, str):
        try:
            return Digest.parse(value)
        except InvalidDigest as error:
            raise ValueError(error.what) from None
    raise TypeError("not a digest")
