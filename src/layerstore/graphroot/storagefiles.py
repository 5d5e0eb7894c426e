"""Which storage.conf files are read, how they add up, and what a user's own roots are.

Two generations of tools look for storage.conf differently.

* Up to Podman 5 there is one file: ``$CONTAINERS_STORAGE_CONF``, or the first of the user's, of
  ``/etc/containers`` and of ``/usr/share/containers``.  A user without a file of their own takes
  hardly anything from the system's: the driver, ``rootless_storage_path`` and
  ``ignore_chown_errors``, but neither roots nor stores.
* From Podman 6 on, drop-ins follow the main file: ``storage.conf.d``, ``storage.rootful.conf.d``
  or ``storage.rootless.conf.d`` with a directory for each user id.  A file hides those of the
  same name in weaker places; what is left is read in the order of the names.
  ``$CONTAINERS_STORAGE_CONF_OVERRIDE`` comes last.

We read what either reads: drop-ins, which only new tools know, stand where new tools are.  Where
both read a file but understand it differently, we keep to the older rule, because a store that
the tools beside us do not see must not become part of their layers.
"""

from __future__ import annotations

import logging
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from layerstore import limits
from layerstore.errors import ConfigError, StorageError
from layerstore.graphroot.atomic import read_file

_log = logging.getLogger(__name__)

DRIVER: Final = "overlay"
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})
# What any version knows (containers/storage, pkg/config and types/options.go).  Below the tables that
# are not here, and in those of other drivers, anything may stand.
_KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "": frozenset(("storage",)),
    "storage": frozenset(
        (
            *("driver", "driver_priority", "graphroot", "imagestore", "options"),
            *("rootless_storage_path", "runroot", "transient_store"),
        )
    ),
    "storage.options": frozenset(
        (
            *("additionalimagestores", "additionallayerstores", "imagestore", "pull_options"),
            *("remap-uids", "remap-gids", "remap-user", "remap-group", "root-auto-userns-user"),
            *("auto-userns-min-size", "auto-userns-max-size", "disable-volatile", "size"),
            *("ignore_chown_errors", "force_mask", "mountopt", "mount_program"),
            *("skip_mount_home", "ostree_repos", "override_kernel_check"),
            *("aufs", "btrfs", "overlay", "overlay2", "thinpool", "vfs", "zfs"),
        )
    ),
    "storage.options.overlay": frozenset(
        (
            *("ignore_chown_errors", "inodes", "mountopt", "mount_program", "size"),
            *("skip_mount_home", "force_mask", "use_composefs", "sync"),
        )
    ),
}


class Place:
    """Who asks, and where that user's and the system's files are."""

    def __init__(
        self,
        env: Mapping[str, str],
        home: Path | None,
        uid: int | None,
        etc: Path,
        usr: Path,
        run: Path,
    ) -> None:
        self.env = env
        if home is None and env.get("HOME"):
            home = Path(env["HOME"])
        self.home = home
        if uid is None:  # inside a user namespace that Podman made, we look like root
            text = env.get("_CONTAINERS_ROOTLESS_UID", "")
            uid = int(text) if text.isdecimal() else os.geteuid()
        self.uid = uid
        self.rootless = uid != 0
        self.run = run
        self.system = [usr, etc]
        own = env.get("XDG_CONFIG_HOME")
        config_home = Path(own) if own else (home / ".config" if home is not None else None)
        self.own = config_home / "containers" if config_home is not None else None

    def read(self) -> tuple[dict[str, Any], tuple[Path, ...]]:
        """The merged content of all files, and which they were."""
        merged: dict[str, Any] = {}
        files: list[Path] = []
        named = self.env.get("CONTAINERS_STORAGE_CONF")
        if named:
            files.append(Path(named))
            merged = _merge({}, _load(files[0], required=True) or {})
        else:
            for directory in filter(None, (self.own, *reversed(self.system))):
                content = _load(directory / "storage.conf")
                if content is not None:
                    files.append(directory / "storage.conf")
                    merged = _merge({}, content)
                    if self.rootless and directory != self.own:
                        merged = _inherited(merged)
                    break
            for path in self._drop_ins():
                content = _load(path)
                if content is not None:
                    files.append(path)
                    merged = _merge(merged, content)
        last = self.env.get("CONTAINERS_STORAGE_CONF_OVERRIDE")
        if last:
            files.append(Path(last))
            merged = _merge(merged, _load(files[-1], required=True) or {})
        return merged, tuple(files)

    def _drop_ins(self) -> list[Path]:
        special = "storage.rootless.conf.d" if self.rootless else "storage.rootful.conf.d"
        directories = []
        for directory in self.system:
            directories += [directory / "storage.conf.d", directory / special]
            if self.rootless:
                directories.append(directory / special / str(self.uid))
        if self.own is not None:
            directories.append(self.own / "storage.conf.d")
        found: dict[str, Path] = {}
        for directory in directories:
            try:
                names = os.listdir(directory)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise ConfigError(
                    f"cannot be read: {error.strerror}", subject=str(directory)
                ) from error
            for name in names:
                if name.endswith(".conf") and (directory / name).is_file():
                    found[name] = directory / name
        return [found[name] for name in sorted(found)]

    # -- roots -------------------------------------------------------------------------

    def graph_root(self, table: Mapping[str, Any]) -> Path:
        text = text_at(table, "graphroot")
        if not text and self.rootless:
            text = text_at(table, "rootless_storage_path")
        if text:
            return self._expand(text, "graphroot")
        if not self.rootless:
            return Path("/var/lib/containers/storage")
        data = self.env.get("XDG_DATA_HOME")
        return (Path(data) if data else self._home() / ".local/share") / "containers/storage"

    def run_root(self, table: Mapping[str, Any]) -> Path:
        text = text_at(table, "runroot")
        if text:
            return self._expand(text, "runroot")
        if not self.rootless:
            return self.run / "containers/storage"
        return self._runtime_directory() / "containers"

    def _runtime_directory(self) -> Path:
        named = self.env.get("XDG_RUNTIME_DIR")
        if named:
            return Path(os.path.realpath(named))
        temporary = Path(self.env.get("TMPDIR") or "/tmp")  # noqa: S108
        fallback = temporary / f"storage-run-{self.uid}"
        older = temporary / f"containers-user-{self.uid}"
        for directory in (self.run / "user" / str(self.uid), fallback, older):
            if self._is_private(directory):
                return directory
        return fallback

    def _is_private(self, directory: Path) -> bool:
        """A directory of somebody else, or open to others, is no place for locks."""
        try:
            facts = directory.lstat()
        except OSError:
            return False
        mode = stat.S_IMODE(facts.st_mode)
        owners = {self.uid, os.geteuid()}
        return (
            stat.S_ISDIR(facts.st_mode)
            and facts.st_uid in owners
            and mode & 0o700 == 0o700
            and not mode & 0o022
        )

    def _home(self) -> Path:
        if self.home is None:
            raise ConfigError(
                "the storage has no place: neither XDG_DATA_HOME nor HOME is set",
                advice="set graphroot in storage.conf, or HOME",
            )
        return Path(os.path.realpath(self.home))

    def _expand(self, text: str, key: str) -> Path:
        variables = {**self.env, "UID": str(self.uid)}
        if self.home is not None:
            variables["HOME"] = str(self.home)
        path = _expand(text, variables)
        return Path(os.path.realpath(absolute(path, f"{key} {text}")))


