"""The request loop against a pretended kernel at the other end of a socket pair."""

import errno
import logging
import os
import queue
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerstore.errors import MountError, StorageError, VerificationError
from layerstore.fuse import DEFERRED, Answer, Ended, FuseError, Operations, Request, wire
from layerstore.fuse.negotiation import Negotiated, SessionOptions, negotiate
from layerstore.fuse.wire import InitIn

Connect = Callable[..., Any]
READ = struct.pack("<QQIIQII", 0, 0, 4096, 0, 0, 0, 0)


class Answering(Operations):
    """READ does what the test says."""

    def __init__(self, do: Callable[[Request], Any]) -> None:
        self.do = do
        self.forgotten: list[tuple[int, int]] = []

    def read(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        answer: Answer = self.do(request)
        return answer

    def forget(self, nodeid: int, lookups: int) -> None:
        self.forgotten.append((nodeid, lookups))


class Holding(Answering):
    """READ is held until the test answers it."""

    def __init__(self) -> None:
        super().__init__(self._hold)
        self.held: list[Request] = []

    def _hold(self, request: Request) -> Answer:
        self.held.append(request)
        return DEFERRED


def _raise(exc: BaseException) -> Any:
    raise exc


@pytest.mark.parametrize(
    ("answer", "error", "payload"),
    [
        (b"", 0, b""),
        (b"abc", 0, b"abc"),
        (b"x" * 100_000, 0, b"x" * 100_000),
        (bytearray(b"abc"), 0, b"abc"),
        (memoryview(b"abcdef")[2:4], 0, b"cd"),
        ([b"ab", memoryview(b"cd")], 0, b"abcd"),
        ((), 0, b""),
        (errno.ENOENT, errno.ENOENT, b""),
        (512, errno.EIO, b""),
        (-2, errno.EIO, b""),
        (0, errno.EIO, b""),
        (None, errno.EIO, b""),
        ("text", errno.EIO, b""),
        ([1, 2], errno.EIO, b""),
    ],
)
def test_what_a_handler_returns_is_sent(
    connect: Connect, answer: Any, error: int, payload: bytes
) -> None:
    kernel = connect(Answering(lambda request: answer))
    kernel.send(wire.READ, READ, unique=6)
    assert kernel.finish() == [(6, error, payload)]


@pytest.mark.parametrize(
    ("exc", "error"),
    [
        (FuseError(errno.ESTALE), errno.ESTALE),
        (VerificationError("wrong bytes", subject="/etc/passwd"), errno.EIO),
        (KeyError("x"), errno.EIO),
        (OSError(errno.EMFILE, "too many"), errno.EIO),
        (RecursionError(), errno.EIO),
    ],
)
def test_what_a_handler_raises_becomes_an_errno_and_the_loop_goes_on(
    connect: Connect, exc: Exception, error: int
) -> None:
    kernel = connect(Answering(lambda request: _raise(exc)))
    kernel.send(wire.READ, READ, unique=2)
    kernel.send(wire.READ, READ, unique=4)
    assert kernel.finish() == [(2, error, b""), (4, error, b"")]
    assert kernel.session.statistics()["errors"] == {errno.errorcode[error]: 2}


def test_an_interrupted_program_answers_before_it_ends(connect: Connect) -> None:
    kernel = connect(Answering(lambda request: _raise(KeyboardInterrupt())))
    kernel.send(wire.READ, READ)
    with pytest.raises(KeyboardInterrupt):
        kernel.session.run()
    assert kernel.receive() == (2, errno.EIO, b"")


def test_a_failing_file_system_does_not_flood_the_log(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = connect(Answering(lambda request: _raise(VerificationError("bad", subject="layer"))))
    for unique in range(2, 102, 2):
        kernel.send(wire.READ, READ, unique=unique)
    with caplog.at_level(logging.ERROR, "layerstore.fuse"):
        assert len(kernel.finish()) == 50
    assert 0 < len(caplog.records) <= 10
    assert "layer: bad" in caplog.text
    assert kernel.session.statistics()["events"]["handler_errors"] == 50


def test_requests_of_unknown_kinds_are_refused_for_good(connect: Connect) -> None:
    kernel = connect(Operations())
    for n, opcode in enumerate((7, 63, 64, 4096, 0xFFFFFFFF)):
        kernel.send(opcode, b"", unique=n)
    assert kernel.finish() == [(n, errno.ENOSYS, b"") for n in range(5)]


@pytest.mark.parametrize(
    "opcode",
    [wire.SETATTR, wire.WRITE, wire.MKDIR, wire.SETXATTR, wire.RENAME2, wire.LINK, wire.FALLOCATE],
)
def test_what_would_write_is_refused_as_read_only(connect: Connect, opcode: int) -> None:
    kernel = connect(Operations())
    kernel.send(opcode, bytes(200))
    assert kernel.finish() == [(2, errno.EROFS, b"")]


@pytest.mark.parametrize("opcode", [wire.OPEN, wire.OPENDIR])
def test_opening_needs_no_messages_by_default(connect: Connect, opcode: int) -> None:
    kernel = connect(Operations())
    kernel.send(opcode, bytes(8))
    assert kernel.finish() == [(2, errno.ENOSYS, b"")]


def test_a_request_that_makes_no_sense_is_refused(connect: Connect) -> None:
    kernel = connect(Operations())
    kernel.send(wire.LOOKUP, b"not terminated", unique=2)
    kernel.send(wire.READ, b"short", unique=4)
    kernel.kernel.send(wire.IN_HEADER.pack(99, wire.GETATTR, 6, 1, 0, 0, 0, 0, 0))
    kernel.kernel.send(b"no header")
    assert kernel.finish() == [(n, errno.EINVAL, b"") for n in (2, 4, 6)]
    assert kernel.session.statistics()["events"]["malformed"] == 4


def test_forgetting_gets_no_answer(connect: Connect) -> None:
    ops = Answering(lambda request: b"")
    kernel = connect(ops)
    kernel.send(wire.FORGET, struct.pack("<Q", 3), nodeid=9)
    kernel.send(wire.BATCH_FORGET, struct.pack("<IIQQQQ", 2, 0, 5, 1, 6, 2), unique=4)
    kernel.send(wire.FORGET, b"", unique=6)
    kernel.send(wire.BATCH_FORGET, struct.pack("<II", 1 << 31, 0), unique=8)
    assert kernel.finish() == []
    assert ops.forgotten == [(9, 3), (5, 1), (6, 2)]


def test_a_request_is_passed_on_with_who_asks(connect: Connect) -> None:
    seen = []

    class Ops(Operations):
        def create(
            self, request: Request, parent: int, name: bytes, flags: int, mode: int
        ) -> Answer:
            seen.append((request.pid, request.opcode, parent, name, flags, mode))
            return errno.ENOENT

    kernel = connect(Ops())
    body = struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + b"use\0"
    kernel.send(wire.CREATE, body, nodeid=77, pid=12)
    assert kernel.finish() == [(2, errno.ENOENT, b"")]
    assert seen == [(12, wire.CREATE, 77, b"use", os.O_RDWR, 0o644)]


_bodies = st.one_of(
    st.binary(max_size=80),
    st.binary(max_size=20).map(lambda name: name + b"\0"),
    st.just(READ),
    st.tuples(st.integers(0, 100), st.binary(max_size=9)).map(
        lambda item: struct.pack("<II", item[0], 0) + item[1] + b"\0"
    ),
)


@settings(max_examples=60)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 70), _bodies, st.integers(1, 9), st.booleans()), max_size=12
    )
)
def test_every_request_has_exactly_one_answer(
    connect: Connect,
    small_fs: Callable[[], Operations],
    caplog: pytest.LogCaptureFixture,
    requests: list[tuple[int, bytes, int, bool]],
) -> None:
    caplog.set_level(logging.CRITICAL, "layerstore.fuse")
    kernel = connect(small_fs())
    silent = {wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT}
    expected = []
    for n, (opcode, body, nodeid, again) in enumerate(requests, 1):
        unique = 2 * n | (wire.UNIQUE_RESEND if again else 0)
        kernel.send(opcode, body, unique=unique, nodeid=nodeid)
        if opcode not in silent:
            expected.append(unique)
    answers = kernel.finish()
    kernel.close()
    assert [unique for unique, _, _ in answers] == expected
    assert all(error == 0 or not payload for _, error, payload in answers)


