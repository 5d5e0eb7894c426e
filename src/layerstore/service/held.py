"""A mount that is held: its FUSE descriptor, and what a server has to know to serve it.

The facts are written beside the descriptor wherever it goes (to a server, to another keeper, to
systemd), so they never belong to another mount.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from layerstore import fuse, limits
from layerstore.errors import MountError, StorageError
from layerstore.fuse.operations import Operations

_FACTS: Final = "facts"
_FUSE: Final = "fuse"
_JOURNAL: Final = "journal"


@dataclass(frozen=True, slots=True)
class HeldMount:
    """One FUSE connection.

    ``journal`` is the descriptor of a `fuse.Journal`, None where the kernel can resend.
    ``major`` and ``minor`` are the device number of the file system while it lives.
    """

    fd: int
    journal: int | None
    mountpoint: str
    major: int
    minor: int
    negotiated: fuse.Negotiated

    @property
    def name(self) -> str:
        """Its name among those of this machine."""
        return str(self.minor)

    @property
    def alive(self) -> bool:
        """Whether anything can still use it: it is mounted, or something has it open."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return not poll.poll(0)

    @property
    def attached(self) -> bool:
        """Whether it is what its mount point shows; a detached one lives on for its users."""
        return self.is_at(self.mountpoint)

    def is_at(self, place: str | os.PathLike[str]) -> bool:
        """Whether it is what a directory shows."""
        there = fuse.find_mount(place)
        return there is not None and (there.major, there.minor) == (self.major, self.minor)

    @property
    def fds(self) -> tuple[int, ...]:
        """Its descriptors, as `from_facts` takes them."""
        return (self.fd,) if self.journal is None else (self.fd, self.journal)

    def facts(self) -> dict[str, object]:
        """All but the descriptors, for JSON."""
        return {
            "mountpoint": self.mountpoint,
            "major": self.major,
            "minor": self.minor,
            "journal": self.journal is not None,
            "negotiated": json.loads(self.negotiated.to_json()),
        }

    def close(self) -> None:
        """Close the descriptors.  Those of the last holder end the connection."""
        for fd in self.fds:
            os.close(fd)


def from_facts(facts: Mapping[str, Any], fds: Sequence[int]) -> HeldMount:
    """What `HeldMount.facts` said, and as many of the descriptors as it has.  StorageError."""
    try:
        return HeldMount(
            fds[0],
            fds[1] if facts["journal"] else None,
            str(facts["mountpoint"]),
            int(facts["major"]),
            int(facts["minor"]),
            fuse.Negotiated.from_json(json.dumps(facts["negotiated"])),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise StorageError(f"what is said of a mount makes no sense: {error!r}") from error


def pack(mounts: Sequence[HeldMount]) -> tuple[list[dict[str, object]], list[int]]:
    """Several mounts as part of a message, and the descriptors that go with it."""
    return [mount.facts() for mount in mounts], [fd for mount in mounts for fd in mount.fds]


def unpack(facts: Sequence[Mapping[str, Any]], fds: Sequence[int]) -> list[HeldMount]:
    """What `pack` packed.  StorageError."""
    mounts = []
    for each in facts:
        mounts.append(from_facts(each, fds))
        fds = fds[len(mounts[-1].fds) :]
    return mounts


def mount_fresh(mountpoint: Path, *, resend: bool = True) -> HeldMount:
    """Mount, and agree with the kernel how to speak: from here on any server can serve it.

    The kernel says this once only; a server that died before it had told the outcome would take
    it along.  MountError.
    """
    fd = fuse.mount(mountpoint)
    try:
        options = fuse.SessionOptions(posix_acl=True, resend=resend)
        session = fuse.Session(fd, Operations(), options=options)
        try:
            negotiated = session.handshake()
        finally:
            session.close()
        there = fuse.find_mount(mountpoint)
        if there is None:
            raise MountError("the mount went away at once", subject=str(mountpoint))
        fuse.set_read_ahead(mountpoint)
    except BaseException:
        fuse.unmount(mountpoint)
        os.close(fd)
        raise
    journal = None if negotiated.can_resend else fuse.Journal.create()
    return HeldMount(fd, journal, there.mountpoint, there.major, there.minor, negotiated)


# -- among named descriptors, as systemd keeps them --------------------------------


def stored(mount: HeldMount) -> dict[str, int]:
    """Names for a store of descriptors; that of the facts is new memory, the caller's to close."""
    facts = os.memfd_create("layerstore-facts", os.MFD_CLOEXEC)
    os.write(facts, json.dumps(mount.facts()).encode())
    named = {f"{_FACTS}-{mount.name}": facts, f"{_FUSE}-{mount.name}": mount.fd}
    if mount.journal is not None:
        named[f"{_JOURNAL}-{mount.name}"] = mount.journal
    return named


def names_of(mount: HeldMount) -> tuple[str, ...]:
    """The names that `stored` gave."""
    return tuple(f"{kind}-{mount.name}" for kind in (_FACTS, _FUSE, _JOURNAL))


def from_store(named: Sequence[tuple[str, int]]) -> list[HeldMount]:
    """The mounts among kept descriptors; what is none is closed."""
    fds = dict(named)
    mounts = []
    for name, fd in fds.items():
        kind, _, number = name.partition("-")
        if kind != _FACTS or f"{_FUSE}-{number}" not in fds:
            continue
        with contextlib.suppress(StorageError, ValueError, OSError):
            facts = json.loads(os.pread(fd, limits.KEEPER_MESSAGE_BYTES, 0))
            keys = (f"{_FUSE}-{number}", f"{_JOURNAL}-{number}")
            mounts.append(from_facts(facts, [fds[key] for key in keys if key in fds]))
    used = {fd for mount in mounts for fd in mount.fds}
    for _, fd in named:
        if fd not in used:
            os.close(fd)
    return mounts