def _inherited(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a user without a file of their own takes from the system's main file.

    Roots only if they differ from user to user: root's own are no place for others.
    """
    table = table_at(content, "storage")
    options = table_at(table, "options")
    kept = {
        key: value
        for key, value in table.items()
        if key in ("driver", "driver_priority", "rootless_storage_path")
        or (key in ("graphroot", "runroot") and isinstance(value, str) and "$" in value)
    }
    errors = table_at(options, DRIVER).get(
        "ignore_chown_errors", options.get("ignore_chown_errors")
    )
    if errors is not None:
        kept["options"] = {"ignore_chown_errors": errors}
    return {"storage": kept}


def _load(path: Path, *, required: bool = False) -> dict[str, Any] | None:
    try:
        data, _ = read_file(path, limits.STORAGE_CONF_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        if required:
            raise ConfigError("does not exist", subject=str(path)) from error
        return None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", subject=str(path)) from error
    except StorageError as error:
        raise ConfigError(error.what, subject=str(path)) from error
    try:
        content = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"is no TOML: {error}", subject=str(path)) from error
    for key in _unknown_keys(content, ""):
        _log.warning("%s: there is no key %s", path, key)
    return content


def _unknown_keys(table: Mapping[str, Any], name: str) -> Iterator[str]:
    """What is a mistake in writing, most of the time; Podman goes on with a warning, too."""
    for key, value in table.items():
        whole = f"{name}.{key}" if name else key
        if key not in _KNOWN[name]:
            yield whole
        elif whole in _KNOWN and isinstance(value, dict):
            yield from _unknown_keys(value, whole)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with every value of ``above`` put in its place, tables key by key.

    A list replaces the one below, unless ``{append = true}`` stands in it.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict):
            merged[key] = _merge(old if isinstance(old, dict) else {}, value)
        elif isinstance(value, list):
            items = [item for item in value if not _is_marker(item)]
            if {"append": True} in value and isinstance(old, list):
                items = [*old, *items]
            merged[key] = items
        else:
            merged[key] = value
    return merged


def _is_marker(item: Any) -> bool:
    return isinstance(item, dict) and list(item) == ["append"]


# -- values --------------------------------------------------------------------------


def strings(table: Mapping[str, Any], key: str) -> list[str]:
    """The list of strings at ``key``; raises ``ConfigError``."""
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError("is no list of strings", subject=f"{key} in storage.conf")
    return value


def table_at(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The table at ``key``; raises ``ConfigError``."""
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError("is no table", subject=f"{key} in storage.conf")
    return value


def text_at(table: Mapping[str, Any], key: str) -> str:
    """The string at ``key``, "" if there is none; raises ``ConfigError``."""
    value = table.get(key, "")
    if not isinstance(value, str):
        raise ConfigError("is no string", subject=f"{key} in storage.conf")
    return value


def flag(value: Any, key: str) -> bool:
    """A truth value, as TOML or as Go has it; raises ``ConfigError``."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _TRUE | _FALSE:
        return value in _TRUE
    raise ConfigError("is neither true nor false", subject=f"{key}={value}")


def _expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace ``$NAME`` and ``${NAME}``; an unknown one by nothing, as Go's ExpandEnv."""
    result, rest = [], text
    while rest:
        before, dollar, rest = rest.partition("$")
        result.append(before)
        if not dollar:
            break
        if rest.startswith("{") and "}" in rest:
            name, _, rest = rest[1:].partition("}")
        else:
            length = next(
                (i for i, char in enumerate(rest) if not (char.isalnum() or char == "_")),
                len(rest),
            )
            name, rest = rest[:length], rest[length:]
        result.append(variables.get(name, ""))
    return "".join(result)


def absolute(text: str, key: str) -> Path:
    """A path that must be absolute; raises ``ConfigError``."""
    if not text.startswith("/"):
        raise ConfigError("is no absolute path", subject=f"{key} = {text!r}")
    return clean(text)


def clean(text: str) -> Path:
    """An absolute path without "." and ".." and doubled slashes."""
    return Path("/" + os.path.normpath(text).lstrip("/"))