# -- answering later ---------------------------------------------------------------
def test_a_deferred_request_is_answered_once_whoever_is_first(connect: Connect) -> None:
    ops = Holding()
    kernel = connect(ops)
    kernel.send(wire.READ, READ, unique=8)
    kernel.start()
    assert kernel.ask(wire.STATFS, unique=10)[0] == 0  # the loop goes on meanwhile
    request = ops.held[0]
    assert not request.answered
    barrier = threading.Barrier(8)
    won: list[int] = []

    def answer(n: int) -> None:
        barrier.wait()
        done = request.reply(b"%d" % n) if n % 2 else request.fail(errno.ENOENT)
        if done:
            won.append(n)

    threads = [threading.Thread(target=answer, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert request.answered
    first = (8, 0, b"%d" % won[0]) if won[0] % 2 else (8, errno.ENOENT, b"")
    assert kernel.receive() == first
    assert kernel.finish() == []


def test_an_answer_may_come_before_the_handler_has_returned(connect: Connect) -> None:
    def do(request: Request) -> Any:
        answer = request.defer(5)
        worker = threading.Thread(target=request.reply, args=(b"early",))
        worker.start()
        worker.join()
        return answer

    kernel = connect(Answering(do))
    kernel.send(wire.READ, READ)
    assert kernel.finish() == [(2, 0, b"early")]


def test_a_handler_that_answers_and_returns_answers_once(connect: Connect) -> None:
    kernel = connect(Answering(lambda request: request.reply(b"a") and b"b"))
    kernel.send(wire.READ, READ)
    assert kernel.finish() == [(2, 0, b"a")]


def test_a_deadline_answers_for_a_worker_that_does_not(connect: Connect) -> None:
    held: list[Request] = []
    cancelled = threading.Event()

    def do(request: Request) -> Answer:
        held.append(request)
        if request.unique == 2:
            return request.defer(0.05, errno=errno.ETIMEDOUT, on_cancel=cancelled.set)
        return request.defer(60)

    kernel = connect(Answering(do)).start()
    kernel.send(wire.READ, READ, unique=4)
    kernel.send(wire.READ, READ, unique=2)
    assert kernel.receive() == (2, errno.ETIMEDOUT, b"")
    assert cancelled.wait(20)
    assert not held[1].reply(b"late")
    assert held[0].reply(b"in time")
    assert kernel.receive() == (4, 0, b"in time")
    assert kernel.session.statistics()["events"]["timeouts"] == 1
    assert kernel.finish() == []


def test_deadlines_hold_while_requests_keep_coming(connect: Connect) -> None:
    kernel = connect(Answering(lambda request: request.defer(0.1))).start()
    kernel.send(wire.READ, READ, unique=2)
    for n in range(4, 200_000, 2):
        kernel.send(wire.STATFS, unique=n)
        if kernel.receive()[0] == 2:
            return
    pytest.fail("the deadline passed without an answer")


def test_a_failing_cancellation_does_not_end_the_loop(connect: Connect) -> None:
    kernel = connect(
        Answering(lambda request: request.defer(0.01, on_cancel=lambda: _raise(ValueError())))
    ).start()
    kernel.send(wire.READ, READ)
    assert kernel.receive() == (2, errno.EIO, b"")
    assert kernel.ask(wire.STATFS, unique=4)[0] == 0


def test_stopping_leaves_open_requests_to_the_next_session(connect: Connect) -> None:
    ops = Holding()
    kernel = connect(ops).start()
    kernel.send(wire.READ, READ)
    assert kernel.ask(wire.STATFS, unique=4)[0] == 0
    kernel.session.stop()
    kernel.thread.join(5)
    assert not ops.held[0].answered
    kernel.session.close()
    assert not ops.held[0].reply(b"too late")


def test_run_says_why_it_ended(connect: Connect) -> None:
    stopped = connect(Operations())
    stopped.session.stop()
    assert stopped.session.run() is Ended.STOPPED
    gone = connect(Operations())
    gone.kernel.shutdown(1)
    assert gone.session.run() is Ended.UNMOUNTED


def test_whether_the_loop_goes_round(connect: Connect) -> None:
    held, go_on = threading.Event(), threading.Event()

    def wait(_: object) -> bytes:
        held.set()
        go_on.wait(10)
        return b""

    kernel = connect(Answering(wait)).start()
    answers: queue.Queue[str] = queue.Queue()
    kernel.session.ask(lambda: answers.put(threading.current_thread().name))
    assert kernel.thread is not None
    assert answers.get(timeout=10) == kernel.thread.name
    kernel.send(wire.READ, READ)
    assert held.wait(10)
    kernel.session.ask(lambda: answers.put("late"))
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.2)
    go_on.set()
    assert answers.get(timeout=10) == "late"
    # one that has ended hangs nowhere
    kernel.session.stop()
    kernel.thread.join(10)
    kernel.session.ask(lambda: answers.put("ended"))
    assert answers.get(timeout=0) == "ended"


# -- interrupts ----------------------------------------------------------------------
def test_an_interrupt_of_a_living_caller_changes_nothing(connect: Connect) -> None:
    ops = Holding()
    kernel = connect(ops).start()
    kernel.send(wire.READ, READ, unique=2, pid=os.getpid())
    kernel.send(wire.INTERRUPT, struct.pack("<Q", 2), unique=3)
    kernel.send(wire.INTERRUPT, struct.pack("<Q", 1000), unique=1001)
    assert kernel.ask(wire.STATFS, unique=4)[0] == 0
    assert ops.held[0].reply(b"data")
    assert kernel.receive() == (2, 0, b"data")
    assert kernel.finish() == []


def test_an_interrupt_of_a_caller_that_is_gone_ends_the_request(connect: Connect) -> None:
    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    cancelled = threading.Event()
    kernel = connect(Answering(lambda request: request.defer(on_cancel=cancelled.set))).start()
    kernel.send(wire.READ, READ, unique=2, pid=gone)
    kernel.send(wire.INTERRUPT, struct.pack("<Q", 2), unique=3)
    assert kernel.receive() == (2, errno.EINTR, b"")
    assert cancelled.wait(20)
    assert kernel.session.statistics()["events"]["killed"] == 1


# -- negotiation ------------------------------------------------------------------------
OFFERED = (1 << 43) - 1


def test_the_outcome_of_init_survives_being_written_down() -> None:
    outcome, payload = negotiate(InitIn(7, 99, 1 << 17, OFFERED), SessionOptions())
    assert outcome is not None
    assert outcome.can_resend
    assert outcome.minor == 45
    assert outcome.max_pages == 256
    assert not outcome.flags & (wire.POSIX_ACL | wire.PASSTHROUGH)
    assert len(payload) == 64
    assert Negotiated.from_json(outcome.to_json()) == outcome


def test_options_ask_for_more() -> None:
    options = SessionOptions(posix_acl=True, passthrough=True, allow_idmap=True)
    outcome, _ = negotiate(InitIn(7, 45, 1 << 17, OFFERED), options)
    assert outcome is not None
    wanted = wire.POSIX_ACL | wire.PASSTHROUGH | wire.ALLOW_IDMAP
    assert outcome.flags & wanted == wanted
    assert outcome.max_stack_depth == 1
    never, _ = negotiate(InitIn(7, 45, 1 << 17, OFFERED), SessionOptions(readdirplus="never"))
    assert never is not None
    assert not never.flags & wire.DO_READDIRPLUS


def test_an_old_kernel_gets_no_flags_it_does_not_know() -> None:
    old = (1 << 30) - 1
    outcome, payload = negotiate(InitIn(7, 31, 1 << 17, old), SessionOptions())
    assert outcome is not None
    assert outcome.minor == 31
    assert outcome.flags & ~old == 0
    assert not outcome.can_resend
    assert wire.INIT_OUT.unpack(payload)[10] == 0


def test_a_kernel_that_is_too_old_or_too_new() -> None:
    with pytest.raises(MountError, match=r"7\.20"):
        negotiate(InitIn(7, 20, 0, 0), SessionOptions())
    outcome, payload = negotiate(InitIn(8, 0, 0, 0), SessionOptions())
    assert outcome is None
    assert struct.unpack_from("<I", payload)[0] == 7


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"major": 7}'])
def test_a_damaged_record_of_the_negotiation_is_refused(text: str) -> None:
    with pytest.raises(StorageError):
        Negotiated.from_json(text)


def test_the_handshake_ends_in_time(connect: Connect) -> None:
    kernel = connect(Operations())
    with pytest.raises(MountError, match="did not start"):
        kernel.session.handshake(0.05)
    kernel.send(wire.INIT, struct.pack("<IIII", 7, 3, 0, 0))
    with pytest.raises(MountError, match=r"7\.3"):
        kernel.session.handshake(5)
    assert kernel.receive() == (2, errno.EPROTO, b"")


def test_the_handshake_answers_init(connect: Connect) -> None:
    kernel = connect(Operations())
    init = struct.pack("<IIIII44x", 7, 45, 1 << 17, OFFERED & 0xFFFFFFFF, OFFERED >> 32)
    kernel.send(wire.INIT, init)
    assert kernel.session.handshake(5).can_resend
    assert len(kernel.receive()[2]) == 64


def test_resend_is_the_first_message_of_a_successor(connect: Connect) -> None:
    outcome, _ = negotiate(InitIn(7, 45, 1 << 17, OFFERED), SessionOptions())
    kernel = connect(Operations(), outcome)
    assert kernel.session.resend()
    assert kernel.kernel.recv(100) == struct.pack("<IiQ", 16, 7, 0)
    assert not connect(Operations()).session.resend()
