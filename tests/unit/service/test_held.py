"""Mounts as they go from hand to hand; pipes stand for FUSE descriptors."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterator

import pytest

from layerstore import limits
from layerstore.errors import ServiceError, StorageError
from layerstore.fuse import Negotiated
from layerstore.service import held, messages
from layerstore.service.held import HeldMount
from layerstore.service.holding import Holding
from layerstore.service.systemd import Notifier

NEGOTIATED = Negotiated(7, 45, 1, 3, 131072, 64, 48, 4096, 256, 0)
NOBODY = Notifier("", stores=False, watchdog_seconds=None)


@pytest.fixture
def ends() -> Iterator[list[int]]:
    """Both ends of a pipe, closed afterwards if they still are open."""
    fds = list(os.pipe())
    yield fds
    for fd in fds:
        if fd >= 0:
            os.close(fd)


@pytest.fixture
def mount(ends: list[int]) -> HeldMount:
    return HeldMount(ends[0], None, "/srv/store", 0, 45, NEGOTIATED)


def test_a_mount_survives_a_message(mount: HeldMount, ends: list[int]) -> None:
    both = [mount, dataclasses.replace(mount, fd=ends[1], journal=ends[0], minor=46)]
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        facts, fds = held.pack(both)
        assert len(fds) == 3
        messages.send(here, {"mounts": facts}, fds)
        received = messages.receive(there)
        assert received is not None
        message, copies = received
    try:
        first, second = held.unpack(message["mounts"], copies)
        assert not os.get_inheritable(first.fd)
        assert os.path.sameopenfile(first.fd, mount.fd)
        assert first == dataclasses.replace(mount, fd=copies[0])
        assert second == dataclasses.replace(both[1], fd=copies[1], journal=copies[2])
    finally:
        for fd in copies:
            os.close(fd)


def test_as_many_as_may_be_held_fit_into_one_message(mount: HeldMount) -> None:
    facts, _ = held.pack([mount] * limits.KEEPER_MOUNTS)
    assert len(json.dumps({"serve": {"mounts": facts}})) < limits.KEEPER_MESSAGE_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"journal": True},
        {"minor": "many"},
        {"negotiated": {}},
        {"negotiated": None},
    ],
)
def test_facts_that_make_no_sense_are_refused(mount: HeldMount, change: dict[str, object]) -> None:
    with pytest.raises(StorageError):
        held.from_facts({**mount.facts(), **change}, [mount.fd])
    with pytest.raises(StorageError):
        held.from_facts({}, [mount.fd])


def test_what_systemd_kept_is_found_by_name(mount: HeldMount, ends: list[int]) -> None:
    named = held.stored(mount)
    assert sorted(named) == ["facts-45", "fuse-45"]
    assert set(named) <= set(held.names_of(mount))
    stranger = os.memfd_create("stranger")
    alone = os.memfd_create("alone")
    kept = [("stored", stranger), *named.items(), ("facts-7", alone)]
    (found,) = held.from_store(kept)
    assert found == mount
    for fd in (stranger, alone, named["facts-45"]):  # are closed
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_facts_that_are_damaged_give_no_mount(mount: HeldMount, ends: list[int]) -> None:
    facts = os.memfd_create("facts")
    os.write(facts, b"{")
    assert held.from_store([("fuse-45", mount.fd), ("facts-45", facts)]) == []
    ends[0] = -1  # closed with the rest


def test_a_mount_ends_with_its_connection(mount: HeldMount, ends: list[int]) -> None:
    holding = Holding(NOBODY)
    holding.mounts = [mount]
    assert mount.alive
    holding.drop_dead()
    assert holding.mounts == [mount]
    os.close(ends[1])  # a pipe without a writer hangs up, as a descriptor without a mount errs
    assert not mount.alive
    holding.drop_dead()
    assert holding.mounts == []
    ends[:] = [-1, -1]


def test_a_mount_is_attached_only_where_it_is_on_top(mount: HeldMount) -> None:
    assert not mount.attached
    root = os.stat("/proc")
    here = dataclasses.replace(
        mount, mountpoint="/proc", major=os.major(root.st_dev), minor=os.minor(root.st_dev)
    )
    assert here.attached
    assert not dataclasses.replace(here, minor=here.minor + 1).attached


def test_other_packets_are_no_messages() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        for data in (b"{", b"[1]", b"\xff"):
            here.send(data)
            with pytest.raises(ServiceError):
                messages.receive(there)
        here.close()
        assert messages.receive(there) is None
