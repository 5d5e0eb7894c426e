"""The request loop: reads requests from a FUSE descriptor, calls the file system, answers.

One thread runs the loop.  It reads until the kernel has nothing more (the descriptor is
non-blocking), then sleeps in poll(2) on the descriptor and an eventfd.  A handler that
cannot answer at once defers; any thread may answer then.  Who takes the request out of
``_open`` answers it, so exactly one answer is ever sent.

Requests stay with the kernel until they are answered.  A session that stops or dies
leaves them there, and its successor on the same descriptor (`Session` with the saved
``negotiated`` value) asks for them again with `Session.resend`.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import heapq
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from layerstore.errors import LayerstoreError, MountError

from . import wire
from .dispatch import table
from .journal import READ_BUFFER, Journal
from .negotiation import Negotiated, SessionOptions, negotiate
from .operations import DEFERRED, Answer, Deferred, FuseError, Operations
from .signals import is_dying

_LOG: Final = logging.getLogger("layerstore.fuse")

_BURST: Final = 256  # requests between two looks at time-outs and the stop flag
_LOOKS: Final = 20  # about 40 microseconds
_DENSE_SECONDS: Final = 0.0002  # a wait this short means that requests follow each other closely
_SIGNAL_POLL_SECONDS: Final = 0.1
_LOG_LINES: Final = 10  # lines about failed handlers in one period
_LOG_SECONDS: Final = 10.0
_MAX_ERRNO: Final = 511  # the kernel refuses larger ones
_GONE: Final = frozenset((errno.ENODEV, errno.ECONNABORTED, errno.EPERM, errno.EBADF))
_PASSING: Final = frozenset((errno.ENOENT, errno.EINTR, errno.EIO, errno.E2BIG, errno.ENOMEM))


class Ended(enum.Enum):
    """Why `Session.run` returned."""

    STOPPED = "stopped"  # by `Session.stop`; the mount is still there
    UNMOUNTED = "unmounted"


class _NoReply(enum.Enum):
    NO_REPLY = "no reply"


_NO_REPLY: Final = _NoReply.NO_REPLY
_Handler = Callable[["Request", int], "Answer | _NoReply"]


class Request:
    """One request: who asks (``uid``, ``gid``, thread ``pid``) for what (``opcode``, ``nodeid``).

    ``reply`` and ``fail`` may be called once, from any thread, after ``defer``; the first
    call wins, later ones return False and do nothing.
    """

    __slots__ = (
        "_on_cancel",
        "_session",
        "_timeout_errno",
        "gid",
        "nodeid",
        "opcode",
        "pid",
        "uid",
        "unique",
    )

    def __init__(self, session: Session, header: tuple[int, ...]) -> None:
        self._session = session
        _, self.opcode, self.unique, self.nodeid, self.uid, self.gid, self.pid, _, _ = header
        self._on_cancel: Callable[[], None] | None = None
        self._timeout_errno = errno.EIO

    def __repr__(self) -> str:
        name = wire.OPCODE_NAMES.get(self.opcode, str(self.opcode))
        return f"<{name} node {self.nodeid:#x} by thread {self.pid}>"

    def defer(
        self,
        timeout: float | None = None,
        *,
        errno: int = errno.EIO,
        on_cancel: Callable[[], None] | None = None,
    ) -> Deferred:
        """Answer later: ``return request.defer(...)``. To be called in the handler only.

        After ``timeout`` seconds the session itself answers with ``errno``.  It calls
        ``on_cancel`` on the loop thread when the answer is no longer wanted, because of
        the time-out or because the caller was killed.
        """
        self._on_cancel = on_cancel
        self._timeout_errno = errno
        if timeout is not None:
            self._session._set_deadline(self, timeout)
        return DEFERRED

    def reply(self, payload: Answer) -> bool:
        """Send the answer; whether this call was the one that answered."""
        return self._session._answer(self.unique, payload)

    def fail(self, errno: int) -> bool:
        """Answer with an error number; whether this call was the one that answered."""
        return self._session._answer(self.unique, errno)

    @property
    def answered(self) -> bool:
        """Whether the request has its answer."""
        return self.unique not in self._session._open


class Session:
    """Serves ``operations`` on the FUSE descriptor ``fd``.

    The descriptor is made non-blocking and stays the caller's: it must be open until `run`
    has returned and nobody answers deferred requests any more.
    """

    def __init__(
        self,
        fd: int,
        operations: Operations,
        *,
        options: SessionOptions | None = None,
        negotiated: Negotiated | None = None,
        journal: Journal | None = None,
    ) -> None:
        """``journal`` is for kernels that cannot resend."""
        self.fd = fd
        self.operations = operations
        self.options = options or SessionOptions()
        self.negotiated = negotiated
        os.set_blocking(fd, False)
        self._journal = journal
        self._view = memoryview(bytearray(READ_BUFFER)) if journal is None else journal.buffer
        self._open: dict[int, Request] = {} if journal is None else journal.open_requests()
        self._deadlines: list[tuple[float, int]] = []
        self._signalled: set[int] = set()
        self._next_signal_poll = 0.0
        self._stopping = False
        self._dense = False
        self._refused: MountError | None = None
        self._unmounted = False
        self._asked: deque[Callable[[], None]] = deque()
        self._ended = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._counts = [0] * wire.OPCODES
        self._errors: dict[int, int] = {}
        self._events = {"timeouts": 0, "killed": 0, "handler_errors": 0, "malformed": 0}
        self._log_start = 0.0
        self._log_lines = 0
        self._handlers: list[_Handler] = [*table(operations, self._view)]
        self._handlers[wire.FORGET] = self._forget
        self._handlers[wire.BATCH_FORGET] = self._batch_forget
        self._handlers[wire.INTERRUPT] = self._interrupt
        self._handlers[wire.INIT] = self._init
        self._handlers[wire.DESTROY] = self._destroy

    # -- life ------------------------------------------------------------------
    def handshake(self, timeout: float = 10.0) -> Negotiated:
        """Wait for the kernel's INIT, answer it and return the outcome.

        For a fresh mount, before `run`, where the outcome must be saved before the first
        request.  MountError if the kernel is too old or no INIT comes within ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while self.negotiated is None:
            if self._refused is not None:
                raise self._refused
            left = end - time.monotonic()
            if left <= 0 or self._unmounted:
                raise MountError("the kernel did not start the FUSE protocol")
            waiting = select.poll()
            waiting.register(self.fd, select.POLLIN)
            if waiting.poll(left * 1000):
                self._serve_available(1)
        return self.negotiated

    def resend(self) -> bool:
        """Have the kernel send all unanswered requests again.

        To be called once, after a take-over and before `run`.  False if the kernel cannot:
        callers that were waiting when the last server died then wait for ever.
        """
        if self.negotiated is None or not self.negotiated.can_resend:
            return False
        return self._notify(wire.resend_notification())

    def fail_lost(self) -> int:
        """Answer EIO to what the last server left open, where `resend` cannot; how many those were.

        To be called once, after a take-over and before `run`.  Without a journal it does nothing.
        """
        failed = 0
        for unique in () if self._journal is None else self._journal.left_open():
            with contextlib.suppress(OSError):  # ENOENT: it has its answer
                os.write(self.fd, wire.OUT_HEADER.pack(16, -errno.EIO, unique))
                failed += 1
        if self._journal is not None:
            self._journal.reset()
        return failed

    def run(self) -> Ended:
        """Serve until `stop` or the end of the mount."""
        serve = self._serve_available
        try:
            while not self._stopping and not self._unmounted:
                drained = serve(_BURST)
                wait_ms = self._housekeeping()
                if self._asked:
                    self._answer_asked()
                if not drained or self._stopping or self._unmounted:
                    continue
                self._wait(wait_ms)
        finally:
            self._ended = True
            self._answer_asked()
        return Ended.UNMOUNTED if self._unmounted else Ended.STOPPED

    def _wait(self, wait_ms: float | None) -> None:
        """Sleep until there is a request, a wake-up or a deadline.

        While requests come one upon another, look a few times before sleeping: waking
        this thread on another processor costs more than answering (measured: 2.7 times
        the requests per second, for less processor time in all).  Giving way each time
        lets a caller on the same processor run.
        """
        look = self._poll.poll
        ready: list[tuple[int, int]] = []
        if self._dense and wait_ms != 0:
            give_way = os.sched_yield
            for _ in range(_LOOKS):
                give_way()
                ready = look(0)
                if ready:
                    break
        if not ready:
            start = time.monotonic()
            ready = look(wait_ms)
            self._dense = time.monotonic() - start < _DENSE_SECONDS
        for fd, _ in ready:
            if fd == self._wake:
                os.eventfd_read(self._wake)

    def stop(self) -> None:
        """Make `run` return soon; from any thread. Open requests stay unanswered."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def ask(self, answer: Callable[[], None]) -> None:
        """Have `run` call ``answer`` in its next turn, or at once if it has returned.

        From any thread, before `close`.  Tells whether the loop goes round.
        """
        self._asked.append(answer)
        os.eventfd_write(self._wake, 1)
        if self._ended:
            self._answer_asked()

    def _answer_asked(self) -> None:
        while self._asked:
            try:
                answer = self._asked.popleft()
            except IndexError:  # another thread was faster
                return
            answer()

    def close(self) -> None:
        """Release what the session holds (not ``fd``), after `run`; late answers are dropped."""
        self._open.clear()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    # -- what the file system may ask of the kernel ------------------------------
    def invalidate_entry(self, parent: int, name: bytes) -> bool:
        """Make the kernel ask again for ``name``; False if it knew nothing of it.

        Never on the loop thread: the kernel takes the directory's lock, whose holder may
        be waiting for this loop.
        """
        return self._notify(wire.inval_entry_notification(parent, name))

    def invalidate_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> bool:
        """Make the kernel ask again for attributes and data; never on the loop thread."""
        return self._notify(wire.inval_inode_notification(nodeid, offset, length))

    def open_backing(self, fd: int) -> int:
        """Register ``fd`` as a backing file for passthrough and return its id.

        OSError as the ioctl gives it: EPERM outside the initial user namespace, ELOOP for
        a file on a stacked file system.
        """
        backing_id: int = fcntl.ioctl(self.fd, wire.DEV_IOC_BACKING_OPEN, wire.backing_map(fd))
        return backing_id

    def close_backing(self, backing_id: int) -> None:
        """Give a backing id back; files open with it keep it."""
        fcntl.ioctl(
            self.fd, wire.DEV_IOC_BACKING_CLOSE, bytearray(backing_id.to_bytes(4, "little"))
        )

    # -- statistics ----------------------------------------------------------------
    def statistics(self) -> dict[str, dict[str, int]]:
        """Counters since the start: ``requests`` by opcode, ``errors`` by errno, ``events``.

        ``events`` also says how many requests are open now.
        """
        names = wire.OPCODE_NAMES
        return {
            "requests": {
                names.get(code, str(code)): count
                for code, count in enumerate(self._counts)
                if count
            },
            "errors": {
                errno.errorcode.get(number, str(number)): count
                for number, count in sorted(self._errors.copy().items())
            },
            "events": {**self._events, "open": len(self._open)},
        }

    # -- the loop --------------------------------------------------------------------
    def _serve_available(self, limit: int) -> bool:
        """Handle up to ``limit`` requests; True if there is nothing more to read now."""
        fd, buffer, handlers, counts = self.fd, self._view, self._handlers, self._counts
        unpack, open_requests, readv = wire.IN_HEADER.unpack_from, self._open, os.readv
        answer_open = self._answer
        buffers = [buffer]
        for _ in range(limit):
            try:
                size = readv(fd, buffers)
            except BlockingIOError:
                return True
            except OSError as exc:
                if exc.errno in _PASSING:
                    continue
                if exc.errno in _GONE:
                    self._unmounted = True
                    return True
                raise MountError(f"reading FUSE requests failed: {exc.strerror}") from exc
            if size < wire.HEADER_BYTES:
                if size == 0:
                    self._unmounted = True
                    return True
                self._malformed(f"a request of {size} bytes")
                continue
            header = unpack(buffer)
            request = Request(self, header)
            length, opcode, unique = header[:3]
            open_requests[unique] = request
            try:
                if length != size:
                    raise wire.WireError(f"a request of {size} bytes that says it has {length}")
                if opcode >= wire.OPCODES:
                    raise FuseError(errno.ENOSYS)
                counts[opcode] += 1
                answer = handlers[opcode](request, size)
            except FuseError as exc:
                answer = exc.errno
            except wire.WireError as exc:
                self._malformed(str(exc))
                answer = errno.EINVAL
            except Exception as exc:
                answer = self._broken(request, exc)
            except BaseException:
                answer_open(unique, errno.EIO)
                raise
            if answer is DEFERRED or answer is _NO_REPLY:
                continue
            answer_open(unique, answer)
        return False

    def _answer(self, unique: int, answer: Any) -> bool:
        """Send ``answer`` if the request is still open; whether it was."""
        if self._open.pop(unique, None) is None:
            return False
        header = wire.OUT_HEADER
        fd = self.fd
        try:
            kind = type(answer)
            if kind is bytes:
                size = len(answer)
                if size < 4096:
                    os.write(fd, header.pack(16 + size, 0, unique) + answer)
                else:
                    os.writev(fd, (header.pack(16 + size, 0, unique), answer))
            elif kind is int:
                number = answer if 0 < answer <= _MAX_ERRNO else errno.EIO
                self._errors[number] = self._errors.get(number, 0) + 1
                os.write(fd, header.pack(16, -number, unique))
            else:
                self._send_buffers(unique, answer)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENODEV):
                self._log_failure("an answer was refused by the kernel: %s", exc.strerror)
        return True

    def _send_buffers(self, unique: int, answer: Any) -> None:
        if isinstance(answer, (bytearray, memoryview)):
            parts: list[Any] = [answer]
        elif isinstance(answer, Sequence) and not isinstance(answer, str):
            parts = list(answer)
        else:
            parts = []
        try:
            size = 16 + sum(memoryview(part).nbytes for part in parts)
            if not parts and answer not in ((), []):
                raise TypeError
        except TypeError:
            self._events["handler_errors"] += 1
            self._log_failure("a handler answered with a %s", type(answer).__name__)
            self._errors[errno.EIO] = self._errors.get(errno.EIO, 0) + 1
            os.write(self.fd, wire.OUT_HEADER.pack(16, -errno.EIO, unique))
            return
        os.writev(self.fd, [wire.OUT_HEADER.pack(size, 0, unique), *parts])

    def _notify(self, message: bytes) -> bool:
        try:
            os.write(self.fd, message)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL, errno.ENOSYS):
                self._log_failure("a notification was refused: %s", exc.strerror)
            return False
        return True

    # -- deadlines and signals ---------------------------------------------------------
    def _set_deadline(self, request: Request, timeout: float) -> None:
        if len(self._deadlines) > 1024 + 4 * len(self._open):
            self._deadlines = [item for item in self._deadlines if item[1] in self._open]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (time.monotonic() + timeout, request.unique))

    def _housekeeping(self) -> float | None:
        """Answer what is overdue or unwanted; milliseconds until this is due again."""
        deadlines, open_requests = self._deadlines, self._open
        if not deadlines and not self._signalled:
            return None
        now = time.monotonic()
        while deadlines and (deadlines[0][0] <= now or deadlines[0][1] not in open_requests):
            unique = heapq.heappop(deadlines)[1]
            request = open_requests.get(unique)
            if request is not None:
                self._cancel(request, request._timeout_errno, "timeouts")
        due = deadlines[0][0] if deadlines else None
        if self._signalled:
            if now >= self._next_signal_poll:
                self._next_signal_poll = now + _SIGNAL_POLL_SECONDS
                for unique in list(self._signalled):
                    self._check_signal(unique)
            if self._signalled:
                due = min(due or self._next_signal_poll, self._next_signal_poll)
        return None if due is None else max(0.0, (due - now) * 1000 + 1)

    def _check_signal(self, unique: int) -> None:
        request = self._open.get(unique)
        if request is None:
            self._signalled.discard(unique)
        elif is_dying(request.pid):
            self._signalled.discard(unique)
            self._cancel(request, errno.EINTR, "killed")

    def _cancel(self, request: Request, number: int, event: str) -> None:
        if not self._answer(request.unique, number):
            return
        self._events[event] += 1
        if event == "timeouts":
            self._log_failure("%r was not answered in time", request)
        if request._on_cancel is not None:
            try:
                request._on_cancel()
            except Exception:
                _LOG.exception("the cancellation of %r failed", request)

    # -- failures ------------------------------------------------------------------------
    def _broken(self, request: Request, exc: Exception) -> int:
        self._events["handler_errors"] += 1
        if isinstance(exc, LayerstoreError):
            self._log_failure("%r failed: %s", request, exc)
        else:
            self._log_failure("%r failed", request, exc_info=exc)
        return errno.EIO

    def _malformed(self, what: str) -> None:
        self._events["malformed"] += 1
        self._log_failure("malformed request: %s", what)

    def _log_failure(self, text: str, *args: object, exc_info: Exception | None = None) -> None:
        now = time.monotonic()
        if now - self._log_start >= _LOG_SECONDS:
            dropped = self._log_lines - _LOG_LINES
            if dropped > 0:
                _LOG.error("%d more failures like these were not logged", dropped)
            self._log_start, self._log_lines = now, 0
        self._log_lines += 1
        if self._log_lines <= _LOG_LINES:
            _LOG.error(text, *args, exc_info=exc_info)

    # -- what the session answers itself -------------------------------------------------
    def _forget(self, request: Request, size: int) -> _NoReply:
        del self._open[request.unique]
        self.operations.forget(request.nodeid, wire.parse_forget(self._view, size))
        return _NO_REPLY

    def _batch_forget(self, request: Request, size: int) -> _NoReply:
        del self._open[request.unique]
        for nodeid, lookups in wire.parse_batch_forget(self._view, size):
            self.operations.forget(nodeid, lookups)
        return _NO_REPLY

    def _interrupt(self, request: Request, size: int) -> _NoReply:
        del self._open[request.unique]
        unique = wire.parse_interrupt(self._view, size)
        # Requests are read in order: one that is not open has its answer already.
        if unique in self._open:
            self._signalled.add(unique)
            self._check_signal(unique)
        return _NO_REPLY

    def _init(self, request: Request, size: int) -> Answer:
        try:
            outcome, payload = negotiate(wire.parse_init(self._view, size), self.options)
        except MountError as exc:
            self._refused = exc
            _LOG.error("%s", exc)
            return errno.EPROTO
        if outcome is not None:
            self.negotiated = outcome
        return payload

    def _destroy(self, request: Request, size: int) -> Answer:
        self.operations.destroy()
        return b""
