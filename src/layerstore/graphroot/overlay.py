"""``GRAPHROOT/overlay``: the directories of layers, their short names and their lowers.

Each layer has a directory named after its id::

    diff/      what the layer adds; for a layer of an additional layer store an
               absolute symbolic link to the store's `diff`
    link       the layer's short name: 26 characters A-Z 2-7, no newline
    lower      "l/NAME:l/NAME..." of the layers below, the nearest first; absent for a base layer
    work/ merged/     what the kernel and mounts need
    empty/     the stand-in for a lower directory; base layers only
    additionallayer   path of the layer in its additional layer store, no newline

``l/NAME`` is a symbolic link to ``../<id>/diff``: short names, because the
options of an overlay mount must fit into one page.  After an unclean shutdown
links may be missing; the ``link`` files say what they were.  A layer may stand
on layers of an additional image store (a second graph root, read-only): its
``lower`` then has names that are found in that store's ``l/``.

Source: containers/storage, drivers/overlay/overlay.go ("create", "getLower",
"recreateSymlinks", "CreateAs", "Remove").
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from layerstore.errors import ConfigError, CorruptStorage, InvalidDigest, StorageError
from layerstore.graphroot import atomic
from layerstore.graphroot.staging import TEMPDIRS, StagingLost, TempDirectory
from layerstore.image import Digest

_log = logging.getLogger(__name__)

_LINKS: Final = "l"
_STAGING: Final = "staging"
_NOT_LAYERS: Final = frozenset((_LINKS, _STAGING, TEMPDIRS))
_LINK_CHARS: Final = 26
_ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_LINK: Final = re.compile(r"[A-Za-z0-9]{1,64}")
_OTHER_DRIVERS: Final = ("vfs", "btrfs", "zfs", "aufs", "devicemapper")
_MOUNT_PROGRAM: Final = ".has-mount-program"


class RootAttributes(msgspec.Struct, frozen=True):
    """Mode (without the type) and owner of a layer's ``diff`` directory."""

    mode: int
    uid: int
    gid: int


_BASE: Final = RootAttributes(0o555, 0, 0)
_INHERITED: Final = 0o755


