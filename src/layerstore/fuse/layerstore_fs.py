"""The store as a file system: requests of the kernel to questions to the provider.

No policy lives here.  The loop thread answers what is in memory: names of known
layers, attributes, directories, cached file contents.  Everything that may wait
is deferred to a worker, to the resolver or to the fetch scheduler.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidDigest, InvalidReference, LimitExceeded
from layerstore.fuse import wire
from layerstore.fuse.deferred import DeferredReader
from layerstore.fuse.operations import Answer, Operations, xattr_answer, xattr_list_answer
from layerstore.fuse.session import Request, Session
from layerstore.image import Digest
from layerstore.provider import Layer, Refusal, Store, View, names
from layerstore.provider.names import Control

_CHILDREN: Final = (b"diff", b"info", b"blob")
_KNOWN_VALID: Final = limits.CONTROL_VALID_SECONDS
_DOTS: Final = 2  # cookies 1 and 2 are "." and ".."


class StoreFilesystem(Operations):
    """File system operations over a `Store`."""

    def __init__(self, store: Store, *, released: Callable[[], None] | None = None) -> None:
        """``released`` is told, from the loop, whenever a client lets go of a layer."""
        self._store = store
        self._released = released or _nothing
        self._layers = store.layers
        self._reader = DeferredReader(store.layers)
        self._with_layer = self._reader.with_layer
        self._transient: OrderedDict[int, tuple[str, str]] = OrderedDict()
        self._started_ns = time.time_ns()
        self._uid = os.geteuid()
        self._gid = os.getegid()
        self._trusted = _in_initial_user_namespace()

    def close(self) -> None:
        """End idle workers."""
        self._reader.close()

    @property
    def read_errors(self) -> int:
        """How many reads failed."""
        return self._reader.errors

    def forget_layer(self, session: Session, slot: int) -> None:
        """Have the kernel forget what it keeps of a layer's contents.  Not for the loop thread:

        the kernel waits for reads of these pages that are under way.
        """
        index = self._layers.index_of(slot)
        views = [view for view in self._store.views() if view.slot == slot]
        for entry in range(index.entries):
            if stat.S_ISDIR(index.mode(entry)):
                for view in views:
                    session.invalidate_inode(names.layer_node(slot, entry, view.number))
            else:
                session.invalidate_inode(names.layer_node(slot, entry))

    # -- names -----------------------------------------------------------------------

    def lookup(self, request: Request, parent: int, name: bytes) -> Answer:
        if parent == wire.ROOT_ID:
            return self._lookup_root(name)
        if not names.is_control(parent):
            return self._lookup_entry(request, parent, name)
        kind, key = names.control_of(parent)
        if kind is Control.REFERENCE:
            reference = self._reference(key)
            if reference is None:
                return errno.ESTALE
            return self._lookup_layer(reference, name)
        if kind is Control.LAYER and name in _CHILDREN:
            return self._lookup_child(request, key, name)
        return errno.ENOENT if kind is Control.LAYER else errno.ENOTDIR

    def _lookup_root(self, name: bytes) -> Answer:
        if name.startswith((b"sha256:", b"sha512:")):
            return self._lookup_layer("", name)
        try:
            reference = names.reference_of(name)
        except (InvalidReference, InvalidDigest, LimitExceeded):
            return errno.ENOENT
        key = names.name_hash(reference)
        known = bool(self._store.views_of(key))
        if not known:
            self._remember(key, reference, "")
        return self._control_entry(Control.REFERENCE, key, known)

    def _lookup_layer(self, reference: str, name: bytes) -> Answer:
        try:
            digest = names.digest_of(name)
        except InvalidDigest:
            return errno.ENOENT
        key = names.name_hash(reference, digest)
        known = self._store.view(key) is not None
        if not known:
            self._remember(key, reference, digest)
        return self._control_entry(Control.LAYER, key, known)

    def _lookup_child(self, request: Request, key: int, name: bytes) -> Answer:
        view = self._store.view(key)
        if view is not None and self._store.quarantined(view):
            self._store.refuse_quarantined(view)
            return errno.EIO
        if view is not None and self._store.allowance.stands(view):
            self._store.found(view)
            return self._child_entry(request, view, name)
        named = self._transient.get(key) if view is None else (view.reference, view.name)
        if named is None:
            return errno.ESTALE
        deferred = request.defer(limits.RESOLVE_ANSWER_SECONDS, errno=errno.ENOENT)

        def answer(result: View | Refusal) -> None:
            if isinstance(result, Refusal):
                request.fail(errno.ENOENT)
                return
            reply = self._child_entry(request, result, name)
            if reply is not deferred:
                request.reply(reply)

        self._store.resolve(named[0], Digest(named[1]), answer)
        return deferred

    def _child_entry(self, request: Request, view: View, name: bytes) -> Answer:
        seconds = self._store.allowance.name_seconds(view)
        valid = wire.FOREVER if seconds is None else seconds
        if name == b"diff":
            node = names.layer_node(view.slot, 0, view.number)
            return self._with_layer(
                request,
                view.slot,
                lambda layer: wire.entry_reply(node, self._entry_attr(layer, node, 0), valid),
            )
        kind = Control.INFO if name == b"info" else Control.BLOB
        node = names.control_node(kind, view.key)
        return wire.entry_reply(node, self._view_attr(node, kind, view), valid)

    def _lookup_entry(self, request: Request, parent: int, name: bytes) -> Answer:
        slot, directory, view = names.layer_of(parent)
        layer = self._layers.get(slot)
        if layer is None:
            return self._with_layer(
                request, slot, lambda _: self._lookup_entry(request, parent, name)
            )
        index = layer.index
        entry = index.lookup(directory, name)
        if entry is None:
            return wire.negative_entry()
        node = self._node(layer, slot, view, entry)
        return wire.entry_reply(node, self._entry_attr(layer, node, entry))

    @staticmethod
    def _node(layer: Layer, slot: int, view: int, entry: int) -> int:
        is_directory = stat.S_ISDIR(layer.index.inode(entry).mode)
        return names.layer_node(slot, entry, view if is_directory else 0)

    def _reference(self, key: int) -> str | None:
        views = self._store.views_of(key)
        if views:
            return views[0].reference
        named = self._transient.get(key)
        return None if named is None else named[0]

    def _remember(self, key: int, reference: str, name: str) -> None:
        """Keep the text behind a hash for the lookups that follow; forgotten ones are asked anew."""
        self._transient[key] = (reference, name)
        self._transient.move_to_end(key)
        if len(self._transient) > limits.TRANSIENT_NAMES:
            self._transient.popitem(last=False)

    # -- attributes --------------------------------------------------------------------

    def getattr(self, request: Request, nodeid: int) -> Answer:
        if nodeid == wire.ROOT_ID:
            return wire.attr_reply(self._directory_attr(nodeid, 0o700))
        if not names.is_control(nodeid):
            slot, entry, _ = names.layer_of(nodeid)
            return self._with_layer(
                request,
                slot,
                lambda layer: wire.attr_reply(self._entry_attr(layer, nodeid, entry)),
            )
        kind, key = names.control_of(nodeid)
        if kind in (Control.REFERENCE, Control.LAYER):
            return wire.attr_reply(self._directory_attr(nodeid, 0o755), _KNOWN_VALID)
        view = self._store.view(key)
        if view is None:
            return errno.ESTALE
        return wire.attr_reply(self._view_attr(nodeid, kind, view))

    def _control_entry(self, kind: Control, key: int, known: bool) -> bytes:
        node = names.control_node(kind, key)
        valid = _KNOWN_VALID if known else 0
        return wire.entry_reply(node, self._directory_attr(node, 0o755), valid, valid)

    def _directory_attr(self, node: int, permissions: int) -> wire.Attr:
        return self._attr(node, stat.S_IFDIR | permissions, 2, 0, self._started_ns)

    def _view_attr(self, node: int, kind: Control, view: View) -> wire.Attr:
        size = len(view.info) if kind is Control.INFO else self._store.blob_size(view)
        return self._attr(node, stat.S_IFREG | 0o444, 1, size, int(view.created * 1e9))

    def _attr(self, node: int, mode: int, nlink: int, size: int, time_ns: int) -> wire.Attr:
        return wire.Attr(
            ino=node,
            size=size,
            blocks=(size + 511) // 512,
            atime_ns=time_ns,
            mtime_ns=time_ns,
            ctime_ns=time_ns,
            mode=mode,
            nlink=nlink,
            uid=self._uid,
            gid=self._gid,
        )

    @staticmethod
    def _entry_attr(layer: Layer, node: int, entry: int) -> wire.Attr:
        inode = layer.index.inode(entry)
        return wire.Attr(
            ino=node,
            size=inode.size,
            blocks=(inode.size + 4095) // 4096 * 8,
            atime_ns=inode.mtime_ns,
            mtime_ns=inode.mtime_ns,
            ctime_ns=inode.mtime_ns,
            mode=inode.mode,
            nlink=inode.nlink,
            uid=inode.uid,
            gid=inode.gid,
            rdev=wire.encode_dev(inode.major, inode.minor),
        )

    def getxattr(self, request: Request, nodeid: int, name: bytes, size: int) -> Answer:
        if nodeid == wire.ROOT_ID or names.is_control(nodeid):
            return errno.ENODATA
        slot, entry, _ = names.layer_of(nodeid)
        layer = self._layers.get(slot)
        if layer is None:
            return self._with_layer(
                request, slot, lambda _: self.getxattr(request, nodeid, name, size)
            )
        if not layer.index.inode(entry).has_xattrs:
            return errno.ENODATA
        value = layer.index.xattr(entry, name)
        return errno.ENODATA if value is None else xattr_answer(value, size)

    def listxattr(self, request: Request, nodeid: int, size: int) -> Answer:
        if nodeid == wire.ROOT_ID or names.is_control(nodeid):
            return xattr_list_answer((), size)
        slot, entry, _ = names.layer_of(nodeid)
        return self._with_layer(
            request,
            slot,
            lambda layer: xattr_list_answer(self._listed(layer, entry), size),
        )

    def _listed(self, layer: Layer, entry: int) -> Iterator[bytes]:
        """Names that can be read: trusted ones only in the initial user namespace (xattr(7))."""
        for name, _ in layer.index.xattrs(entry):
            if self._trusted or not name.startswith(b"trusted."):
                yield name

    def readlink(self, request: Request, nodeid: int) -> Answer:
        if nodeid == wire.ROOT_ID or names.is_control(nodeid):
            return errno.EINVAL
        slot, entry, _ = names.layer_of(nodeid)
        return self._with_layer(request, slot, lambda layer: layer.index.symlink(entry))

    # -- directories -------------------------------------------------------------------

    def readdir(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        return self._list(request, nodeid, offset, size, plus=False)

    def readdirplus(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        return self._list(request, nodeid, offset, size, plus=True)

    def _list(self, request: Request, nodeid: int, offset: int, size: int, *, plus: bool) -> Answer:
        if nodeid == wire.ROOT_ID or names.is_control(nodeid):
            records = self._control_records(nodeid, offset, plus=plus)
            return errno.ENOTDIR if records is None else wire.fill(records, size)
        slot, entry, view = names.layer_of(nodeid)
        return self._with_layer(
            request,
            slot,
            lambda layer: wire.fill(
                self._entry_records(layer, nodeid, (slot, entry, view), offset, size, plus=plus),
                size,
            ),
        )

    def _entry_records(
        self,
        layer: Layer,
        nodeid: int,
        place: tuple[int, int, int],
        offset: int,
        size: int,
        *,
        plus: bool,
    ) -> Iterator[bytes]:
        slot, directory, view = place
        yield from self._dots(nodeid, offset, plus=plus)
        start = max(0, offset - _DOTS)
        most = size // 24 + 1
        for cookie, (name, entry, mode) in enumerate(
            layer.index.children(directory, start, start + most), start + _DOTS + 1
        ):
            node = names.layer_node(slot, entry, view if stat.S_ISDIR(mode) else 0)
            if plus:
                reply = wire.entry_reply(node, self._entry_attr(layer, node, entry))
                yield wire.pack_direntplus(reply, node, cookie, stat.S_IFMT(mode) >> 12, name)
            else:
                yield wire.pack_dirent(node, cookie, stat.S_IFMT(mode) >> 12, name)

    @staticmethod
    def _dots(nodeid: int, offset: int, *, plus: bool) -> Iterator[bytes]:
        nothing = bytes(wire.ENTRY_OUT.size)  # node 0: the kernel counts no lookup
        for cookie, name in ((1, b"."), (2, b"..")):
            if offset < cookie:
                if plus:
                    yield wire.pack_direntplus(nothing, nodeid, cookie, stat.S_IFDIR, name)
                else:
                    yield wire.pack_dirent(nodeid, cookie, stat.S_IFDIR, name)

    def _control_records(self, nodeid: int, offset: int, *, plus: bool) -> Iterator[bytes] | None:
        """What is known below the root, a reference or a layer directory."""
        children: list[tuple[bytes, int, wire.Attr]] = []
        if nodeid == wire.ROOT_ID:
            for reference in self._store.references():
                key = names.name_hash(reference)
                children.append(
                    self._directory(Control.REFERENCE, key, names.element_of(reference))
                )
            views = self._store.views_of(names.name_hash(""))
        else:
            kind, key = names.control_of(nodeid)
            if kind in (Control.INFO, Control.BLOB):
                return None
            views = self._store.views_of(key) if kind is Control.REFERENCE else ()
            view = self._store.view(key) if kind is Control.LAYER else None
            if view is not None:
                children += self._view_children(view)
        children += [self._directory(Control.LAYER, view.key, view.name.encode()) for view in views]
        return self._records(nodeid, children, offset, plus=plus)

    def _view_children(self, view: View) -> Iterator[tuple[bytes, int, wire.Attr]]:
        diff = names.layer_node(view.slot, 0, view.number)
        layer = self._layers.get(view.slot)
        if layer is not None:
            yield b"diff", diff, self._entry_attr(layer, diff, 0)
        for kind, name in ((Control.INFO, b"info"), (Control.BLOB, b"blob")):
            node = names.control_node(kind, view.key)
            yield name, node, self._view_attr(node, kind, view)

    def _directory(self, kind: Control, key: int, name: bytes) -> tuple[bytes, int, wire.Attr]:
        node = names.control_node(kind, key)
        return name, node, self._directory_attr(node, 0o755)

    def _records(
        self,
        nodeid: int,
        children: list[tuple[bytes, int, wire.Attr]],
        offset: int,
        *,
        plus: bool,
    ) -> Iterator[bytes]:
        yield from self._dots(nodeid, offset, plus=plus)
        for cookie, (name, node, attr) in enumerate(children, _DOTS + 1):
            if cookie <= offset:
                continue
            kind = stat.S_IFMT(attr.mode) >> 12
            if plus:
                reply = wire.entry_reply(node, attr, 0, 0)
                yield wire.pack_direntplus(reply, node, cookie, kind, name)
            else:
                yield wire.pack_dirent(node, cookie, kind, name)

    # -- contents -----------------------------------------------------------------------

    def read(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        if not names.is_control(nodeid):
            slot, entry, _ = names.layer_of(nodeid)
            return self._reader.read_file(request, slot, entry, offset, size)
        kind, key = names.control_of(nodeid)
        view = self._store.view(key)
        if view is None:
            return errno.ESTALE
        if kind is Control.INFO:
            return view.info[offset : offset + size]
        if kind is Control.BLOB:
            return self._reader.read_blob(request, view, offset, size)
        return errno.EISDIR

    # -- signals of the protocol ----------------------------------------------------------

    def create(self, request: Request, parent: int, name: bytes, flags: int, mode: int) -> Answer:
        """Creating ``use`` says that a client uses the layer; the answer is always ENOENT."""
        if names.is_control(parent):
            kind, key = names.control_of(parent)
            if kind is Control.LAYER and name == b"use":
                view = self._store.view(key)
                if view is not None:
                    self._store.use(view)
                return errno.ENOENT
        return errno.EROFS

    def rmdir(self, request: Request, parent: int, name: bytes) -> Answer:
        """Removing a layer's directory says that a client lets go of it: always ENOENT."""
        reference: str | None = None
        if parent == wire.ROOT_ID:
            reference = ""
        elif names.is_control(parent):
            kind, key = names.control_of(parent)
            if kind is Control.REFERENCE:
                reference = self._reference(key)
        if reference is None:
            return errno.EROFS
        try:
            digest = names.digest_of(name)
        except InvalidDigest:
            return errno.EROFS
        view = self._store.view(names.name_hash(reference, digest))
        if view is not None:
            self._store.release(view)
        self._released()
        return errno.ENOENT


def _nothing() -> None:
    """Nobody wants to know."""


def _in_initial_user_namespace() -> bool:
    try:
        fields = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return True
    return fields == ["0", "0", "4294967295"]
