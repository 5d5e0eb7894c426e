"""JSON that decides about security: nothing in it may be overlooked.

An object with a key that is not known, or that stands there twice, is an error, as are
numbers that JSON does not have (containers/image "signature/internal/json.go").
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NoReturn


class NotStrict(ValueError):
    """What is wrong with the text, as one sentence."""


def decode(raw: bytes) -> Any:
    """Decode UTF-8 JSON; raises ``NotStrict``."""
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except NotStrict:
        raise
    except (ValueError, RecursionError) as error:
        raise NotStrict(f"no JSON: {error}") from error


def members(
    value: Any, what: str, required: Collection[str], optional: Collection[str] = ()
) -> dict[str, Any]:
    """The members of an object that has all ``required`` and no unknown ones."""
    if not isinstance(value, dict):
        raise NotStrict(f"{what} is no object")
    for key in required:
        if key not in value:
            raise NotStrict(f"{what} has no {key!r}")
    for key in value:
        if key not in required and key not in optional:
            raise NotStrict(f"{what} has an unknown key {key!r}")
    return value


def text(value: Any, what: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise NotStrict(f"{what} is no string")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise NotStrict(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def _no_constant(word: str) -> NoReturn:
    raise NotStrict(f"{word} is no number of JSON")
