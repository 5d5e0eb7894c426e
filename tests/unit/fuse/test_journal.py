"""The journal of open requests, with one server after another over the same memory."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import cast

import pytest

from layerstore.fuse import Journal, Negotiated, Operations, Request, Session, wire
from layerstore.fuse.journal import PLACES

NEGOTIATED = Negotiated(7, 31, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.fixture
def memory() -> Iterator[int]:
    fd = Journal.create()
    yield fd
    os.close(fd)


def put(table: dict[int, Request], *uniques: int) -> None:
    for unique in uniques:
        table[unique] = cast(Request, None)  # only the key counts


def test_a_new_journal_is_empty(memory: int) -> None:
    assert list(Journal(memory).left_open()) == []


def test_the_next_server_finds_what_was_open(memory: int) -> None:
    put(Journal(memory).open_requests(), 2, 4, 6)
    assert list(Journal(memory).left_open()) == [2, 4, 6]


def test_a_request_that_was_read_and_not_yet_noted_is_found(memory: int) -> None:
    struct.pack_into("=IIQ", Journal(memory).buffer, 0, 40, wire.READ, 8)
    assert list(Journal(memory).left_open()) == [8]


def test_the_number_of_an_answered_one_stays_for_long(memory: int) -> None:
    table = Journal(memory).open_requests()
    put(table, 2)
    table.pop(2, None)
    put(table, *range(4, 104, 2))
    assert 2 in Journal(memory).left_open()
    for unique in range(200, 200 + 2 * PLACES, 2):
        put(table, unique)
        del table[unique]
    assert 2 not in set(Journal(memory).left_open())
    assert 102 in set(Journal(memory).left_open())  # still open


def test_more_than_it_has_room_for_does_no_harm(memory: int) -> None:
    table = Journal(memory).open_requests()
    put(table, *range(1, PLACES + 101))
    assert len(table) == PLACES + 100
    assert len(list(Journal(memory).left_open())) == PLACES
    for unique in list(table):
        assert table.pop(unique, 1) is None
    assert table.pop(7, 1) == 1


def test_the_next_session_answers_them_with_an_error(memory: int) -> None:
    journal = Journal(memory)
    put(journal.open_requests(), 2, 4)
    reading, writing = os.pipe()
    try:
        session = Session(writing, Operations(), negotiated=NEGOTIATED, journal=journal)
        assert session.resend() is False
        assert session.fail_lost() == 2
        assert session.fail_lost() == 0
        session.close()
        said = os.read(reading, 4096)
    finally:
        os.close(reading)
        os.close(writing)
    assert [*wire.OUT_HEADER.iter_unpack(said)] == [(16, -errno.EIO, 2), (16, -errno.EIO, 4)]


def test_without_a_journal_nothing_is_answered() -> None:
    fd = os.open(os.devnull, os.O_RDWR)
    session = Session(fd, Operations(), negotiated=NEGOTIATED)
    assert session.fail_lost() == 0
    session.close()
    os.close(fd)
