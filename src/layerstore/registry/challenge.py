"""What a registry wants from a client: the ``WWW-Authenticate`` header.

RFC 9110 section 11.6.1: one field value may hold several challenges, parameters
are tokens or quoted strings, and commas separate both challenges and
parameters.  Registries send ``Basic realm=...`` or
``Bearer realm=...,service=...,scope=...`` (distribution token specification).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER: Final = re.compile(rf'({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_SCHEME: Final = re.compile(rf"({_WORD})(?=[\s,]|$)")
_SEPARATORS: Final = re.compile(r"[\s,]+")
_ESCAPE: Final = re.compile(r"\\(.)")
_HEADER_CHARS: Final = 16 * 1024


class Challenge(msgspec.Struct, frozen=True):
    """One challenge: ``scheme`` in lower case, parameter names in lower case."""

    scheme: str
    parameters: dict[str, str] = msgspec.field(default_factory=dict)


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Read the header's values; what cannot be understood is left out."""
    return [challenge for value in values for challenge in _challenges(value[:_HEADER_CHARS])]


def _challenges(text: str) -> Iterator[Challenge]:
    current: Challenge | None = None
    position = 0
    while position < len(text):
        if separators := _SEPARATORS.match(text, position):
            position = separators.end()
        elif parameter := _PARAMETER.match(text, position):
            if current is not None:
                name, quoted, plain = parameter.groups()
                value = plain if quoted is None else _ESCAPE.sub(r"\1", quoted)
                current.parameters.setdefault(name.lower(), value)
            position = parameter.end()
        elif scheme := _SCHEME.match(text, position):
            if current is not None:
                yield current
            current = Challenge(scheme.group(1).lower())
            position = scheme.end()
        else:  # noise, or a token68 credential: skip to the next separator
            following = _SEPARATORS.search(text, position)
            position = following.start() if following else len(text)
    if current is not None:
        yield current


def choose(challenges: Iterable[Challenge]) -> Challenge | None:
    """The challenge to answer: Bearer with a realm, else Basic, else None."""
    found = list(challenges)
    for challenge in found:
        if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
            return challenge
    return next((challenge for challenge in found if challenge.scheme == "basic"), None)
