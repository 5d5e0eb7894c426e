"""storage.conf: where the graph root is, and how it is to be treated.

containers-storage.conf(5), and the code of containers/storage where the page is silent.  Which
files are read stands in ``storagefiles``.  Every option ends up as ``key=value``, with or without
``overlay.`` before it, whether it was written in a file, in ``$STORAGE_OPTS`` or on a command
line; the latter two replace the files'.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from layerstore.errors import ConfigError
from layerstore.graphroot.storagefiles import (
    DRIVER,
    Place,
    absolute,
    clean,
    flag,
    strings,
    table_at,
    text_at,
)

_IMAGE_STORES: Final = "additionalimagestores"
_LAYER_STORES: Final = "additionallayerstores"
# Keys of [storage.options.overlay] that are options of the driver, and those of them that may
# also stand in [storage.options].
_OWN_OPTIONS: Final = ("inodes", "use_composefs", "sync")
_OPTIONS: Final = (
    *("ignore_chown_errors", "mount_program", "mountopt", "size", "skip_mount_home", "force_mask"),
)
_REMAPPING: Final = ("remap-uids", "remap-gids", "remap-user", "remap-group")


@dataclass(frozen=True, slots=True)
class LayerStoreSpec:
    """One additional layer store: its directory, and whether references stand above layers."""

    path: Path
    with_reference: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """``/absolute/path`` or ``/absolute/path:ref``; raises ``ConfigError``."""
        path, *suffixes = text.split(":")
        if not path.startswith("/"):
            raise ConfigError("an additional layer store needs an absolute path", subject=text)
        if suffixes not in ([], ["ref"]):
            raise ConfigError('only ":ref" may follow an additional layer store', subject=text)
        return cls(clean(path), bool(suffixes))

    def __str__(self) -> str:
        return f"{self.path}:ref" if self.with_reference else str(self.path)


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """The storage of one user, as configured.

    ``mount_options`` are for every overlay mount.  With a ``mount_program`` (fuse-overlayfs)
    whiteouts are files named ``.wh.…`` on disk.  ``ignore_chown_errors`` lets a user with a
    single id have all files.  ``sync`` is "" or "filesystem" (sync a layer before recording it).
    ``files`` were read, in this order.  ``refused`` are settings under which the content of the
    graph root would not be what we read and write, each as a sentence: see ``check``.
    """

    graph_root: Path
    run_root: Path
    driver: str = DRIVER
    rootless: bool = False
    additional_layer_stores: tuple[LayerStoreSpec, ...] = ()
    additional_image_stores: tuple[Path, ...] = ()
    mount_options: tuple[str, ...] = ()
    mount_program: str = ""
    skip_mount_home: bool = False
    ignore_chown_errors: bool = False
    disable_volatile: bool = False
    sync: str = ""
    refused: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @classmethod
    def from_system(
        cls,
        *,
        env: Mapping[str, str] | None = None,
        home: Path | None = None,
        uid: int | None = None,
        etc: Path = Path("/etc"),
        usr: Path = Path("/usr/share"),
        run: Path = Path("/run"),
        root: Path | None = None,
        run_root: Path | None = None,
        driver: str | None = None,
        options: Sequence[str] = (),
    ) -> Self:
        """Read the machine's configuration as Podman does; raises ``ConfigError``.

        ``root``, ``run_root``, ``driver`` and ``options`` ("key=value") are what a user names on
        a command line.  As with Podman, ``root``, ``driver`` or ``options`` make the options of
        the files void.  The rest is for tests; ``uid`` 0 is root.
        """
        env = os.environ if env is None else env
        place = Place(env, home, uid, etc / "containers", usr / "containers", run)
        settings, files = place.read()
        table = table_at(settings, "storage")
        config = cls(
            graph_root=root or place.graph_root(table),
            run_root=run_root or place.run_root(table),
            rootless=place.rootless,
            disable_volatile=flag(
                table_at(table, "options").get("disable-volatile", False), "disable-volatile"
            ),
            files=files,
        )
        if text_at(table, "imagestore"):
            config = config._refuse("images are kept apart from containers (imagestore)")
        if flag(table.get("transient_store", False), "transient_store"):
            config = config._refuse("containers are kept in the run root (transient_store)")
        for key in _REMAPPING:
            if text_at(table_at(table, "options"), key):
                config = config._refuse(f"owners of files are shifted ({key})")
        chosen = driver or env.get("STORAGE_DRIVER") or text_at(table, "driver")
        config = replace(config, driver=_driver(chosen, table, config.graph_root))
        if options or root is not None or driver is not None:
            given = list(options)
        elif "STORAGE_OPTS" in env:
            given = env["STORAGE_OPTS"].split(",")
        else:
            given = _file_options(table_at(table, "options"))
        return config.with_options(given if given != [""] else [])

    def with_options(self, options: Sequence[str]) -> Self:
        """With options of the driver added, each ``key=value``; raises ``ConfigError``."""
        config = self
        for option in options:
            key, found, value = option.partition("=")
            key, value = key.strip(), value.strip()
            if not found or not key:
                raise ConfigError("a storage option is KEY=VALUE", subject=option)
            config = config._with_option(key, value)
        return config

    def check(self) -> None:
        """Raise ``ConfigError`` if the settings are such that we must not touch the storage."""
        if self.driver != DRIVER:
            raise ConfigError(
                f"the storage driver {self.driver!r} is not supported",
                subject=str(self.graph_root),
                advice=f'only "{DRIVER}" is; see driver in storage.conf(5)',
            )
        if self.refused:
            raise ConfigError(
                f"this storage cannot be used: {'; '.join(self.refused)}",
                subject=str(self.files[-1]) if self.files else str(self.graph_root),
                advice="layerstore does not support these settings of storage.conf",
            )

    def _refuse(self, sentence: str) -> Self:
        return replace(self, refused=(*self.refused, sentence))

    def _with_option(self, key: str, value: str) -> Self:
        name = key.lower()
        for prefix in ("overlay.", "overlay2.", "."):
            name = name.removeprefix(prefix)
        match name:
            case "additionallayerstore":
                specs = (LayerStoreSpec.parse(text) for text in value.split(",") if text)
                return replace(
                    self, additional_layer_stores=(*self.additional_layer_stores, *specs)
                )
            case "imagestore" | "additionalimagestore":
                paths = (absolute(text, key) for text in value.split(",") if text)
                return replace(
                    self, additional_image_stores=(*self.additional_image_stores, *paths)
                )
            case "mountopt":
                return replace(self, mount_options=tuple(part for part in value.split(",") if part))
            case "mount_program":
                return replace(self, mount_program=value)
            case "skip_mount_home":
                return replace(self, skip_mount_home=flag(value, key))
            case "ignore_chown_errors":
                return replace(self, ignore_chown_errors=flag(value, key))
            case "sync":
                if value not in ("", "none", "filesystem"):
                    raise ConfigError(
                        'is neither "none" nor "filesystem"', subject=f"{key}={value}"
                    )
                return replace(self, sync="" if value == "none" else value)
            case "use_composefs":
                return self._refuse("layers are composefs images") if flag(value, key) else self
            case "force_mask":
                return self._refuse("modes of files are masked (force_mask)") if value else self
            case "size" | "inodes" | "override_kernel_check":
                return self  # quotas of containers; nothing
            case _ if "." in name and self.driver != DRIVER:
                return self  # of the driver that `check` refuses
            case _:
                raise ConfigError("there is no such storage option", subject=f"{key}={value}")


def _file_options(options: Mapping[str, Any]) -> list[str]:
    """The options of the driver in ``[storage.options]``, as they would stand in STORAGE_OPTS."""
    own = table_at(options, DRIVER)
    result = []
    for key, option in ((_IMAGE_STORES, "imagestore"), (_LAYER_STORES, "additionallayerstore")):
        result += [f"{option}={text}" for text in strings(options, key)]
    for key in (*_OPTIONS, *_OWN_OPTIONS):
        value = own.get(key) or (options.get(key) if key in _OPTIONS else None)
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, int):
            value = f"{value:o}" if value else ""  # a mode; 0 is none
        if value is not None and not isinstance(value, str):
            raise ConfigError("is no string", subject=f"storage.options.{key}")
        if value:
            result.append(f"{key}={value}")
    return result


def _driver(chosen: str, table: Mapping[str, Any], graph_root: Path) -> str:
    if not chosen:
        # As the store was made, when nothing says how it is to be.
        try:
            made = sorted(name[:-7] for name in os.listdir(graph_root) if name.endswith("-images"))
        except OSError:
            made = []
        wished = strings(table, "driver_priority")
        ways = made or wished or [DRIVER]
        chosen = DRIVER if DRIVER in ways else ways[0]
    return DRIVER if chosen == "overlay2" else chosen
