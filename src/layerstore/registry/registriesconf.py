"""Which hosts serve a reference: registries.conf, version 2.

containers-registries.conf(5).  A ``[[registry]]`` table is chosen by the longest
``prefix``; it may rewrite the location, forbid it, allow HTTP, and list mirrors.
The logical name a user wrote never changes; what comes out here are the physical
places to ask, mirrors first.  The old version 1 tables are understood alone.
What the files say of short names and of credentials is kept for ``shortnames``,
``credentials`` and ``alsauthhelper``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

from layerstore import limits
from layerstore.errors import ConfigError, InvalidReference
from layerstore.image import Reference

_SEPARATORS: Final = ("/", ":", "@")
AUTH_FILES_HELPER: Final = "containers-auth.json"  # the word for the auth files themselves

ShortNameMode = Literal["enforcing", "permissive", "disabled"]


class Mirror(msgspec.Struct, frozen=True, rename="kebab"):
    """One ``[[registry.mirror]]``."""

    location: str
    insecure: bool = False
    pull_from_mirror: Literal["", "all", "digest-only", "tag-only"] = ""


class Registry(msgspec.Struct, frozen=True, rename="kebab", kw_only=True):
    """One ``[[registry]]``; ``prefix`` and ``location`` are filled in and normalised."""

    prefix: str = ""
    location: str = ""
    insecure: bool = False
    blocked: bool = False
    mirror_by_digest_only: bool = False
    mirror: tuple[Mirror, ...] = ()


class _V1Table(msgspec.Struct, frozen=True):
    registries: tuple[str, ...] = ()


class _V1(msgspec.Struct, frozen=True):
    search: _V1Table = _V1Table()
    insecure: _V1Table = _V1Table()
    block: _V1Table = _V1Table()


class _File(msgspec.Struct, rename="kebab"):
    registry: tuple[Registry, ...] = ()
    unqualified_search_registries: tuple[str, ...] | None = None
    registries: _V1 | None = None
    short_name_mode: str = ""
    credential_helpers: tuple[str, ...] | None = None
    additional_layer_store_auth_helper: str = ""
    aliases: dict[str, str] = {}


class Endpoint(msgspec.Struct, frozen=True):
    """One physical place to ask for a reference.

    ``host`` is the host as written (``docker.io``, not its API host), ``path``
    the repository there.  ``physical`` is the rewritten ``host/path``, under
    which credentials are looked up.
    """

    host: str
    path: str
    insecure: bool = False
    mirror: bool = False

    @property
    def physical(self) -> str:
        """``host/path``."""
        return f"{self.host}/{self.path}"


class RegistriesConf(msgspec.Struct, frozen=True):
    """The merged configuration.

    ``search`` are the hosts for short names in order, ``search_file`` the file
    that says so.  ``aliases`` lead from short names to repositories, or to
    ``""`` where a later file took the alias away.  ``credential_helpers`` are
    asked in order; ``auth_helper`` is the program that hands credentials to an
    additional layer store, ``""`` for none.
    """

    registries: tuple[Registry, ...] = ()
    search: tuple[str, ...] = ()
    search_file: Path | None = None
    short_name_mode: ShortNameMode = "permissive"
    aliases: Mapping[str, str] = msgspec.field(default_factory=dict)
    credential_helpers: tuple[str, ...] = (AUTH_FILES_HELPER,)
    auth_helper: str = ""

    def find(self, reference: Reference) -> Registry | None:
        """The table for a reference: the one with the longest matching prefix."""
        text = str(reference)
        matching = [
            entry for entry in self.registries if match_prefix(entry.prefix, text) is not None
        ]
        return max(matching, key=lambda entry: len(entry.prefix), default=None)

    def endpoints(
        self, reference: Reference, *, digested: bool | None = None
    ) -> tuple[Endpoint, ...]:
        """Where to read ``reference`` from, in order, the primary last.

        ``digested`` says whether the request will be by digest, which some
        mirrors are restricted to; by default the reference decides.
        Raises ``ConfigError`` if every place is blocked or a rewritten name is
        no reference.
        """
        entry = self.find(reference)
        if entry is None:
            return (Endpoint(reference.domain, reference.path),)
        by_digest = reference.digest is not None if digested is None else digested
        text = str(reference)
        consumed = match_prefix(entry.prefix, text) or 0
        rest = text[consumed:]
        places = [
            self._endpoint(mirror.location + rest, mirror.insecure, mirror=True)
            for mirror in entry.mirror
            if _applies(entry, mirror, digested=by_digest)
        ]
        primary = entry.location + rest if entry.location else text
        places.append(self._endpoint(primary, entry.insecure, mirror=False))
        allowed = tuple(place for place in places if place is not None)
        if not allowed:
            raise ConfigError("registry is blocked in registries.conf", subject=str(reference))
        return allowed

    def push_endpoint(self, reference: Reference) -> Endpoint:
        """Where to write ``reference`` to: neither mirrors nor rewriting apply."""
        endpoint = self._endpoint(str(reference), self._insecure(reference), mirror=False)
        if endpoint is None:
            raise ConfigError("registry is blocked in registries.conf", subject=str(reference))
        return endpoint

    def _insecure(self, reference: Reference) -> bool:
        entry = self.find(reference)
        return entry is not None and entry.insecure

    def _endpoint(self, text: str, insecure: bool, *, mirror: bool) -> Endpoint | None:
        try:
            physical = Reference.parse(text)
        except InvalidReference as error:
            raise ConfigError(
                f"registries.conf rewrites the reference to {text!r}, which is none"
            ) from error
        if physical.domain != text.partition("/")[0]:
            raise ConfigError(f"registries.conf rewrites the reference to {text!r}: no registry")
        # `blocked` concerns the place that is contacted, not the logical name.
        entry = self.find(physical)
        if entry is not None and entry.blocked:
            return None
        return Endpoint(physical.domain, physical.path, insecure, mirror)


def _applies(entry: Registry, mirror: Mirror, *, digested: bool) -> bool:
    if entry.mirror_by_digest_only or mirror.pull_from_mirror == "digest-only":
        return digested
    if mirror.pull_from_mirror == "tag-only":
        return not digested
    return True


def match_prefix(prefix: str, text: str) -> int | None:
    """How many characters of ``text`` the prefix covers, None if it does not match."""
    if prefix.startswith("*."):
        host = text.partition("/")[0]
        name = host.partition(":")[0]
        return len(name) if name.endswith(prefix[1:]) and len(name) >= len(prefix) else None
    if text == prefix or (text.startswith(prefix) and text[len(prefix)] in _SEPARATORS):
        return len(prefix)
    return None


def is_prefix(text: str) -> bool:
    """Whether there are references that `match_prefix` would match with it."""
    if text.startswith("*."):
        host, path = f"any{text[1:]}", ""
        if not {"/", ":", "@"}.isdisjoint(text):
            return False
    else:
        host, _, path = text.partition("/")
    try:
        reference = Reference.parse(text if path else f"{host}/any")
    except InvalidReference:
        return False
    return reference.domain == host and (bool(path) or "/" not in text)


def load(
    main: Path | None, dropins: Iterable[Path] = (), *, required: bool = False
) -> RegistriesConf:
    """Read the main file and the ``*.conf`` files of the drop-in directories, in that order.

    A missing main file is an empty configuration unless ``required``.  Raises
    ``ConfigError``.
    """
    paths = [] if main is None else [main]
    if main is not None and required and not main.exists():
        raise ConfigError("registries.conf does not exist", subject=str(main))
    for directory in dropins:
        try:
            names = sorted(name for name in os.listdir(directory) if name.endswith(".conf"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError(
                f"cannot be read: {error.strerror}", subject=str(directory)
            ) from error
        paths.extend(directory / name for name in names)
    conf = RegistriesConf()
    for path in paths:
        content = _read(path)
        if content is not None:
            conf = _merged(conf, content, path)
    _refuse_conflicts(conf.registries)
    return conf


def _merged(conf: RegistriesConf, content: _File, path: Path) -> RegistriesConf:
    """What a later file adds or replaces."""
    tables = {entry.prefix: entry for entry in (*conf.registries, *content.registry)}
    search = content.unqualified_search_registries
    helpers = conf.credential_helpers
    if content.credential_helpers is not None:
        helpers = content.credential_helpers or (AUTH_FILES_HELPER,)
    return RegistriesConf(
        registries=tuple(tables.values()),
        search=conf.search if search is None else search,
        search_file=conf.search_file if search is None else path,
        short_name_mode=_mode(content.short_name_mode) or conf.short_name_mode,
        aliases={**conf.aliases, **content.aliases},
        credential_helpers=helpers,
        auth_helper=content.additional_layer_store_auth_helper or conf.auth_helper,
    )


def _mode(text: str) -> ShortNameMode | None:
    for mode in get_args(ShortNameMode):
        if text == mode:
            found: ShortNameMode = mode
            return found
    if text:
        raise ConfigError(
            f"short-name-mode {text!r} is none of {', '.join(get_args(ShortNameMode))}"
        )
    return None


def system_files(
    env: Mapping[str, str], home: Path | None, etc: Path = Path("/etc/containers")
) -> tuple[Path, tuple[Path, ...], bool]:
    """Main file, drop-in directories and whether the main file must exist."""
    user = None
    if config := env.get("XDG_CONFIG_HOME"):
        user = Path(config) / "containers"
    elif home is not None:
        user = home / ".config/containers"
    name, directory = "registries.conf", "registries.conf.d"
    both = (etc / directory,) if user is None else (etc / directory, user / directory)
    if explicit := env.get("CONTAINERS_REGISTRIES_CONF"):
        return Path(explicit), both, True
    if user is not None and (user / name).exists():
        return user / name, (user / directory,), False
    return etc / name, both, False


def _read(path: Path) -> _File | None:
    try:
        with path.open("rb") as stream:
            raw = stream.read(limits.CONFIG_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", subject=str(path)) from error
    if len(raw) > limits.CONFIG_FILE_BYTES:
        raise ConfigError("too large for a registries.conf", subject=str(path))
    try:
        return parse(raw.decode("utf-8"))
    except (UnicodeDecodeError, ConfigError) as error:
        what = error.what if isinstance(error, ConfigError) else "not UTF-8"
        raise ConfigError(what, subject=str(path)) from error


def parse(text: str) -> _File:
    """Read one file's text into normalised tables; raises ``ConfigError``."""
    try:
        document: dict[str, Any] = tomllib.loads(text)
        content = msgspec.convert(document, _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"not a registries.conf: {error}") from error
    if content.registries is not None:
        if content.registry or content.unqualified_search_registries is not None:
            raise ConfigError("tables of version 1 and version 2 are mixed")
        return _from_v1(content.registries)
    _mode(content.short_name_mode)
    content.registry = tuple(map(_normalised, content.registry))
    content.aliases = dict(map(parse_alias, content.aliases.items()))
    return content


