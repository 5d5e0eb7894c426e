"""Throw-away OpenPGP keys for signing images.

Each key has a GNUPGHOME of its own, which must have a short path: the agent's socket lies in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType
from typing import Final, Self

from lab.fresh import fresh


class GpgKey:
    """One key without a passphrase; a context manager, because an agent runs as long."""

    def __init__(self, address: str = "signer@lab.example", algorithm: str = "rsa2048") -> None:
        self.address: Final = address
        self.algorithm: Final = algorithm
        self.home: Final = fresh("gpg-")
        self.public: Final = self.home / "public.gpg"

    @property
    def environment(self) -> dict[str, str]:
        """What makes other programs sign with this key."""
        return {"GNUPGHOME": str(self.home)}

    def sign(self, payload: bytes, *options: str) -> bytes:
        """An OpenPGP message with the payload in it, as simple signing wants it."""
        return self.run(*(options or ("--sign",)), stdin=payload)

    def run(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """What gpg writes; raises CalledProcessError."""
        flags = ("--batch", "--yes", "--quiet", "--pinentry-mode", "loopback", "--passphrase", "")
        return subprocess.run(
            ["gpg", "--homedir", str(self.home), *flags, *arguments],
            input=stdin,
            capture_output=True,
            check=True,
            env={**os.environ, **self.environment},
        ).stdout

    def __enter__(self) -> Self:
        self.run("--quick-gen-key", self.address, self.algorithm, "sign", "0")
        self.public.write_bytes(self.run("--export"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        command = ["gpgconf", "--homedir", str(self.home), "--kill", "all"]
        subprocess.run(command, capture_output=True, check=False)
        shutil.rmtree(self.home, ignore_errors=True)
