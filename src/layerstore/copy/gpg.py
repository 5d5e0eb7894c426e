"""Verifying OpenPGP messages with gpg, believing a few given keys and nobody else.

Each check has a home directory of its own (``GNUPGHOME``) that holds only these keys, so
neither the user's key ring nor his trust settings have a say.  What gpg found is read from
its machine-readable status lines (GnuPG "doc/DETAILS"); the exit status alone would accept
a message of several signatures of which one is good.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import PolicyRejected

_PREFIX: Final = b"[GNUPG:] "
# Any of these says that something about the message is not right.
_BAD: Final = frozenset(
    ("BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "NODATA", "NO_PUBKEY", "TRUST_NEVER")
)
_FLAGS: Final = (
    *("--batch", "--no-tty", "--quiet", "--no-options", "--no-autostart"),
    *("--no-auto-key-retrieve", "--no-auto-key-locate", "--no-auto-check-trustdb"),
    *("--trust-model", "always", "--status-fd", "2"),
)


def verified_payload(message: bytes, keys: Sequence[bytes]) -> bytes:
    """The text of a message that exactly one of ``keys`` (key rings) has signed.

    Raises ``PolicyRejected`` for any other message, for keys that are none, and where
    there is no gpg.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="layerstore-gpg-") as home:
            trusted = _import(Path(home), keys)
            if not trusted:
                raise PolicyRejected("no public key is in the policy's keys")
            return _verify(Path(home), message, trusted)
    except OSError as error:
        raise PolicyRejected(f"signatures cannot be checked: {error}") from error


def _import(home: Path, keys: Sequence[bytes]) -> frozenset[str]:
    """Put key rings into ``home``; the fingerprints of the keys."""
    trusted: set[str] = set()
    for ring in keys:
        status, _, _ = _run(home, ("--import",), ring)
        trusted.update(words[2] for words in status if words[0] == "IMPORT_OK" and len(words) == 3)
    return frozenset(trusted)


def _verify(home: Path, message: bytes, trusted: frozenset[str]) -> bytes:
    if len(message) > limits.SIGNATURE_BYTES:
        raise PolicyRejected("the signature is too large")
    status, payload, ended = _run(
        home, ("--max-output", str(limits.SIGNATURE_BYTES), "--output", "-", "--verify"), message
    )
    for words in status:
        if words[0] in _BAD:
            raise PolicyRejected(f"the signature is not valid: gpg says {' '.join(words)}")
    if ended != 0:
        raise PolicyRejected(f"the signature is not valid: gpg ended with status {ended}")
    valid = [words for words in status if words[0] == "VALIDSIG"]
    for word, count in (("NEWSIG", 1), ("GOODSIG", 1), ("VALIDSIG", 1), ("PLAINTEXT", 1)):
        found = sum(words[0] == word for words in status)
        if found != count:
            raise PolicyRejected(f"the signature is not valid: gpg says {word} {found} times")
    # The key itself, or the key that a signing subkey belongs to.
    signers = {words[index] for words in valid for index in (1, 10) if len(words) > index}
    if not signers & trusted:
        raise PolicyRejected(f"the key {valid[0][1]} is not accepted")
    return payload


def _run(home: Path, command: Sequence[str], data: bytes) -> tuple[list[list[str]], bytes, int]:
    """The status lines, in words, what came out, and the exit status."""
    try:
        done = subprocess.run(
            ["gpg", "--homedir", str(home), *_FLAGS, *command],
            input=data,
            capture_output=True,
            timeout=limits.GPG_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C", "GNUPGHOME": str(home)},
        )
    except FileNotFoundError as error:
        raise PolicyRejected(
            "the policy demands a signature, and there is no gpg to check it",
            advice="install gnupg",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PolicyRejected(f"gpg did not end within {limits.GPG_SECONDS:g} seconds") from error
    lines = [
        line[len(_PREFIX) :].decode("ascii", "replace").split()
        for line in done.stderr.splitlines()
        if line.startswith(_PREFIX)
    ]
    return [words for words in lines if words], done.stdout, done.returncode
