"""The store's operations, called as the loop calls them, without a kernel."""

from __future__ import annotations

import base64
import errno
import stat
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lab import tars
from layerstore import limits
from layerstore.fuse import DEFERRED, layerstore_fs, wire
from layerstore.fuse.layerstore_fs import StoreFilesystem
from layerstore.provider import DialectL, Needs, Policy, names


class FakeRequest:
    """Stands for session.Request: remembers the one answer that was given."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.done = threading.Event()
        self.timeout: float | None = None

    def defer(self, timeout=None, *, errno=errno.EIO, on_cancel=None):
        self.timeout = timeout
        return DEFERRED

    def reply(self, payload) -> bool:
        self.answers.append(payload)
        self.done.set()
        return len(self.answers) == 1

    def fail(self, number) -> bool:
        return self.reply(number)


class Caller:
    """Calls operations by name and waits for deferred answers."""

    def __init__(self, filesystem: StoreFilesystem) -> None:
        self.filesystem = filesystem

    def __call__(self, operation: str, *arguments: Any) -> Any:
        request = FakeRequest()
        answer = getattr(self.filesystem, operation)(request, *arguments)
        if answer is DEFERRED:
            assert request.timeout is not None, "a deferred request without a bound"
            assert request.done.wait(30)
            (answer,) = request.answers
        return answer

    def entry(self, parent: int, name: bytes) -> tuple[int, wire.Attr | tuple[int, ...]]:
        answer = self("lookup", parent, name)
        assert isinstance(answer, bytes), errno.errorcode.get(answer, answer)
        fields = wire.ENTRY_OUT.unpack(answer)
        return fields[0], fields

    def node(self, *path: bytes) -> int:
        node = 1
        for name in path:
            node, _ = self.entry(node, name)
        return node


def element(reference: str) -> bytes:
    return base64.b64encode(reference.encode())


@pytest.fixture
def filesystem(asker) -> Iterator[StoreFilesystem]:
    filesystem = StoreFilesystem(asker.store)
    yield filesystem
    filesystem.close()


@pytest.fixture
def call(filesystem) -> Caller:
    return Caller(filesystem)


@pytest.fixture
def pushed(publisher, registry):
    """(reference element, digest element, toc element) of an image with one layer."""
    image = publisher.push(
        "app",
        "1",
        [
            [
                tars.directory(b"./", 0o755),
                tars.directory(b"etc", 0o750),
                tars.regular(
                    b"etc/passwd", b"root:x:0:0\n", 0o640, uid=3, gid=4, mtime_ns=7 * 10**9
                ),
                tars.symlink(b"etc/link", b"passwd"),
                tars.hard_link(b"etc/again", b"etc/passwd"),
                tars.whiteout(b"etc/gone"),
                tars.regular(b"tool", b"#!", 0o4755, xattrs={b"user.a": b"\x00\xff"}),
            ]
        ],
    )
    reference = f"{registry.host}/app:1"
    written = image.layers[0]
    return element(reference), written.digest.encode(), written.toc_digest.encode()


def test_root_and_reference_and_layer_directories_answer_without_a_registry(call, registry):
    before = len(registry.requests())
    reference, digest = element("unreachable.invalid/x:1"), b"sha256:" + b"a" * 64
    assert call.node(reference, digest) == call.node(reference, digest)
    assert len(registry.requests()) == before


@pytest.mark.parametrize("name", [b"pool", b".", b"x" * 200, b"sha256:abc", element("alpine")])
def test_names_that_no_client_asks_for_do_not_exist(call, name):
    assert call("lookup", 1, name) == errno.ENOENT


def test_only_the_protocols_names_exist_in_a_layer_directory(call, pushed):
    reference, digest, _ = pushed
    layer = call.node(reference, digest)
    for name in (b"use", b"Diff", b"x"):
        assert call("lookup", layer, name) == errno.ENOENT
    for name in (b"diff", b"info", b"blob"):
        call.entry(layer, name)


@pytest.mark.parametrize("dialect", [1, 2])
def test_the_tree_of_a_layer(call, pushed, dialect):
    diff = call.node(pushed[0], pushed[dialect], b"diff")
    etc = call.node(pushed[0], pushed[dialect], b"diff", b"etc")
    passwd, fields = call.entry(etc, b"passwd")
    attr = fields[6:]
    size, mtime, mode, nlink, uid, gid = attr[1], attr[4], attr[9], attr[10], attr[11], attr[12]
    assert (size, mtime, mode, nlink, uid, gid) == (11, 7, stat.S_IFREG | 0o640, 2, 3, 4)
    assert call.entry(etc, b"again")[0] == passwd
    assert call("readlink", call.entry(etc, b"link")[0]) == b"passwd"
    gone = call.entry(etc, b"gone")[1][6:]
    assert stat.S_ISCHR(gone[9])
    assert gone[13] == 0  # device 0:0
    tool = call.entry(diff, b"tool")[0]
    assert call("getxattr", tool, b"user.a", 100) == b"\x00\xff"
    assert call("getxattr", tool, b"user.a", 1) == errno.ERANGE
    assert call("getxattr", tool, b"user.b", 100) == errno.ENODATA
    assert call("listxattr", tool, 100) == b"user.a\0"
    assert call("read", passwd, 5, 100) == b"x:0:0\n"


@pytest.mark.parametrize("initial", [True, False])
def test_names_that_cannot_be_read_in_a_user_namespace_are_not_listed_there(
    asker, publisher, registry, monkeypatch, initial
):
    """Overlay copies every listed attribute of a directory up, and gets ENODATA for trusted ones."""
    image = publisher.push(
        "opaque", "1", [[tars.directory(b"d"), tars.regular(b"d/.wh..wh..opq", b"")]]
    )
    monkeypatch.setattr(layerstore_fs, "_in_initial_user_namespace", lambda: initial)
    filesystem = StoreFilesystem(asker.store)
    call = Caller(filesystem)
    try:
        name = image.layers[0].digest.encode()
        node = call.node(element(f"{registry.host}/opaque:1"), name, b"diff", b"d")
        listed = call("listxattr", node, 1000).split(b"\0")
    finally:
        filesystem.close()
    assert b"user.overlay.opaque" in listed
    assert (b"trusted.overlay.opaque" in listed) == initial


def test_missing_names_in_a_layer_are_cached_for_ever(call, pushed):
    diff = call.node(pushed[0], pushed[1], b"diff")
    node, fields = call.entry(diff, b"nothing")
    assert node == 0
    assert fields[2] == wire.FOREVER


def test_known_things_are_cached_for_ever_and_unknown_references_not(call, pushed):
    _, unknown = call.entry(1, pushed[0])
    assert unknown[2] == 0
    diff = call.node(pushed[0], pushed[1], b"diff")
    assert call.entry(diff, b"etc")[1][2] == wire.FOREVER
    _, known = call.entry(1, pushed[0])
    assert 0 < known[2] <= limits.CONTROL_VALID_SECONDS


def test_names_that_a_policy_may_take_back_are_not_kept_by_the_kernel(call, pushed, asker):
    reference, digest, toc = pushed
    for name, most in ((toc, wire.FOREVER), (digest, 1)):
        layer = call.node(reference, name)
        for child in (b"diff", b"info", b"blob"):
            _, fields = call.entry(layer, child)
            assert fields[2] == most
            assert fields[3] == wire.FOREVER  # what it stands for does not change


def test_a_layer_that_the_policy_refuses_is_gone_and_stays_for_those_who_use_it(
    call, pushed, asker, filesystem
):
    reference, digest, toc = pushed
    node = call.node(reference, digest, b"diff")
    call("create", call.node(reference, digest), b"use", 0, 0)
    asker.options = {
        "background": False,
        "policy": Policy(dialect_l=DialectL.OFF),
        "needs": lambda: Needs(known=True),
    }
    asker.restart()
    today = StoreFilesystem(asker.store)
    try:
        call = Caller(today)
        layer = call.node(reference, digest)
        found, fields = call.entry(layer, b"diff")
        assert found == node
        assert fields[2] == 0  # the next lookup may be that of somebody else
        assert call("rmdir", call.node(reference), digest) == errno.ENOENT
        for child in (b"diff", b"info", b"blob"):
            assert call("lookup", layer, child) == errno.ENOENT
        # what is open goes on
        assert call.node(reference, toc, b"diff", b"etc")
        assert call.entry(node, b"tool")[0]
    finally:
        today.close()


def test_directories_differ_between_views_and_files_do_not(call, pushed):
    reference, digest, toc = pushed
    one, two = (call.node(reference, name, b"diff", b"etc") for name in (digest, toc))
    assert one != two
    assert call.entry(one, b"passwd")[0] == call.entry(two, b"passwd")[0]


def test_use_and_release_are_counted_and_answered_with_enoent(call, pushed, asker):
    reference, digest, _ = pushed
    directory, layer = call.node(reference), call.node(reference, digest)
    assert call("create", layer, b"use", 0, 0o666) == errno.ENOENT
    assert asker.store.status()["layers"] == []  # a use before the layer is known counts nothing
    call.entry(layer, b"diff")
    for _ in range(2):
        assert call("create", layer, b"use", 0, 0o666) == errno.ENOENT
    assert call("rmdir", directory, digest) == errno.ENOENT
    assert asker.store.status()["layers"][0]["uses"] == 1
    assert call("rmdir", directory, b"sha256:" + b"0" * 64) == errno.ENOENT


def test_everything_else_that_writes_is_refused(call, pushed):
    diff = call.node(pushed[0], pushed[1], b"diff")
    assert call("create", diff, b"use", 0, 0o666) == errno.EROFS
    assert call("create", 1, b"use", 0, 0o666) == errno.EROFS
    assert call("rmdir", diff, b"etc") == errno.EROFS
    assert call("rmdir", 1, b"x") == errno.EROFS
    assert call("unlink", diff, b"tool") == errno.EROFS


def test_info_and_blob(call, pushed, registry):
    layer = call.node(pushed[0], pushed[1])
    info, fields = call.entry(layer, b"info")
    content = call("read", info, 0, 65536)
    assert fields[7] == len(content)
    assert call("read", info, 3, 5) == content[3:8]
    blob, fields = call.entry(layer, b"blob")
    original = registry.blobs[pushed[1].decode()]
    assert fields[7] == len(original)
    assert bytes(call("read", blob, 0, 1 << 20)) == original


def records(data: bytes, *, plus: bool) -> list[tuple[bytes, int, int]]:
    """(name, cookie, node) of the entries in a directory answer."""
    found, position = [], 0
    while position < len(data):
        node = struct.unpack_from("<Q", data, position)[0] if plus else 0
        start = position + (wire.ENTRY_OUT.size if plus else 0)
        ino, cookie, length, _ = wire.DIRENT.unpack_from(data, start)
        name = data[start + 24 : start + 24 + length]
        found.append((name, cookie, node if plus else ino))
        position = start + (24 + length + 7) // 8 * 8
    return found


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("size", [400, 32768])
def test_a_directory_is_listed_completely_whatever_the_buffer(
    call, publisher, registry, plus, size
):
    wanted = {f"file-{number:03}" for number in range(300)}
    image = publisher.push("many", "1", [dict.fromkeys(wanted, b"")])
    diff = call.node(element(f"{registry.host}/many:1"), image.layers[0].digest.encode(), b"diff")
    operation = "readdirplus" if plus else "readdir"
    seen: list[bytes] = []
    offset = 0
    while data := bytes(call(operation, diff, offset, size)):
        part = records(data, plus=plus)
        offset = part[-1][1]
        seen += [name for name, _, _ in part]
    assert seen[:2] == [b".", b".."]
    assert {name.decode() for name in seen[2:]} == wanted
    assert len(seen) == len(wanted) + 2


def test_known_images_can_be_listed(call, pushed):
    reference, digest, _ = pushed
    call.node(reference, digest, b"diff")

    def names_of(node: int) -> list[bytes]:
        return [r[0] for r in records(bytes(call("readdir", node, 0, 4096)), plus=False)]

    assert names_of(1) == [b".", b"..", reference]
    assert names_of(call.node(reference)) == [b".", b"..", digest]
    assert names_of(call.node(reference, digest)) == [b".", b"..", b"diff", b"info", b"blob"]


def test_nodes_are_the_same_after_a_restart(call, pushed, asker):
    path = (pushed[0], pushed[1], b"diff", b"etc", b"passwd")
    before = call.node(*path)
    blob = call.node(pushed[0], pushed[1], b"blob")
    asker.restart()
    again = Caller(StoreFilesystem(asker.store))
    # the kernel goes on with the nodes that it has: no lookup comes first
    assert again("read", before, 0, 4) == b"root"
    assert wire.ATTR_OUT.unpack(again("getattr", blob))[4] > 0
    assert again.node(*path) == before
    again.filesystem.close()


def test_forgotten_names_are_asked_for_again(call, monkeypatch):
    monkeypatch.setattr(limits, "TRANSIENT_NAMES", 4)
    first = call.node(element("unreachable.invalid/first:1"))
    for number in range(10):
        call.node(element(f"unreachable.invalid/x{number}:1"))
    # ESTALE makes the kernel walk the path from the root once more
    assert call("lookup", first, b"sha256:" + b"a" * 64) == errno.ESTALE


def test_a_flood_of_unknown_names_leaves_a_bounded_memory(call, filesystem, monkeypatch):
    monkeypatch.setattr(limits, "TRANSIENT_NAMES", 100)
    for number in range(1000):
        call.node(element(f"unreachable.invalid/x{number}:1"))
    assert len(filesystem._transient) <= 100


def test_an_unresolvable_layer_is_enoent(call, registry):
    layer = call.node(element(f"{registry.host}/none:1"), b"sha256:" + b"a" * 64)
    for name in (b"diff", b"info", b"blob"):
        assert call("lookup", layer, name) == errno.ENOENT


def test_a_layer_asked_for_by_sha512_is_enoent_for_a_reason(call, registry, asker, pushed):
    reference, _, _ = pushed
    name = b"sha512:" + b"a" * 128
    assert call("lookup", call.node(reference, name), b"diff") == errno.ENOENT
    assert call("lookup", call.node(name), b"diff") == errno.ENOENT
    assert asker.store.status()["lookups"] == {"unsupported-format": 2}


def test_a_failed_read_is_eio_with_one_line_naming_the_file(
    call, filesystem, publisher, registry, caplog
):
    image = publisher.push("app", "1", [{"data/bad": bytes(range(256)) * 800}])
    digest = image.layers[0].digest
    noise = bytearray(image.blobs[0])
    diff = call.node(element(f"{registry.host}/app:1"), digest.encode(), b"diff")
    layer = filesystem._layers.get(names.layer_of(diff)[0])
    assert layer is not None
    bad = call.node(element(f"{registry.host}/app:1"), digest.encode(), b"diff", b"data", b"bad")
    layer.content._objects.discard(layer.index.content(names.layer_of(bad)[1]).key)
    for unit in range(layer.content._blob.units):
        layer.content._blob.discard(unit)
    noise[60:200] = bytes(140)
    registry.blobs[digest] = bytes(noise)
    start = time.monotonic()
    assert call("read", bad, 0, 4096) == errno.EIO
    assert call("read", bad, 4096, 4096) == errno.EIO
    assert time.monotonic() - start < 10
    lines = [r.getMessage() for r in caplog.records if "event=read-failed" in r.getMessage()]
    assert len(lines) == 1
    assert "file=data/bad" in lines[0]
    assert digest in lines[0]
    assert filesystem.read_errors == 2