class Overlay:
    """The ``overlay`` directory of one graph root.

    ``others`` are those of additional image stores, in their order.  Nothing here
    takes locks: whoever changes something holds ``layers.lock`` for writing.
    """

    def __init__(self, graph_root: Path, others: Sequence[Overlay] = ()) -> None:
        self.home: Final = graph_root / "overlay"
        self.others: Final = tuple(others)

    @property
    def tempdirs(self) -> Path:
        """Where staged and deleted layers lie for a while."""
        return self.home / TEMPDIRS

    def prepare(self, *, mount_program: bool = False) -> None:
        """Make what every overlay has; ``mount_program``: note that one mounts these layers.

        Whoever opens the graph root without that setting then knows how whiteouts were written.
        """
        self.home.mkdir(0o700, exist_ok=True)
        (self.home / _LINKS).mkdir(0o755, exist_ok=True)
        if mount_program and not self.has_mount_program:
            atomic.write_file(self.home / _MOUNT_PROGRAM, b"true")

    def sync(self) -> None:
        """Write the whole file system to disk (the setting ``overlay.sync=filesystem``)."""
        descriptor = os.open(self.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
                reason = os.strerror(ctypes.get_errno())
                raise StorageError(f"cannot be written to disk: {reason}", subject=str(self.home))
        finally:
            os.close(descriptor)

    @property
    def has_mount_program(self) -> bool:
        """Whether fuse-overlayfs mounts these layers: then whiteouts are files ``.wh.NAME``."""
        try:
            return (self.home / _MOUNT_PROGRAM).read_bytes().strip() == b"true"
        except OSError:
            return False

    # -- finding things ------------------------------------------------------

    def exists(self, layer: str) -> bool:
        """Whether this graph root itself has a directory for ``layer``."""
        return os.path.lexists(self._own(layer))

    def directory(self, layer: str) -> Path:
        """The layer's directory, here or in an additional image store."""
        own = self._own(layer)
        if not os.path.lexists(own):
            for other in self.others:
                if other.exists(layer):
                    return other.directory(layer)
        return own

    def diff_path(self, layer: str) -> Path:
        """``diff`` of the layer: a directory, or a link into an additional layer store."""
        return self.directory(layer) / "diff"

    def additional_layer(self, layer: str) -> Path | None:
        """Where the layer lies in its additional layer store; None for an ordinary layer."""
        return additional_layer_of(self.directory(layer))

    def root_attributes(self, layer: str) -> RootAttributes:
        """Mode and owner that a child of ``layer`` ("" for none) inherits.

        Permissions only, no sticky bit and the like, and as little for others as the
        umask of the tools leaves.  For a layer of an additional
        layer store this asks the store.
        """
        return inherited_from(self.diff_path(layer), layer) if layer else _BASE

    def link(self, layer: str) -> str:
        """The short name of ``layer``; recreates what an unclean shutdown lost."""
        directory = self.directory(layer)
        found = short_name_of(directory)
        if found is None:
            self._owner(directory).recreate_links()
            found = short_name_of(directory)
        if found is None:
            raise CorruptStorage("the layer has no short name", subject=layer)
        return found

    def lower(self, layer: str) -> tuple[str, ...]:
        """The content of ``lower``: ``l/NAME`` of each layer below, the nearest first."""
        try:
            text = (self.directory(layer) / "lower").read_text("ascii")
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptStorage(f"lower cannot be read: {error}", subject=layer) from error
        names = tuple(text.strip().split(":"))
        for name in names:
            if _LINK.fullmatch(name.removeprefix("l/")) is None or not name.startswith("l/"):
                raise CorruptStorage(f"lower names {name[:80]!r}", subject=layer)
        return names

    def lowers_on(self, parent: str) -> tuple[str, ...]:
        """What ``lower`` of a layer on ``parent`` ("" for none) is to say."""
        if not parent:
            return ()
        if not os.path.lexists(self.directory(parent)):
            raise CorruptStorage("the parent layer has no directory", subject=parent)
        return (f"l/{self.link(parent)}", *self.lower(parent))

    def lower_dirs(self, layer: str) -> tuple[Path, ...]:
        """Absolute paths of the short links below ``layer``, the nearest first.

        Links that an unclean shutdown lost are recreated; ``CorruptStorage`` if
        one cannot be.
        """
        return tuple(self._link_path(name, layer) for name in self.lower(layer))

    def layers(self) -> list[str]:
        """The ids of all directories of layers, known or orphaned, sorted."""
        try:
            with os.scandir(self.home) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if entry.name not in _NOT_LAYERS and entry.is_dir(follow_symlinks=False)
                )
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(
                f"cannot be read: {error.strerror}", subject=str(self.home)
            ) from error

    # -- making and removing layers ----------------------------------------------

    def create(
        self,
        layer: str,
        parent: str,
        attributes: RootAttributes,
        bin_: TempDirectory,
        *,
        content: Path | None = None,
        own_attributes: bool = False,
        additional: Path | None = None,
    ) -> None:
        """Make the directory of ``layer`` on ``parent`` ("" for none).

        ``content`` is a directory of the same mount that becomes ``diff``; it keeps
        its mode and owner if ``own_attributes``, else it gets ``attributes``
        (``root_attributes(parent)``), as an empty ``diff`` does.  ``additional`` is
        the layer's directory in an additional layer store, whose ``diff`` is linked
        to instead.  What is left under the same id goes into ``bin_``; its short name stays,
        for layers whose record newer containers/storage forgot may have others on them.
        """
        own = self._own(layer)
        lowers = self.lowers_on(parent)
        (self.home / _LINKS).mkdir(0o755, exist_ok=True)
        name = short_name_of(own)
        if os.path.lexists(own):
            _log.warning("the directory of layer %s has no record: made anew", layer)
            self.detach(layer, bin_)
        try:
            _make(own, RootAttributes(0o700, 0, 0))
            if additional is not None:
                _write(own / "additionallayer", str(additional))
                (own / "diff").symlink_to(additional / "diff")
            elif content is None:
                _make(own / "diff", attributes)
            else:
                _rename_staged(content, own / "diff")
                if not own_attributes:
                    _set(own / "diff", attributes)
            self._give_link(layer, own, name)
            owner = RootAttributes(0o700, attributes.uid, attributes.gid)
            _make(own / "work", owner)
            _make(own / "merged", owner)
            if parent:
                _write(own / "lower", ":".join(lowers))
            else:
                _make(own / "empty", owner)
        except BaseException as error:
            self.detach(layer, bin_)
            if isinstance(error, OSError):
                raise StorageError(
                    f"the directory of a layer cannot be made: {error.strerror}", subject=str(own)
                ) from error
            raise

    def localize(self, layer: str, content: Path, attributes: RootAttributes | None) -> None:
        """Let ``content``, a directory of the same mount, take the place of the link to a store.

        It gets ``attributes``, if given.  What is left of a crash before the last step is a layer
        whose content is here and whose ``additionallayer`` is still there; again mends that.
        Raises ``StorageError``.
        """
        own = self._own(layer)
        try:
            if os.path.islink(own / "diff"):
                if attributes is not None:
                    _set(content, attributes)
                self.sync()  # what takes the place of something good must be there
                atomic.exchange(content, own / "diff")
            (own / "additionallayer").unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"the layer cannot be made a local one: {error.strerror}", subject=str(own)
            ) from error

    def detach(self, layer: str, bin_: TempDirectory) -> None:
        """Take the directory of ``layer`` away, and its short links; the rest happens in ``bin_``.

        The additional layer store is not told.
        """
        own = self._own(layer)
        try:
            own.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot be removed: {error.strerror}", subject=str(own)) from error
        name = short_name_of(own)
        if name is not None:
            short = self.home / _LINKS / name
            with contextlib.suppress(OSError):
                if os.readlink(short) == _link_target(layer):
                    short.unlink()
        bin_.take(own)

    def mend_lower(self, layer: str, parent: str) -> bool:
        """Write ``lower`` of ``layer`` as the layers below make it; whether it was another."""
        names = self.lowers_on(parent)
        with contextlib.suppress(CorruptStorage):
            if self.lower(layer) == names:
                return False
        path = self._own(layer) / "lower"
        with atomic.storage_errors(path):
            if names:
                atomic.write_file(path, ":".join(names).encode(), mode=0o644)
            else:
                path.unlink()
        return True

    def recreate_links(self) -> None:
        """Make ``l/`` and the ``link`` files agree again, as far as either is there.

        Entries of ``l/`` that are no link to a layer are removed.
        """
        links = self.home / _LINKS
        links.mkdir(0o755, exist_ok=True)
        for layer in self.layers():
            name = short_name_of(self.home / layer)
            if name is not None:
                with contextlib.suppress(FileExistsError):
                    os.symlink(_link_target(layer), links / name)
        for name in sorted(os.listdir(links)):
            target = _target_layer(links / name)
            if target is None:
                with contextlib.suppress(OSError):
                    (links / name).unlink()
                target = self._named(name)
                if target is not None:
                    os.symlink(_link_target(target), links / name)
            elif (self.home / target).is_dir() and short_name_of(self.home / target) is None:
                _write(self.home / target / "link", name)

    # -- inside ----------------------------------------------------------------

    def _own(self, layer: str) -> Path:
        return self.home / checked_component(layer)

    def _owner(self, directory: Path) -> Overlay:
        for overlay in self.others:
            if directory.parent == overlay.home:
                return overlay
        return self

    def _named(self, name: str) -> str | None:
        for layer in self.layers():
            if short_name_of(self.home / layer) == name:
                return layer
        return None

    def _link_path(self, name: str, layer: str) -> Path:
        for attempt in range(2):
            for overlay in (self, *self.others):
                path = overlay.home / name
                if path.is_symlink():
                    return path
            if attempt == 0:
                _log.warning("the short link %s of layer %s is lost: recreated", name, layer)
                for overlay in (self, *self.others):
                    with contextlib.suppress(OSError):  # an image store may be read-only
                        overlay.recreate_links()
        raise CorruptStorage(f"the layer below called {name} does not exist", subject=layer)

    def _give_link(self, layer: str, directory: Path, name: str | None) -> None:
        """``name`` if it is still free, else a new one."""
        while True:
            name = name or "".join(secrets.choice(_ALPHABET) for _ in range(_LINK_CHARS))
            # In this order: a crash in between must not leave a link that nobody can ascribe.
            _write(directory / "link", name)
            with contextlib.suppress(FileExistsError):
                os.symlink(_link_target(layer), self.home / _LINKS / name)
                return
            name = None


