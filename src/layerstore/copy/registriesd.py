"""Where signatures of images are kept: the files of registries.d.

containers-registries.d(5).  Of ``*.yaml`` in the user's directory, or in the machine's if he
has none::

    default-docker:
      lookaside: file:///var/lib/containers/sigstore
    docker:
      registry.example/namespace:
        lookaside: https://signatures.example/
        lookaside-staging: file:///srv/signatures

The most specific scope with an address decides; ``sigstore`` is the older word for
``lookaside``.  Only the YAML that such files are written in is read: nested block mappings
of plain or quoted scalars.  Anything else is an error, because a guess could miss the
signatures that a policy demands.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from layerstore import limits
from layerstore.copy.policy import scopes_of
from layerstore.errors import ConfigError
from layerstore.image import Reference

_READ: Final = ("lookaside", "sigstore")
_KEYS: Final = (*_READ, "lookaside-staging", "sigstore-staging", "use-sigstore-attachments")
# A scalar without quotes: begins with no sign of YAML's, holds neither ``: `` nor `` #``.
_PLAIN: Final = re.compile(r"[^\s\"'#&*!|>%@`{}\[\],?:-](?:[^\s:#]|[:#](?=\S)|[ ](?!#))*")
_QUOTED: Final = re.compile(r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')""")
_AFTER_KEY: Final = re.compile(r"\s*:(?:\s+|$)")
_COMMENT: Final = re.compile(r"(?:^|\s)#.*")
_NOTHING: Final = ("", "~", "null", "{}")


@dataclass(frozen=True, slots=True)
class RegistriesD:
    """The merged files: the address for reading signatures by scope, and the default one."""

    scopes: Mapping[str, str] = field(default_factory=dict)
    default: str = ""

    @classmethod
    def from_system(cls, home: Path | None, etc: Path = Path("/etc")) -> Self:
        """Read the user's directory, else the machine's; raises ``ConfigError``."""
        user = None if home is None else home / ".config/containers/registries.d"
        if user is not None and user.is_dir():
            return cls.load(user)
        return cls.load(etc / "containers/registries.d")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the ``*.yaml`` files of a directory that need not exist; raises ``ConfigError``."""
        try:
            names = sorted(name for name in os.listdir(directory) if name.endswith(".yaml"))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ConfigError(
                f"cannot be read: {error.strerror}", subject=str(directory)
            ) from error
        scopes: dict[str, str] = {}
        default: str | None = None
        for name in names:
            path = directory / name
            try:
                found, own_default = _parse(_read(path))
            except ConfigError as error:
                error.subject = error.subject or str(path)
                raise
            if own_default is not None and default is not None:
                raise ConfigError("default-docker stands in an earlier file too", subject=str(path))
            if doubled := scopes.keys() & found.keys():
                raise ConfigError(
                    f"{sorted(doubled)[0]!r} stands in an earlier file too", subject=str(path)
                )
            default = own_default if default is None else default
            scopes |= found
        return cls(scopes, default or "")

    def lookaside(self, reference: Reference) -> str:
        """The address under which signatures of ``reference`` are; "" if none is configured."""
        for scope in scopes_of("docker", reference):
            if address := self.scopes.get(scope):
                return address
        return self.default


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(limits.POLICY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", subject=str(path)) from error
    if len(raw) > limits.POLICY_BYTES:
        raise ConfigError("too large for a file of registries.d", subject=str(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8", subject=str(path)) from error


def _parse(text: str) -> tuple[dict[str, str], str | None]:
    """The addresses by scope, and that of ``default-docker`` (None if it is not there)."""
    top = mapping(text)
    for key in top:
        if key not in ("default-docker", "docker"):
            raise ConfigError(f"the key {key!r} is not known")
    scopes = {scope: _address(scope, each) for scope, each in _object(top, "docker").items()}
    default = _address("default-docker", top["default-docker"]) if "default-docker" in top else None
    return scopes, default


def _object(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key!r} is no mapping")
    return value


def _address(scope: str, value: Any) -> str:
    settings = _object({scope: value}, scope)
    for key, setting in settings.items():
        if key not in _KEYS:
            raise ConfigError(f"{scope!r} has a key {key!r} that is not known")
        if setting is not None and not isinstance(setting, str):
            raise ConfigError(f"{scope!r}: {key!r} is no text")
    return next((settings[key] for key in _READ if settings.get(key)), "")


# -- a little YAML --------------------------------------------------------------------


def mapping(text: str) -> dict[str, Any]:
    """Block mappings of scalars, nested; scalars are texts, or None where there is nothing.

    Raises ``ConfigError`` for any other YAML.
    """
    top: dict[str, Any] = {}
    levels: list[tuple[int, dict[str, Any]]] = [(0, top)]  # open mappings and their indents
    last: tuple[int, dict[str, Any], str] | None = None  # an entry that may still get a mapping
    for number, line in enumerate(text.splitlines(), 1):
        content = line.lstrip(" ")
        if not content.strip() or content.startswith("#") or (number == 1 and content == "---"):
            continue
        indent = len(line) - len(content)
        key, value = _entry(content.rstrip(), number)
        if last is not None and indent > last[0]:
            child: dict[str, Any] = {}
            last[1][last[2]] = child
            levels.append((indent, child))
        while levels and levels[-1][0] != indent:
            levels.pop()
        if not levels:
            raise ConfigError(f"line {number} is indented like nothing above it")
        current = levels[-1][1]
        if key in current:
            raise ConfigError(f"line {number}: the key {key!r} stands there twice")
        current[key] = value
        last = (indent, current, key) if value is None else None
    return top


def _entry(content: str, number: int) -> tuple[str, str | None]:
    quoted = _QUOTED.match(content)
    if quoted is not None:
        colon = _AFTER_KEY.match(content, quoted.end())
        key = quoted.group()
    else:
        colon = re.search(r":(?:\s+|$)", content)
        key = content[: colon.start()] if colon is not None else ""
    if colon is None or not key:
        raise ConfigError(f"line {number} is no KEY: VALUE of simple YAML")
    return _scalar(key, number) or "", _scalar(content[colon.end() :], number)


def _scalar(text: str, number: int) -> str | None:
    quoted = _QUOTED.match(text)
    end = quoted.end() if quoted is not None else 0
    text = text[:end] + _COMMENT.sub("", text[end:]).strip()
    if text in _NOTHING:
        return None
    if len(text) == end:
        if text[0] == "'":
            return text[1:-1].replace("''", "'")
        try:
            return str(json.loads(text))
        except ValueError:
            end = -1  # an escape that JSON does not have
    if end or _PLAIN.fullmatch(text) is None:
        raise ConfigError(f"line {number}: {text[:80]!r} is no simple text")
    return text
