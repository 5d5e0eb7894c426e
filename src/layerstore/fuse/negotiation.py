"""INIT: what this server and the kernel agree on for the life of one mount.

The kernel speaks first, once per mount; a later server that takes the mount over
never sees an INIT again.  So the outcome is a value that can be written down as
JSON and given to the next server.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Final

from layerstore.errors import MountError, StorageError

from . import wire

MIN_MINOR: Final = 28  # MAX_PAGES and CACHE_SYMLINKS, Linux 4.20
OUR_MINOR: Final = 45  # the newest protocol whose structures are known here
MAX_REQUEST_PAGES: Final = 256  # 1 MiB reads
_U32: Final = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, slots=True)
class SessionOptions:
    """What the server asks of the kernel.

    ``readdirplus`` is ``"always"`` (listing a directory brings all attributes along: half
    the work of a cold walk through a tree), ``"auto"`` (only where the kernel thinks they
    are wanted) or ``"never"``.  ``posix_acl`` makes the kernel fetch
    and obey ACL xattrs, at one request per inode.  ``passthrough`` allows backing files
    (initial user namespace only) and needs an `open` handler.  ``allow_idmap`` permits
    idmapped mounts of the file system and needs the mount option default_permissions.
    ``resend`` False does without RESEND, as kernels before 6.9 do.
    """

    readdirplus: str = "always"
    posix_acl: bool = False
    allow_idmap: bool = False
    passthrough: bool = False
    resend: bool = True
    max_background: int = 64
    congestion_threshold: int = 48
    max_readahead: int = MAX_REQUEST_PAGES * wire.PAGE_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Negotiated:
    """The outcome of INIT. ``flags`` are those in force, ``offered`` all the kernel knows."""

    major: int
    minor: int
    flags: int
    offered: int
    max_readahead: int
    max_background: int
    congestion_threshold: int
    max_write: int
    max_pages: int
    max_stack_depth: int

    @property
    def can_resend(self) -> bool:
        """Whether a server that takes over can ask for unanswered requests again."""
        return bool(self.flags & wire.HAS_RESEND)

    def to_json(self) -> str:
        """One line of JSON for the next server."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Negotiated:
        """Read what `to_json` wrote; StorageError if it is anything else."""
        try:
            fields = json.loads(text)
        except ValueError as exc:
            raise StorageError("the saved FUSE negotiation is no JSON") from exc
        names = {field.name for field in dataclasses.fields(cls)}
        if (
            not isinstance(fields, dict)
            or set(fields) != names
            or any(type(value) is not int or value < 0 for value in fields.values())
        ):
            raise StorageError("the saved FUSE negotiation has the wrong fields")
        return cls(**fields)


def wanted_flags(options: SessionOptions) -> int:
    """The INIT flags to set where the kernel offers them."""
    flags = (
        wire.ASYNC_READ
        | wire.PARALLEL_DIROPS
        | wire.CACHE_SYMLINKS
        | wire.NO_OPEN_SUPPORT
        | wire.NO_OPENDIR_SUPPORT
        | wire.MAX_PAGES
        | wire.INIT_EXT
    )
    if options.resend:
        flags |= wire.HAS_RESEND
    if options.readdirplus != "never":
        flags |= wire.DO_READDIRPLUS
    if options.readdirplus == "auto":
        flags |= wire.READDIRPLUS_AUTO
    if options.posix_acl:
        flags |= wire.POSIX_ACL
    if options.passthrough:
        flags |= wire.PASSTHROUGH
    if options.allow_idmap:
        flags |= wire.ALLOW_IDMAP
    return flags


def negotiate(init: wire.InitIn, options: SessionOptions) -> tuple[Negotiated | None, bytes]:
    """Answer the kernel's INIT: (outcome, payload of the reply).

    The outcome is None when the kernel speaks a newer major version and will ask again
    with ours.  MountError if its protocol is too old.
    """
    if init.major > wire.KERNEL_MAJOR:
        head = wire.INIT_OUT.pack(wire.KERNEL_MAJOR, OUR_MINOR, *(0,) * 10)
        return None, head
    if init.major < wire.KERNEL_MAJOR or init.minor < MIN_MINOR:
        raise MountError(
            f"the kernel speaks FUSE {init.major}.{init.minor}, 7.{MIN_MINOR} is needed",
            advice="Linux 4.20 or newer",
        )
    flags = init.flags & wanted_flags(options)
    if not flags & wire.INIT_EXT:
        flags &= _U32
    outcome = Negotiated(
        major=wire.KERNEL_MAJOR,
        minor=min(init.minor, OUR_MINOR),
        flags=flags,
        offered=init.flags,
        max_readahead=min(init.max_readahead, options.max_readahead),
        max_background=options.max_background,
        congestion_threshold=options.congestion_threshold,
        max_write=wire.PAGE_BYTES,
        max_pages=MAX_REQUEST_PAGES if flags & wire.MAX_PAGES else 0,
        max_stack_depth=1 if flags & wire.PASSTHROUGH else 0,
    )
    payload = wire.INIT_OUT.pack(
        outcome.major,
        outcome.minor,
        outcome.max_readahead,
        flags & _U32,
        outcome.max_background,
        outcome.congestion_threshold,
        outcome.max_write,
        1,  # time stamps are exact to the nanosecond
        outcome.max_pages,
        0,
        flags >> 32,
        outcome.max_stack_depth,
    )
    return outcome, payload