def inherited_from(diff: Path, layer: str) -> RootAttributes:
    """What a child of ``layer`` inherits, whose content is at ``diff``; raises ``StorageError``."""
    try:
        found = os.stat(diff)
    except OSError as error:
        raise StorageError(
            f"the content of the layer cannot be reached: {error.strerror}", subject=layer
        ) from error
    return RootAttributes(found.st_mode & _INHERITED, found.st_uid, found.st_gid)


def additional_layer_of(directory: Path) -> Path | None:
    """The content of ``additionallayer`` in a layer's directory."""
    try:
        text = (directory / "additionallayer").read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptStorage(
            f"additionallayer cannot be read: {error.strerror}", subject=str(directory)
        ) from error
    path = Path(os.fsdecode(text.strip()))
    if not path.is_absolute() or ".." in path.parts:
        raise CorruptStorage("additionallayer is no absolute path", subject=str(directory))
    try:
        # It is asked for its use and told of its release, by O_TRUNC and rmdir.
        Digest.parse(path.name)
    except InvalidDigest as error:
        raise CorruptStorage(
            "additionallayer leads to no layer of a layer store", subject=str(directory)
        ) from error
    return path


def has_additional_layer(directory: Path) -> bool:
    """Whether a layer's directory says that a layer store has the content, readable or not."""
    return os.path.lexists(directory / "additionallayer")