def load_aliases(path: Path) -> Mapping[str, str]:
    """The ``[aliases]`` of a short-name-aliases.conf; a missing file has none.

    Raises ``ConfigError``.
    """
    content = _read(path)
    return {} if content is None else content.aliases


def parse_alias(pair: tuple[str, str]) -> tuple[str, str]:
    """Check a short name and the full name it stands for, which is normalised."""
    name, value = pair
    if is_host(name.partition("/")[0], name) or not _is_repository(f"host.example/{name}"):
        raise ConfigError(f"alias {name!r}: no short name without registry, tag and digest")
    if not value:
        return name, ""
    if not is_host(value.partition("/")[0], value) or not _is_repository(value):
        raise ConfigError(f"alias {name!r}: {value!r} is no full name without tag and digest")
    return name, Reference.parse(value).name


def is_host(first: str, text: str) -> bool:
    """Whether the part of ``text`` before its first ``/`` names a registry, by c/image's rule."""
    return first != text and ("." in first or ":" in first or first == "localhost")


def _is_repository(text: str) -> bool:
    try:
        reference = Reference.parse(text)
    except InvalidReference:
        return False
    return "@" not in text and ":" not in text.partition("/")[2] and bool(reference.path)


def _from_v1(old: _V1) -> _File:
    names = dict.fromkeys((*old.insecure.registries, *old.block.registries))
    entries = tuple(
        _normalised(
            Registry(
                location=name,
                insecure=name in old.insecure.registries,
                blocked=name in old.block.registries,
            )
        )
        for name in names
    )
    return _File(entries, old.search.registries)


