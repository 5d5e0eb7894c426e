from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
import time
from pathlib import Path

import pytest

from layerstore import limits
from layerstore.errors import LayerstoreError, VerificationError


def some_files(count: int, size: int = 700, seed: int = 1) -> list[bytes]:
    dice = random.Random(seed)
    return [dice.randbytes(dice.randint(1, size)) for _ in range(count)]


def test_reads_give_the_files_bytes(make_lab):
    lab = make_lab([b"hello", b"", b"x" * 5000])
    assert lab.read(0) == b"hello"
    assert lab.read(1) == b""
    assert lab.read(2, 990, 1020) == b"x" * 1020
    assert lab.read(2, 4999, 100) == b"x"
    assert lab.content.read_stored(2, 5000, 10) == b""


def test_nothing_is_fetched_twice(make_lab):
    lab = make_lab(some_files(200), chunk_size=100)
    order = list(range(200)) * 3
    random.Random(5).shuffle(order)
    threads = [
        threading.Thread(target=lambda part=part: [lab.read(n) for n in part])
        for part in (order[0::4], order[1::4], order[2::4], order[3::4])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = sorted(lab.source.requests)
    for (offset, length), (following, _) in itertools.pairwise(asked):
        assert offset + length <= following
    assert lab.content.stats.fetched_bytes <= len(lab.layer.blob)


def test_neighbours_come_along_in_one_request(make_lab):
    lab = make_lab(some_files(50))
    for number in range(50):
        assert lab.read(number) == lab.layer.files[number]
    assert len(lab.source.requests) == 1


def test_equal_files_of_two_layers_are_fetched_once(make_lab):
    first = make_lab([b"same content", b"one"])
    second = make_lab([b"same content", b"two"])
    first.read(0)
    assert second.content.read_stored(0, 0, 100) == b"same content"
    assert second.source.requests == []


def test_a_corrupted_chunk_is_an_error_and_never_stored(make_lab):
    lab = make_lab([b"good" * 50, b"evil" * 50, b"fine" * 50])
    member = lab.layer.member(1)
    blob = bytearray(lab.layer.blob)
    blob[member.offset + 12] ^= 1
    lab.source.blob = bytes(blob)
    assert lab.read(0) == b"good" * 50
    with pytest.raises(LayerstoreError):
        lab.read(1)
    assert lab.read(2) == b"fine" * 50
    assert lab.content.read_stored(1, 0, 10) is None
    assert lab.content.stats.failed_units >= 1


def test_a_well_formed_member_with_other_bytes_is_refused(make_lab):
    lab = make_lab([b"A" * 100])
    other = make_lab([b"B" * 100])
    assert len(other.layer.blob) == len(lab.layer.blob)
    lab.source.blob = other.layer.blob
    with pytest.raises(VerificationError):
        lab.read(0)
    assert not lab.objects.has(hashlib.sha256(b"B" * 100).digest())


def test_wrong_bytes_are_fetched_once_more_and_then_only_after_a_while(make_lab, monkeypatch):
    lab = make_lab([b"A" * 100])
    right = lab.source.blob
    lab.source.blob = bytes(len(right))
    with pytest.raises(LayerstoreError):
        lab.read(0)
    asked = len(lab.source.requests)
    assert asked == 2
    assert lab.fetch(0) is not None
    assert len(lab.source.requests) == asked
    lab.source.blob = right
    monkeypatch.setattr(limits, "FAILURE_SECONDS", 0.0)
    assert lab.read(0) == b"A" * 100


def test_a_bit_that_flipped_on_the_way_is_no_error(make_lab):
    lab = make_lab([b"A" * 100])
    right = lab.source.blob
    lab.source.blob = bytes(len(right))
    assert lab.fetch(0) is None
    lab.source.blob = right
    assert lab.read(0) == b"A" * 100


def test_neighbours_that_came_along_wrong_are_never_shown(make_lab):
    lab = make_lab([b"good" * 50, b"evil" * 50])
    right, member = lab.source.blob, lab.layer.member(1)
    lab.source.blob = right[: member.offset + 12] + b"?" + right[member.offset + 13 :]
    assert lab.read(0) == b"good" * 50
    lab.source.blob = right
    assert lab.read(1) == b"evil" * 50
    assert lab.content.stats.failed_units == 1


def test_completion_fetches_wrong_parts_again(make_lab):
    lab = make_lab(some_files(50))
    right, member = lab.source.blob, lab.layer.member(20)
    lab.source.blob = right[: member.offset + 12] + b"??" + right[member.offset + 14 :]
    while lab.content.complete_step():
        lab.source.blob = right
    assert lab.content.complete
    assert lab.content.read_blob(0, len(right)) == right


def test_a_broken_connection_is_resumed_where_it_broke(make_lab):
    lab = make_lab([os.urandom(40_000) for _ in range(4)], chunk_size=10_000)
    lab.source.break_after = 60_000
    for number in range(4):
        assert lab.read(number) == lab.layer.files[number]
    assert lab.content.stats.fetched_bytes < len(lab.layer.blob) + 40_000


def test_a_registry_without_ranges_sends_the_blob_once(make_lab):
    lab = make_lab(some_files(300, 3000))
    lab.source.ignore_ranges = True
    lab.source.pause = 0.001
    threads = [threading.Thread(target=lambda n=n: lab.read(n)) for n in (250, 3, 120, 299, 0, 77)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, data in enumerate(lab.layer.files):
        assert lab.read(number) == data
    # those that were under way at the same time may have asked, but did not read
    assert lab.content.stats.fetched_bytes <= len(lab.layer.blob)
    assert lab.source.sent < 2 * len(lab.layer.blob)


def test_a_read_does_not_wait_behind_a_long_prefetch(make_lab):
    lab = make_lab([os.urandom(60_000) for _ in range(60)], chunk_size=60_000)
    lab.source.pause = 0.05
    lab.content.prefetch(lab.layer.toc_offset)
    time.sleep(0.1)
    begin = time.monotonic()
    assert lab.read(59) == lab.layer.files[59]
    assert time.monotonic() - begin < 1.0
    lab.source.pause = 0
    for number in range(60):
        assert lab.read(number) == lab.layer.files[number]
    assert lab.content.stats.fetched_bytes <= len(lab.layer.blob)


def complete(lab) -> None:
    while lab.content.complete_step():
        pass


def test_background_completion_needs_no_source_afterwards(make_lab):
    lab = make_lab(some_files(100, 5000))
    lab.read(50)
    complete(lab)
    assert lab.content.complete
    lab.source.broken = True
    for number, data in enumerate(lab.layer.files):
        assert lab.read(number) == data
    assert lab.content.read_blob(0, 1 << 20) == lab.layer.blob


def test_blob_waits_for_verification(make_lab):
    lab = make_lab(some_files(30))
    assert lab.content.read_blob(0, 10) is None
    done = threading.Event()
    lab.content.fetch_blob(lambda error: done.set())
    assert done.wait(10)
    assert lab.content.read_blob(5, 100) == lab.layer.blob[5:105]


def test_blob_with_a_wrong_digest_is_never_shown_but_its_files_are(make_lab):
    lab = make_lab([b"one" * 30, b"two" * 30])
    blob = bytearray(lab.layer.blob)
    blob[3] ^= 0xFF  # the head is covered by the blob digest only
    lab.source.blob = bytes(blob)
    errors: list[Exception | None] = []
    done = threading.Event()

    def finish(error: Exception | None) -> None:
        errors.append(error)
        done.set()

    lab.content.fetch_blob(finish)
    assert done.wait(10)
    assert isinstance(errors[0], VerificationError)
    assert lab.content.read_blob(0, 10) is None
    assert not lab.content.complete
    assert lab.read(1) == b"two" * 30


def test_two_who_look_at_the_same_wrong_bytes_are_no_second_proof(make_lab):
    """Only what came a second time shows that the registry has another blob."""
    lab = make_lab([b"one" * 30, b"two" * 30])
    good = lab.source.blob
    lab.source.blob = good[:3] + bytes([good[3] ^ 1]) + good[4:]
    while not lab.content.filled:
        assert lab.content._fetcher.sweep() is None
    real, waiting = lab.content._whole.verify, threading.Barrier(2)
    found: list[bool] = []

    def look() -> None:
        waiting.wait()
        found.append(real())

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False, False]
    assert lab.content.blob_error is None
    lab.source.blob = good
    while lab.content.complete_step():
        pass
    assert lab.content.complete


def test_a_file_digest_that_contradicts_its_chunks_is_refused(make_lab):
    lab = make_lab([os.urandom(5000)])
    lab.layer.lie_about(0, hashlib.sha256(b"something popular").digest())
    lab.fetch(0, 0, 5000)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            lab.content.read_stored(0, 0, 5000)
        except VerificationError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the contradiction was not noticed")
    assert not lab.objects.has(hashlib.sha256(b"something popular").digest())


def test_a_large_file_becomes_an_object_when_it_is_whole(make_lab, tmp_path: Path):
    data = os.urandom(5000)
    lab = make_lab([data])
    assert lab.read(0) == data
    until = time.monotonic() + 5
    while not lab.objects.has(hashlib.sha256(data).digest()) and time.monotonic() < until:
        time.sleep(0.01)
    assert Path(lab.objects.path(hashlib.sha256(data).digest())).read_bytes() == data
    assert list((tmp_path / "content" / "partial").iterdir()) == []
    assert lab.read(0) == data


def test_what_was_fetched_survives_the_process(make_lab):
    lab = make_lab([os.urandom(5000), b"small"])
    lab.read(0, 0, 1500)
    lab.read(1)
    stored = lab.content.stored_bytes
    again = lab.reopen()
    lab.source.broken = True
    assert again.stored_bytes == stored
    assert again.read_stored(0, 0, 1500) == lab.layer.files[0][:1500]
    assert again.read_stored(1, 0, 10) == b"small"


def test_a_lost_object_is_made_again_from_the_stored_blob(make_lab):
    lab = make_lab([b"precious" * 20])
    lab.read(0)
    lab.objects.discard(hashlib.sha256(b"precious" * 20).digest())
    lab.source.broken = True
    assert lab.read(0) == b"precious" * 20


def test_a_truncated_object_is_dropped_and_fetched_again(make_lab):
    lab = make_lab([b"precious" * 20])
    lab.read(0)
    path = lab.objects.path(hashlib.sha256(b"precious" * 20).digest())
    os.truncate(path, 5)
    assert lab.read(0) == b"precious" * 20


def test_bytes_read_with_the_toc_are_not_fetched_again(make_lab):
    lab = make_lab([b"a" * 90, b"b" * 90, b"c" * 90])
    end = lab.layer.blob[lab.layer.member(1).offset - 3 :]
    lab.content.seed(end)
    assert lab.read(1) == b"b" * 90
    assert lab.read(2) == b"c" * 90
    assert lab.source.requests == []
    lab.read(0)
    assert len(lab.source.requests) == 1


def test_needed_bytes_are_those_that_readers_asked_for(make_lab):
    lab = make_lab(some_files(100))
    lab.content.prefetch(lab.layer.toc_offset)
    lab.read(7)
    lab.read(7)
    member = lab.layer.member(lab.layer.chunk(lab.layer.content(7).first_chunk).member)
    assert lab.content.stats.needed_bytes == member.end - member.offset
