"""Mounting layers, with counts that all tools share.

A layer is mounted once, at ``overlay/<id>/merged``, however many ask for it: each adds one
to its count in ``mountpoints.json``, and the last to leave unmounts.  Layers of additional
image stores are mounted in the run root, because their own graph root may be read-only.

Whose process mounts does not matter: Podman unmounts what we mounted and the reverse.  For
that ``overlay/`` itself must be a mount while anything is mounted below, as the other tools
have it (unless ``skip_mount_home``): one that came later would hide our mounts.  The last
one out takes it away again and signs ``storage.lock``, so that others look.

Source: containers/storage, layers.go ("Mount", "unmount"), store.go ("mount", "Shutdown"),
drivers/overlay/overlay.go ("get", "Put").
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from layerstore.errors import MountError, StorageError, UnknownObject
from layerstore.graphroot import atomic, overlaymount
from layerstore.graphroot.containers import Container
from layerstore.graphroot.images import Image
from layerstore.graphroot.layers import LayerArea
from layerstore.graphroot.lockfile import LockFile, writing_both
from layerstore.graphroot.mountpoints import MountPoint, MountPoints
from layerstore.graphroot.overlay import checked_component
from layerstore.graphroot.overlaymount import OverlayMount
from layerstore.graphroot.records import LayerRecord
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.store import Store
from layerstore.graphroot.whiteouts import in_user_namespace

_log = logging.getLogger(__name__)
_METACOPY: Final = "metacopy=on"


def mount_layer(
    store: Store,
    layer_id: str,
    *,
    read_only: bool,
    mount_label: str = "",
    options: Sequence[str] = (),
    volatile: bool = False,
) -> Path:
    """Mount a layer with all below it, or count one more user of its mount.

    ``options`` stand in place of the configured ones, ``volatile`` leaves out all syncing.
    A layer that is mounted already stays as it is, ``read_only`` or not.  Layers of
    additional image stores can be mounted ``read_only`` only.  Raises ``UnknownObject``,
    ``StorageError``, ``MountError``.
    """
    area, record = _find(store, layer_id)
    if area.read_only and not read_only:
        raise MountError("layers of additional image stores are only for reading", subject=layer_id)
    words = [*options, "ro"] if read_only else list(options)
    with atomic.storage_errors(area.overlay.home):
        request = _request(store, area, record, words, mount_label, volatile)
    with atomic.storage_errors(store.config.run_root), _mounting(store) as points:
        area, record = _find(store, layer_id)  # it may have gone meanwhile
        known = {point.id: point for point in points.load()}
        point = known.get(record.id, MountPoint(record.id, request.target, 0))
        # The list says nothing after a restart of the kernel, an unmount by hand, or the death of
        # a process between its mount and the list.
        there = overlaymount.is_mounted(point.path)
        _use_home(store)
        try:
            if not there:
                _mount(store, request)
                point = replace(point, path=request.target)
            known[record.id] = replace(point, count=point.count + 1)
            points.save(tuple(known.values()))
        except BaseException:
            if not there:
                overlaymount.detach(request.target, by_program=_by_program(store))
                if len(known) <= 1:
                    _leave_home(store)
            raise
        return point.path


def unmount_layer(store: Store, layer_id: str, *, force: bool = False) -> bool:
    """Give one use of a mounted layer back; whether it is still mounted.

    The last one unmounts, and so does ``force`` whatever the count.  Raises
    ``UnknownObject`` for a layer that is not mounted.
    """
    with atomic.storage_errors(store.config.run_root), _mounting(store) as points:
        known = {point.id: point for point in points.load()}
        point = known.pop(layer_id, None)
        if point is None:
            # Other tools forget the counts of layers that are not their own; the dead forget all.
            places = (store.layer_area.mount_path(layer_id), _run_merged(store, layer_id))
            target = next(filter(overlaymount.is_mounted, places), None)
            if target is None:
                raise UnknownObject("the layer is not mounted", subject=layer_id)
            point = MountPoint(layer_id, target, 1)
        if point.count > 1 and not force:
            known[layer_id] = replace(point, count=point.count - 1)
            points.save(tuple(known.values()))
            return True
        overlaymount.detach(point.path, by_program=_by_program(store))
        _renew(store, point.path)
        points.save(tuple(known.values()))
        if not known:
            _leave_home(store)
        return False


def mounted(store: Store) -> tuple[MountPoint, ...]:
    """What is mounted, by whomever."""
    points = MountPoints(store.layer_area.run_directory)
    if not points.lock.path.exists():
        return ()
    with points.lock.reading():
        known = points.load()
    return tuple(point for point in known if overlaymount.is_mounted(point.path))


def mount_image(store: Store, image: Image) -> Path:
    """Mount an image for reading, as ``podman image mount`` does."""
    return mount_layer(store, _top(image), read_only=True)


def unmount_image(store: Store, image: Image, *, force: bool = False) -> bool:
    """Undo one ``mount_image``, ours or Podman's; whether it is still mounted."""
    return unmount_layer(store, _top(image), force=force)