def _normalised(entry: Registry) -> Registry:
    location = _location(entry.location)
    prefix = _location(entry.prefix) or location
    if not prefix:
        raise ConfigError("a [[registry]] needs a prefix or a location")
    if prefix.startswith("*."):
        if "/" in prefix or ":" in prefix or "@" in prefix:
            raise ConfigError(f"prefix {prefix!r}: a wildcard stands for a host only")
    elif not location:
        raise ConfigError(f"prefix {prefix!r}: only a wildcard may have no location")
    mirrors = []
    for mirror in entry.mirror:
        if not (place := _location(mirror.location)):
            raise ConfigError(f"prefix {prefix!r}: a mirror needs a location")
        if entry.mirror_by_digest_only and mirror.pull_from_mirror:
            raise ConfigError(
                f"prefix {prefix!r}: pull-from-mirror and mirror-by-digest-only exclude each other"
            )
        mirrors.append(Mirror(place, mirror.insecure, mirror.pull_from_mirror))
    return Registry(
        prefix=prefix,
        location=location,
        insecure=entry.insecure,
        blocked=entry.blocked,
        mirror_by_digest_only=entry.mirror_by_digest_only,
        mirror=tuple(mirrors),
    )


def _location(text: str) -> str:
    if "://" in text:
        raise ConfigError(f"location {text!r}: a location has no scheme such as http://")
    return text.strip().rstrip("/")


def _refuse_conflicts(registries: tuple[Registry, ...]) -> None:
    seen: dict[str, Registry] = {}
    for entry in registries:
        if not entry.location:
            continue
        other = seen.setdefault(entry.location, entry)
        if (other.insecure, other.blocked) != (entry.insecure, entry.blocked):
            raise ConfigError(
                f"location {entry.location!r} has two entries that disagree on insecure or blocked"
            )
