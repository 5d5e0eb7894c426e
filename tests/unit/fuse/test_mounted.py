"""The loop behind a real mount, asked by processes of their own."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from layerstore.fuse import (
    FOREVER,
    Answer,
    Attr,
    Ended,
    Request,
    SessionOptions,
    open_reply,
    unmount,
    wire,
)

Serve = Callable[..., Any]


def test_a_tree_reads_as_it_is(serve: Serve, small_fs: Any) -> None:
    fs = small_fs(
        {
            "hello": b"hello, world\n",
            "link": "hello",
            "null": Attr(0, stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)),
            "whiteout": Attr(0, stat.S_IFCHR, rdev=0),
            "old": Attr(
                0,
                stat.S_IFREG | stat.S_ISUID | 0o755,
                size=1 << 40,
                blocks=8,
                mtime_ns=-1_500_000_000,
                uid=1000,
                gid=1001,
                nlink=3,
            ),
            "sub": {"x": b"1"},
        }
    )
    served = serve(fs)
    assert served.ask("print(sorted(os.listdir(root)))") == str(sorted(fs_names(fs)))
    assert served.ask("print(open(root + '/link').read(), end='')") == "hello, world"
    assert served.ask("print(os.readlink(root + '/link'))") == "hello"
    assert served.ask("print(os.path.exists(root + '/sub/none'))") == "False"
    devices = served.ask("print([os.lstat(f'{root}/{n}').st_rdev for n in ('null', 'whiteout')])")
    assert devices == str([os.makedev(1, 3), 0])
    said = served.ask(
        "s = os.stat(root + '/old')\n"
        "print(oct(s.st_mode), s.st_size, s.st_blocks, s.st_mtime_ns, s.st_uid, s.st_gid,"
        " s.st_nlink)"
    )
    assert said == f"0o104755 {1 << 40} 8 -1500000000 1000 1001 3"


def fs_names(fs: Any) -> list[str]:
    return [os.fsdecode(name) for name in fs.names[1]]


def test_a_large_file_is_read_in_large_pieces(serve: Serve, small_fs: Any) -> None:
    data = os.urandom(1 << 20) * 5 + b"end"
    served = serve(small_fs({"large": data}))
    code = "import hashlib; print(hashlib.sha256(open(root + '/large','rb').read()).hexdigest())"
    assert served.ask(code) == hashlib.sha256(data).hexdigest()
    tail = "fd = os.open(root + '/large', os.O_RDONLY); print(os.pread(fd, 99, args and 5242880))"
    assert served.ask(tail, "x") == "b'end'"


@pytest.mark.parametrize("mode", ["always", "auto", "never"])
def test_a_directory_of_many_names_is_complete(serve: Serve, small_fs: Any, mode: str) -> None:
    names = {f"{n:04d}-{'n' * (n % 200)}": b"" for n in range(3000)}
    served = serve(small_fs(names), SessionOptions(readdirplus=mode))
    code = (
        "names = [e.name for e in os.scandir(root) if e.stat().st_size == 0]\n"
        "print(len(names), len(set(names)))"
    )
    assert served.ask(code) == "3000 3000"
    plus = served.session.statistics()["requests"].get("READDIRPLUS", 0)
    assert (plus > 0) == (mode != "never")


def test_xattrs_follow_the_size_rules(serve: Serve, small_fs: Any) -> None:
    served = serve(small_fs())
    assert served.ask("print(os.getxattr(root + '/hello', 'user.colour'))") == "b'blue'"
    listed = served.ask("print(sorted(os.listxattr(root + '/hello')))")
    assert listed == "['trusted.overlay.opaque', 'user.colour']"
    code = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "path = (root + '/hello').encode()\n"
        "sizes = [libc.getxattr(path, b'user.colour', ctypes.create_string_buffer(9), n)"
        " for n in (0, 3, 4)]\n"
        "print(sizes, libc.getxattr(path, b'user.none', None, 0), ctypes.get_errno())"
    )
    assert served.ask(code) == f"[4, -1, 4] -1 {errno.ENODATA}"


def test_creating_and_removing_reach_the_file_system_as_signals(
    serve: Serve, small_fs: Any
) -> None:
    fs = small_fs()
    served = serve(fs)
    code = (
        "for call in (lambda: os.open(root + '/sub/use', os.O_RDWR | os.O_CREAT | os.O_TRUNC),\n"
        "             lambda: os.rmdir(root + '/sub')):\n"
        "    try: call()\n"
        "    except OSError as exc: print(exc.errno)\n"
    )
    assert served.ask(code).split() == [str(errno.ENOENT)] * 2
    served.ask(code)
    assert [item for item in fs.seen if item[0] in ("create", "rmdir")] == [
        ("create", b"use"),
        ("rmdir", b"sub"),
    ] * 2


def test_everything_that_writes_is_refused(serve: Serve, small_fs: Any) -> None:
    served = serve(small_fs())
    code = (
        "f = root + '/hello'\n"
        "for call in (lambda: os.mkdir(root + '/d'), lambda: os.unlink(f),\n"
        "             lambda: os.rename(f, f + '2'), lambda: os.chmod(f, 0o600),\n"
        "             lambda: os.symlink('a', f + 'l'), lambda: os.link(f, f + 'h'),\n"
        "             lambda: os.truncate(f, 0), lambda: os.setxattr(f, 'user.a', b'b'),\n"
        "             lambda: os.mkfifo(root + '/p'),\n"
        "             lambda: os.write(os.open(f, os.O_WRONLY), b'x')):\n"
        "    try: call(); print('done')\n"
        "    except OSError as exc: print(errno.errorcode[exc.errno])\n"
    )
    assert served.ask(code).split() == ["EROFS"] * 10


def test_statfs(serve: Serve, small_fs: Any) -> None:
    assert serve(small_fs()).ask("print(os.statvfs(root).f_namemax)") == "255"


@pytest.mark.parametrize("valid", [1 << 31, 1 << 40, FOREVER])
def test_the_kernel_takes_very_long_validities(serve: Serve, small_fs: Any, valid: int) -> None:
    fs = small_fs(valid=valid)
    served = serve(fs)
    code = "for _ in range(5): os.stat(root + '/hello'); os.path.exists(root + '/none')"
    served.ask(code)
    time.sleep(0.05)
    served.ask(code)
    lookups = [item for item in fs.seen if item[0] == "lookup"]
    assert sorted(lookups) == [("lookup", b"hello"), ("lookup", b"none")]


def test_the_kernel_asks_again_where_nothing_is_valid(serve: Serve, small_fs: Any) -> None:
    fs = small_fs(valid=0)
    served = serve(fs)
    served.ask("for _ in range(5): os.stat(root + '/hello'); os.path.exists(root + '/none')")
    assert len([item for item in fs.seen if item[0] == "lookup"]) == 10


def test_a_forgotten_entry_is_looked_up_again(serve: Serve, small_fs: Any) -> None:
    fs = small_fs()
    served = serve(fs)
    served.ask("os.path.exists(root + '/later')")
    fs.names[1][b"later"] = fs.names[1][b"hello"]
    assert served.ask("print(os.path.exists(root + '/later'))") == "False"
    assert served.session.invalidate_entry(1, b"later")
    assert served.ask("print(os.path.exists(root + '/later'))") == "True"
    assert served.session.invalidate_inode(fs.names[1][b"hello"])


def test_an_error_in_a_handler_is_eio_for_the_caller_alone(serve: Serve, small_fs: Any) -> None:
    fs = small_fs()
    served = serve(fs)
    del fs.data[fs.names[1][b"hello"]]
    code = (
        "try: open(root + '/hello').read()\n"
        "except OSError as exc: print(errno.errorcode[exc.errno])\n"
        "print(open(root + '/sub/x').read())"
    )
    assert served.ask(code).split() == ["EIO", "1"]


@pytest.mark.parametrize(
    "options", [SessionOptions(posix_acl=True), SessionOptions(allow_idmap=True)]
)
def test_the_kernel_agrees_to_the_options(
    serve: Serve, small_fs: Any, options: SessionOptions
) -> None:
    served = serve(small_fs(), options)
    assert served.ask("print(open(root + '/hello').read())") == "hello, world"


def test_answered_opens_are_released(serve: Serve, small_fs: Any) -> None:
    events = []

    def opened(request: Request, nodeid: int, flags: int) -> Answer:
        events.append(("open", flags & os.O_ACCMODE))
        return open_reply(5, wire.FOPEN_KEEP_CACHE | wire.FOPEN_NOFLUSH)

    def released(request: Request, nodeid: int, fh: int) -> Answer:
        events.append(("release", fh))
        return b""

    fs = small_fs()
    fs.open, fs.release = opened, released
    served = serve(fs)
    served.ask("open(root + '/hello').read()")
    deadline = time.monotonic() + 5
    while len(events) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert events == [("open", 0), ("release", 5)]


def test_a_backing_file_is_read_without_asking(
    serve: Serve, small_fs: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    backing = tmp_path_factory.mktemp("backing") / "data"
    backing.write_bytes(b"from the disk")
    reason: list[OSError] = []

    def opened(request: Request, nodeid: int, flags: int) -> Answer:
        try:
            with backing.open("rb") as file:
                backing_id = served.session.open_backing(file.fileno())
        except OSError as exc:
            reason.append(exc)
            return errno.EIO
        return open_reply(1, wire.FOPEN_PASSTHROUGH | wire.FOPEN_NOFLUSH, backing_id)

    fs = small_fs({"f": b"from the loop"})
    fs.open = opened
    served = serve(fs, SessionOptions(passthrough=True))
    if not served.session.negotiated.flags & wire.PASSTHROUGH:
        pytest.skip("this kernel has no passthrough")
    said = served.ask(
        "try: print(open(root + '/f').read())\nexcept OSError as exc: print(exc.strerror)"
    )
    if reason:
        pytest.skip(f"backing files are not permitted here: {reason[0]}")
    assert said == "from the disk"
    assert "READ" not in served.session.statistics()["requests"]


# -- requests that wait ---------------------------------------------------------------
BUFFERED = "fd = os.open(root + '/file', os.O_RDONLY)\nread = lambda: os.read(fd, 10)\n"
DIRECT = (
    "import mmap\n"
    "fd = os.open(root + '/file', os.O_RDONLY | os.O_DIRECT)\n"
    "page = mmap.mmap(-1, 4096)\n"
    "read = lambda: page[:os.readv(fd, [page])][:10]\n"
)
LOOKUP = "read = lambda: str(os.stat(root + '/slow').st_size).encode()\n"
WAYS = [(BUFFERED, "0123456789"), (DIRECT, "0123456789"), (LOOKUP, "1")]
WAY_NAMES = ["buffered", "direct", "lookup"]


def _answer(fs: Any, request: Request) -> bool:
    if request.opcode == wire.LOOKUP:
        return request.reply(wire.entry_reply(3, fs.attrs[3]))
    return request.reply(fs.data[request.nodeid])


@pytest.mark.parametrize(("how", "data"), WAYS, ids=WAY_NAMES)
def test_a_deferred_request_is_answered_later(
    serve: Serve, holding_fs: Any, how: str, data: str
) -> None:
    fs = holding_fs()
    served = serve(fs)
    client = served.client(how + "print(read().decode())")
    request = fs.wait()
    assert served.ask("print(os.path.isdir(root), os.path.exists(root + '/none'))") == "True False"
    assert client.poll() is None
    assert _answer(fs, request)
    assert not _answer(fs, request)
    assert client.communicate(timeout=10)[0].strip() == data


@pytest.mark.parametrize("how", [BUFFERED, DIRECT, LOOKUP], ids=["buffered", "direct", "lookup"])
def test_a_killed_caller_dies_at_once(
    serve: Serve, holding_fs: Any, dies: Callable[..., bool], how: str
) -> None:
    fs = holding_fs()
    served = serve(fs)
    client = served.client(how + "read()")
    request = fs.wait()
    time.sleep(0.1)
    assert dies(client, 1.0)
    if how != BUFFERED:  # read-ahead has nobody who waits interruptibly
        assert fs.cancelled.wait(20)
        assert not _answer(fs, request)


SIGNALS = (
    "import threading, time\n"
    "got = []\n"
    "signal.signal(signal.SIGALRM, lambda *_: got.append('alarm'))\n"
    "signal.signal(signal.SIGURG, lambda *_: got.append('urgent'))\n"
    "def disturb():\n"
    "    for _ in range(5):\n"
    "        time.sleep(0.05)\n"
    "        for number in (signal.SIGALRM, signal.SIGURG):\n"
    "            signal.pthread_kill(threading.main_thread().ident, number)\n"
    "    print('disturbed', flush=True)\n"
    "threading.Thread(target=disturb).start()\n"
)


@pytest.mark.parametrize(("how", "data"), WAYS, ids=WAY_NAMES)
def test_harmless_signals_do_not_break_a_read(
    serve: Serve, holding_fs: Any, how: str, data: str
) -> None:
    fs = holding_fs()
    served = serve(fs)
    client = served.client(SIGNALS + how + "print(read().decode(), sorted(set(got)))")
    request = fs.wait()
    assert client.stdout.readline().strip() == "disturbed"
    time.sleep(0.3)
    if how != BUFFERED:
        assert served.session.statistics()["requests"]["INTERRUPT"] == 1
    assert _answer(fs, request)
    assert len(fs.held) == 1, "the caller saw EINTR and asked again"
    assert client.communicate(timeout=10)[0].strip() == f"{data} ['alarm', 'urgent']"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT])
def test_a_caller_killed_after_a_harmless_signal_still_dies(
    serve: Serve, holding_fs: Any, number: signal.Signals
) -> None:
    fs = holding_fs()
    served = serve(fs)
    client = served.client(
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "signal.signal(signal.SIGURG, lambda *_: None)\n" + DIRECT + "read()"
    )
    fs.wait()
    client.send_signal(signal.SIGURG)
    time.sleep(0.3)
    assert not fs.cancelled.is_set()
    client.send_signal(number)
    client.wait(timeout=1.5)
    assert fs.cancelled.wait(20)


def test_a_deadline_ends_a_read_with_eio(serve: Serve, holding_fs: Any) -> None:
    fs = holding_fs(timeout=0.2)
    served = serve(fs)
    code = "try: read()\nexcept OSError as exc: print(errno.errorcode[exc.errno])"
    assert served.ask(DIRECT + code) == "EIO"
    assert fs.cancelled.is_set()


# -- ends -------------------------------------------------------------------------------
def test_the_loop_ends_with_the_mount(serve: Serve, small_fs: Any) -> None:
    served = serve(small_fs())
    served.ask("os.listdir(root)")
    unmount(served.mountpoint)
    served.thread.join(5)
    assert served.ended is Ended.UNMOUNTED


def test_a_successor_finishes_what_was_begun(
    serve: Serve, holding_fs: Any, small_fs: Any, take_over: Callable[..., Any]
) -> None:
    fs = holding_fs()
    served = serve(fs)
    if not served.session.negotiated.can_resend:
        pytest.skip("this kernel cannot resend")
    clients = [served.client(how + "print(read().decode())") for how in (BUFFERED, DIRECT, LOOKUP)]
    for _ in clients:
        fs.wait()
    second = take_over(served, small_fs({"file": fs.data[2], "slow": b"s"}))
    assert second.session.resend()
    queued = served.client("print(open(root + '/file').read(3))")
    time.sleep(0.1)
    assert all(client.poll() is None for client in (*clients, queued))
    second.start()
    said = [client.communicate(timeout=10)[0].strip() for client in (*clients, queued)]
    assert said == ["0123456789", "0123456789", "1", "012"]
    assert [item for item in second.session.operations.seen if item == ("lookup", b"slow")]


def test_a_caller_killed_between_two_servers_dies(
    serve: Serve, holding_fs: Any, take_over: Callable[..., Any]
) -> None:
    fs = holding_fs()
    served = serve(fs)
    client = served.client(DIRECT + "read()")
    fs.wait()
    later = holding_fs()
    second = take_over(served, later)
    client.kill()
    with pytest.raises(subprocess.TimeoutExpired):
        client.wait(timeout=0.2)  # nobody is there to answer
    assert second.session.resend()
    second.start()
    client.wait(timeout=2)