def mount_container(store: Store, container: Container) -> Path:
    """Mount a container's files for reading and writing, as ``podman mount`` does."""
    record = container.record
    if record.uid_map or record.gid_map:
        raise MountError(
            "the owners of the container's files are shifted, which is not supported",
            subject=container.id,
            advice="use podman mount",
        )
    flags = record.flags
    words = flags.get("MountOpts")
    label = flags.get("MountLabel")
    return mount_layer(
        store,
        container.layer_id,
        read_only=False,
        mount_label=label if isinstance(label, str) else "",
        options=[str(word) for word in words] if isinstance(words, list) else (),
        volatile=flags.get("Volatile") is True and not store.config.disable_volatile,
    )


def unmount_container(store: Store, container: Container, *, force: bool = False) -> bool:
    """Undo one ``mount_container``, ours or Podman's; whether it is still mounted."""
    return unmount_layer(store, container.layer_id, force=force)


# -- what to mount --------------------------------------------------------------------


def _top(image: Image) -> str:
    if not image.top_layer:
        raise MountError("the image has no layer that could be mounted", subject=image.id)
    return image.top_layer


def _find(store: Store, layer_id: str) -> tuple[LayerArea, LayerRecord]:
    for area in store.layer_areas:
        for record in area.records():
            if record.id == layer_id:
                return area, record
    raise UnknownObject("there is no such layer", subject=layer_id)


def _request(
    store: Store,
    area: LayerArea,
    record: LayerRecord,
    words: Sequence[str],
    label: str,
    volatile: bool,
) -> OverlayMount:
    """The mount for a layer; asks layer stores whether they still have their layers."""
    overlay = area.overlay
    directory = overlay.directory(record.id)
    options = _options(store, words)
    own = _with_rotated(directory / "diff")
    lowers = [path for lower in overlay.lower_dirs(record.id) for path in _with_rotated(lower)]
    if not lowers:
        empty = directory / "empty"
        lowers = [empty if empty.is_dir() else _stand_in(store)]
    for path in (*own, *lowers):
        _check_there(path)
    home = store.layer_area.overlay.home
    target = _run_merged(store, record.id) if area.read_only else directory / "merged"
    if "ro" in options:
        return OverlayMount(
            home, (*own, *lowers), None, None, target, options, label or record.mount_label
        )
    if volatile and "volatile" not in options:
        options = (*options, "volatile")
    below = (*own[1:], *lowers)
    return OverlayMount(
        home,
        below,
        own[0],
        directory / "work",
        target,
        options,
        label or record.mount_label,
    )


def _options(store: Store, words: Sequence[str]) -> tuple[str, ...]:
    configured = [word for each in store.config.mount_options for word in each.split(",")]
    chosen = list(words) if words else list(configured)
    if _METACOPY in configured and _METACOPY not in chosen:
        # A layer that was written with it cannot be read without.
        chosen.append(_METACOPY)
    if _by_program(store):
        return tuple(word for word in chosen if word != _METACOPY)
    if store.config.rootless or in_user_namespace():
        chosen = [word for word in chosen if word != _METACOPY]  # the kernel refuses the pair
        chosen.append("userxattr")
    return tuple(dict.fromkeys(word for word in chosen if word))


