"""The one error tree of layerstore.

Every error says what failed, for which subject (reference, layer, file), whose
fault it is and what to do about it.  ``code`` is a stable reason code: the same
word stands in the log line, in the counter and in the documentation.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Fault(enum.Enum):
    """Whose fault an error is."""

    CALLER = "caller"  # a wrong argument or configuration
    CONTENT = "content"  # what the publisher of the image put there
    REGISTRY = "registry"  # the registry answered, but not as it should
    NETWORK = "network"  # no or no timely answer
    LOCAL = "local"  # this machine: disk, kernel, permissions
    INTERNAL = "internal"  # layerstore itself


class LayerstoreError(Exception):
    """Base of all errors that layerstore raises on purpose.

    ``what`` is one sentence without a final stop, ``subject`` the reference,
    layer or file concerned, ``advice`` what the reader can do about it.
    """

    code: ClassVar[str] = "error"
    fault: ClassVar[Fault] = Fault.INTERNAL

    def __init__(self, what: str, *, subject: str = "", advice: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.subject = subject
        self.advice = advice

    def __str__(self) -> str:
        text = f"{self.subject}: {self.what}" if self.subject else self.what
        return f"{text} ({self.advice})" if self.advice else text

    @property
    def passing(self) -> bool:
        """Whether it says that nobody can answer now, so that asking again may help."""
        return False


class UsageError(LayerstoreError):
    """A command line or call that makes no sense."""

    code = "usage"
    fault = Fault.CALLER


class ConfigError(LayerstoreError):
    """A configuration file that cannot be used as it stands."""

    code = "config"
    fault = Fault.CALLER


class InvalidReference(LayerstoreError):
    """A text that is no image reference."""

    code = "invalid-reference"
    fault = Fault.CALLER


class ContentError(LayerstoreError):
    """An image whose bytes break a format rule."""

    code = "content"
    fault = Fault.CONTENT


class InvalidDigest(ContentError):
    """A text that is no digest, or one of an algorithm that is not supported."""

    code = "invalid-digest"


class InvalidManifest(ContentError):
    """A manifest, index or config that breaks its specification."""

    code = "invalid-manifest"


class UnsupportedFormat(ContentError):
    """Well-formed content of a kind that is not handled."""

    code = "unsupported-format"


class InvalidLayer(ContentError):
    """A layer whose footer, TOC, tar stream or compression is broken."""

    code = "invalid-layer"


class LimitExceeded(ContentError):
    """Content larger or deeper than a bound of ``limits``."""

    code = "limit-exceeded"


class VerificationError(ContentError):
    """Bytes whose digest is not the announced one."""

    code = "verification"


class RegistryError(LayerstoreError):
    """A registry's answer that is an error.

    ``status`` is the HTTP status, 0 for an answer that contradicts itself; ``codes`` are
    the registry's own error codes (OCI distribution specification, "Error Codes"); ``pause``
    is how many seconds it wants to be left alone.
    """

    code = "registry"
    fault = Fault.REGISTRY

    def __init__(
        self,
        what: str,
        *,
        subject: str = "",
        advice: str = "",
        status: int = 0,
        codes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what, subject=subject, advice=advice)
        self.status = status
        self.codes = codes
        self.pause = 0.0

    @property
    def passing(self) -> bool:
        return self.status in (408, 429) or self.status >= 500


class NotFound(RegistryError):
    """404, or the registry's word for it."""

    code = "not-found"


class AuthenticationError(RegistryError):
    """401 or 403 after every credential was tried."""

    code = "authentication"


class RateLimited(RegistryError):
    """429 after all retries."""

    code = "rate-limited"


class RangeNotSupported(RegistryError):
    """The registry ignores byte ranges and the blob is too large to take whole."""

    code = "no-ranges"


class NetworkError(LayerstoreError):
    """No connection, a reset, a short body, a time-out, after all retries."""

    code = "network"
    fault = Fault.NETWORK

    @property
    def passing(self) -> bool:
        return True


class DeadlineExceeded(NetworkError):
    """The time allowed for an operation is over."""

    code = "timeout"


class OutageError(NetworkError):
    """A registry gave no answer for as long as a read may wait for it."""

    code = "outage"


class StorageError(LayerstoreError):
    """The local disk or database failed, or holds something that is no longer right."""

    code = "storage"
    fault = Fault.LOCAL


class DiskFull(StorageError):
    """The local disk takes nothing: it is full, a quota is used up, or it fails."""

    code = "no-room"


class NoRoom(DiskFull):
    """The limit of the store's disk use, or the reserve of its file system, is reached."""


class CorruptStorage(StorageError):
    """A graph root whose records or files contradict each other or cannot be read."""

    code = "corrupt-storage"


class UnknownObject(LayerstoreError):
    """A name or id that no image, layer or container of the storage has, or too many have."""

    code = "no-such-object"
    fault = Fault.CALLER


class RemovedObject(UnknownObject, CorruptStorage):
    """An object that somebody removed since it was asked for; who looks for damage finds it so."""


class InUse(LayerstoreError):
    """An object that cannot be removed or renamed because others need it."""

    code = "in-use"
    fault = Fault.CALLER


class PolicyRejected(LayerstoreError):
    """An image that the signature policy of this machine does not accept."""

    code = "policy-rejected"
    fault = Fault.CONTENT


class MountError(LayerstoreError):
    """The kernel or fusermount3 refused a mount."""

    code = "mount"
    fault = Fault.LOCAL


class ServiceError(LayerstoreError):
    """The daemon is not there, already there, or refused a request."""

    code = "service"
    fault = Fault.LOCAL


class NoServiceError(ServiceError):
    """No service runs where one was asked for."""

    code = "no-service"


def exit_status(error: LayerstoreError) -> int:
    """2 for what the caller got wrong, 1 for the rest and for what is simply not there."""
    return 2 if error.fault is Fault.CALLER and not isinstance(error, UnknownObject) else 1
