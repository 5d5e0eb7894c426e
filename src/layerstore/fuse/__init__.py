"""FUSE, the kernel's protocol for file systems in user space: wire format, mount, request loop."""

from .journal import Journal
from .mount import (
    MountInfo,
    abort_connection,
    find_mount,
    mount,
    mount_direct,
    mount_fusermount,
    set_read_ahead,
    unmount,
)
from .negotiation import Negotiated, SessionOptions
from .operations import (
    DEFERRED,
    Answer,
    Deferred,
    FuseError,
    Operations,
    xattr_answer,
    xattr_list_answer,
)
from .session import Ended, Request, Session
from .wire import (
    FOREVER,
    ROOT_ID,
    Attr,
    WireError,
    attr_reply,
    entry_reply,
    negative_entry,
    open_reply,
    statfs_reply,
)

__all__ = [
    "DEFERRED",
    "FOREVER",
    "ROOT_ID",
    "Answer",
    "Attr",
    "Deferred",
    "Ended",
    "FuseError",
    "Journal",
    "MountInfo",
    "Negotiated",
    "Operations",
    "Request",
    "Session",
    "SessionOptions",
    "WireError",
    "abort_connection",
    "attr_reply",
    "entry_reply",
    "find_mount",
    "mount",
    "mount_direct",
    "mount_fusermount",
    "negative_entry",
    "open_reply",
    "set_read_ahead",
    "statfs_reply",
    "unmount",
    "xattr_answer",
    "xattr_list_answer",
]