def _with_rotated(diff: Path) -> list[Path]:
    """A layer's ``diff`` and the older ones that a change of owners left, ``diff1`` and so on."""
    found = [diff]
    # Textually: `..` behind a short link is the layer's directory.
    while (older := Path(f"{diff}/../diff{len(found)}")).is_dir():
        found.append(older)
    return found


def _check_there(path: Path) -> None:
    try:
        os.stat(path)
    except OSError as error:
        where = ""
        with contextlib.suppress(OSError):
            where = os.path.realpath(path)
        raise MountError(
            f"the content of a layer cannot be reached: {error.strerror}",
            subject=where or str(path),
            advice="if it is in an additional layer store: is that store mounted?",
        ) from error


def _stand_in(store: Store) -> Path:
    """An empty directory for a base layer that lost its own."""
    path = store.config.run_root / "overlay" / "empty"
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be made: {error.strerror}", subject=str(path)) from error
    return path


def _run_merged(store: Store, layer_id: str) -> Path:
    return store.config.run_root / "overlay" / checked_component(layer_id) / "merged"


# -- mounting ---------------------------------------------------------------------------


@contextmanager
def _mounting(store: Store) -> Iterator[MountPoints]:
    """Hold the locks, in the order of graphroot-format section 3."""
    if store.read_only:
        raise StorageError(
            "the storage is open for reading only", subject=str(store.config.graph_root)
        )
    storage = LockFile.at(store.config.graph_root / "storage.lock")
    with writing_both(storage, store.layer_area.table.lock):
        store.layer_area.run_directory.mkdir(0o700, parents=True, exist_ok=True)
        points = MountPoints(store.layer_area.run_directory)
        with points.lock.writing():
            yield points


def _by_program(store: Store) -> bool:
    return bool(store.config.mount_program)


def _mount(store: Store, request: OverlayMount) -> None:
    if not _by_program(store) and store.layer_area.overlay.has_mount_program:
        raise MountError(
            "the layers were written for a mount program, and none is configured",
            subject=str(store.config.graph_root),
            advice="set mount_program in storage.conf",
        )
    try:
        request.target.mkdir(0o700, parents=True, exist_ok=True)
        if request.work is not None:
            # The kernel's mark of a volatile mount, which forbids the next one.
            stale = request.work / "work/incompat/volatile"
            if os.path.lexists(stale):
                remove_tree(stale)
    except OSError as error:
        raise StorageError(
            f"cannot be prepared: {error.strerror}", subject=str(request.target)
        ) from error
    if _by_program(store):
        overlaymount.make_with_program(store.config.mount_program, request)
    else:
        overlaymount.make(request)


def _renew(store: Store, merged: Path) -> None:
    """Put a fresh directory in place of a mount point: nothing may have been left below."""
    if merged == _run_merged(store, merged.parent.name):
        _remove_empty((merged, merged.parent))
        return
    fresh = merged.with_name("merged.1")
    try:
        with contextlib.suppress(FileExistsError):
            fresh.mkdir(0o700)
        os.rename(fresh, merged)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EROFS):
            _log.warning("%s cannot be made anew: %s", merged, error.strerror)


def _remove_empty(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.rmdir()


def _use_home(store: Store) -> None:
    home = store.layer_area.overlay.home
    if not store.config.skip_mount_home and not overlaymount.is_mounted(home):
        overlaymount.bind_private(home)


def _leave_home(store: Store) -> None:
    home = store.layer_area.overlay.home
    if store.config.skip_mount_home or not overlaymount.is_mounted(home):
        return
    if overlaymount.unbind(home):
        LockFile.at(store.config.graph_root / "storage.lock").renew()
