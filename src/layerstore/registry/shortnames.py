"""What a short name such as ``alpine`` may stand for.

containers-registries.conf(5), "SHORT-NAME ALIASING", and containers/image
"pkg/shortnames".  A name is short if the part before its first slash has neither a dot
nor a port and is not ``localhost``.  Aliases come first: those a user chose at Podman's
prompt (``short-name-aliases.conf``), then ``[aliases]`` of registries.conf.  Without one,
every host of ``unqualified-search-registries`` is a candidate, in that order.

More than one candidate is ambiguous.  Podman asks its user on a terminal; off one, mode
``permissive`` tries all and ``enforcing`` gives up, and so do we everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from layerstore.errors import ConfigError, UsageError
from layerstore.image import Reference
from layerstore.registry.registriesconf import RegistriesConf, is_host, load_aliases

_FILE: Final = "containers/short-name-aliases.conf"


def is_short(text: str) -> bool:
    """Whether ``text`` names no registry."""
    return not is_host(text.partition("/")[0], text)


def alias_file(env: Mapping[str, str], home: Path | None, uid: int) -> Path | None:
    """Where Podman keeps the aliases of this user; None without a home."""
    if uid == 0:
        return Path("/var/cache") / _FILE
    if cache := env.get("XDG_CACHE_HOME"):
        return Path(cache) / _FILE
    return None if home is None else home / ".cache" / _FILE


def candidates(
    text: str, registries: RegistriesConf, alias_files: Iterable[Path] = ()
) -> tuple[Reference, ...]:
    """The references to try for ``text``, in order; one for a full name.

    Of a tag and a digest together only the digest counts.  ``alias_files`` are such as
    ``alias_file`` names; the first that knows the name decides.  Raises
    ``InvalidReference``, ``ConfigError`` for a broken alias file, and ``UsageError`` if
    nothing is known of the name or it is ambiguous in mode ``enforcing``.
    """
    if not is_short(text):
        return (_pinned(text),)
    Reference.parse(text)  # what is no reference at all is told so
    repository, suffix = _split(text)
    if full := _alias(repository, registries, alias_files):
        return (_pinned(full + suffix),)
    if not registries.search:
        place = registries.search_file
        where = f" in {place}" if place is not None else ""
        raise UsageError(
            f"the short name has no alias and no unqualified-search-registries are defined{where}",
            subject=text,
            advice="write the registry's name too, such as docker.io/library/alpine",
        )
    found = tuple(dict.fromkeys(_searched(host, text) for host in registries.search))
    if len(found) > 1 and registries.short_name_mode == "enforcing":
        listed = ", ".join(map(str, found))
        raise UsageError(
            f"short-name-mode is enforcing, and the name may mean any of {listed}",
            subject=text,
            advice="write the full name or configure an alias",
        )
    return found


def _alias(repository: str, registries: RegistriesConf, alias_files: Iterable[Path]) -> str | None:
    """The full name, None or ``""`` without one."""
    for path in alias_files:
        chosen = load_aliases(path).get(repository)
        if chosen is not None:
            return chosen
    return registries.aliases.get(repository)


def _split(text: str) -> tuple[str, str]:
    """Repository, and tag and digest with their separators."""
    name, at, digest = text.partition("@")
    repository, colon, tag = name.partition(":")
    return repository, f"{colon}{tag}{at}{digest}"


def _searched(host: str, text: str) -> Reference:
    if not is_host(host.rstrip("/").partition("/")[0], f"{host}/"):
        raise ConfigError(f"unqualified-search-registries: {host!r} is no registry")
    return _pinned(f"{host.rstrip('/')}/{text}")


def _pinned(text: str) -> Reference:
    reference = Reference.parse(text)
    return reference if reference.digest is None else reference.with_digest(reference.digest)