def checked_component(name: str) -> str:
    """``name`` if it can be the name of a directory entry; else ``CorruptStorage``."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise CorruptStorage("an id that is no file name", subject=repr(name[:160]))
    return name


def refuse_other_driver(graph_root: Path) -> None:
    """Raise ``ConfigError`` for a graph root that was made with another driver than overlay."""
    with atomic.storage_errors(graph_root):
        if (graph_root / "overlay-images").is_dir():
            return
        for driver in _OTHER_DRIVERS:
            if (graph_root / f"{driver}-images").is_dir():
                raise ConfigError(
                    f"the storage was made with the driver {driver}, only overlay is supported",
                    subject=str(graph_root),
                )


def _link_target(layer: str) -> str:
    return f"../{layer}/diff"


def _target_layer(link: Path) -> str | None:
    try:
        parts = os.readlink(link).split("/")
    except OSError:
        return None
    return parts[1] if len(parts) == 3 and parts[0] == ".." and parts[2] == "diff" else None


def short_name_of(directory: Path) -> str | None:
    """The short name that a layer's directory says it has; None if it says none."""
    try:
        text = (directory / "link").read_text("ascii").strip("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if _LINK.fullmatch(text) else None


def _make(path: Path, attributes: RootAttributes) -> None:
    path.mkdir(0o700)
    _set(path, attributes)


def _set(path: Path, attributes: RootAttributes) -> None:
    found = os.lstat(path)
    if (found.st_uid, found.st_gid) != (attributes.uid, attributes.gid) and os.geteuid() == 0:
        os.lchown(path, attributes.uid, attributes.gid)
    os.chmod(path, attributes.mode)


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o644)
        file.write(os.fsencode(text))


def _rename_staged(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise StagingLost("the staged layer was removed", subject=str(source)) from None
        raise
