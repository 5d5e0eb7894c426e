"""What the graph root says about a layer, an image, a container: one JSON object each.

``layers.json``, ``images.json`` and ``containers.json`` are arrays of these objects, written by
Go's ``json.Marshal`` from the structs of containers/storage.  The order of the keys is the order
of the struct; a key is left out when its value is zero ("omitempty"), except ``id`` and
``created`` and a container's ``image`` and ``layer``; keys of maps are sorted.  What we read and
write again is byte for byte the same (``dumps``).

Other tools drop keys they do not know whenever they rewrite a file.  We keep them, in ``extra``;
they follow the known keys.  A digest of an algorithm we do not compute is kept there too, so that
it survives without ever being compared or becoming a part of a path.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol, Self

from layerstore.errors import CorruptStorage, InvalidDigest
from layerstore.image import Digest

ZERO_TIME: Final = "0001-01-01T00:00:00Z"  # Go's zero time: "unknown"
INCOMPLETE: Final = "incomplete"  # flag of a layer whose content is not all there
EXPECTED_DIFF_ID: Final = "expected-layer-diffid"  # flag: diff ID by the config, not verified

_RFC3339: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?([Zz]|[+-]\d\d:\d\d)"
)
_SECOND: Final = 1_000_000_000  # in nanoseconds
# The calendar repeats itself after 400 years: ``datetime`` has the years 1 to 9999 only, and a
# zone can lead out of them.
_CYCLE: Final = 146_097 * 86_400  # in seconds
_EPOCH_2000: Final = 946_684_800  # 2000-01-01 in seconds since 1970
# Go escapes these for the sake of HTML and JavaScript.
_GO_ESCAPES: Final = {
    ord(char): f"\\u{ord(char):04x}" for char in ("<", ">", "&", "\u2028", "\u2029")
}
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class IdMap(NamedTuple):
    """``size`` ids from ``container_id`` on are ``host_id`` and following outside."""

    container_id: int
    host_id: int
    size: int


class _Wrong(Exception):
    """A value of another JSON type than the key has."""


class _Kind(NamedTuple):
    """How a JSON value becomes a field and back."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


class _Key(NamedTuple):
    """One key of a record: its name in JSON, its field, and whether it is written when zero."""

    name: str
    attribute: str
    kind: _Kind
    always: bool = False


class Record(Protocol):
    """What the three kinds of records share."""

    @property
    def id(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def extra(self) -> Mapping[str, Any]: ...
    @classmethod
    def from_json(cls, obj: Any) -> Self: ...
    def to_json(self) -> dict[str, Any]: ...


# -- JSON types ----------------------------------------------------------------------


def _same(value: Any) -> Any:
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong("a string")
    return value


def _id(value: Any) -> str:
    # It becomes a name in directories.
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\0" in value:
        raise _Wrong("an id")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Wrong("a whole number")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Wrong("an array")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong("an object")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in _list(value))


def _ids(value: Any) -> tuple[str, ...]:
    return tuple(_id(item) for item in _list(value))


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_number(item) for item in _list(value))


def _parent(value: Any) -> str:
    return _id(value) if value != "" else ""


def _digest(value: Any) -> Digest | None:
    text = _text(value)
    return Digest.parse(text) if text else None


def _time(value: Any) -> str:
    text = _text(value)
    if _RFC3339.fullmatch(text) is None:
        raise _Wrong("a time")
    return text


def _maps(value: Any) -> tuple[IdMap, ...]:
    return tuple(
        IdMap(*(_number(_object(item).get(name, 0)) for name in IdMap._fields))
        for item in _list(value)
    )


def _sizes(value: Any) -> dict[str, int]:
    return {name: _number(size) for name, size in _object(value).items()}


def _digests(value: Any) -> dict[str, Digest]:
    try:
        return {name: Digest.parse(_text(text)) for name, text in _object(value).items()}
    except InvalidDigest:
        raise _Wrong("a map of digests") from None


def _sorted(value: Any) -> Any:
    """Maps with sorted keys at every depth, as Go writes them (order of the UTF-8 bytes)."""
    if isinstance(value, Mapping):
        return {name: _sorted(value[name]) for name in sorted(value, key=_utf8)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


_TEXT: Final = _Kind(_text, _same)
_ID: Final = _Kind(_id, _same)
_PARENT: Final = _Kind(_parent, _same)
_TEXTS: Final = _Kind(_texts, list)
_IDS: Final = _Kind(_ids, list)
_NUMBER: Final = _Kind(_number, _same)
_NUMBERS: Final = _Kind(_numbers, list)
_DIGEST: Final = _Kind(_digest, _same)
_TIME: Final = _Kind(_time, _same)
_FLAGS: Final = _Kind(_object, _sorted)
_MAPS: Final = _Kind(_maps, lambda maps: [IdMap._asdict(item) for item in maps])
_SIZES: Final = _Kind(_sizes, _sorted)
_DIGESTS: Final = _Kind(_digests, _sorted)


def _read(keys: tuple[_Key, ...], obj: Any, what: str) -> dict[str, Any]:
    if not isinstance(obj, dict):
        raise CorruptStorage(f"a {what} record is not a JSON object")
    subject = f"{what} {obj.get('id')!r}"
    rest = dict(obj)
    found: dict[str, Any] = {}
    for key in keys:
        value = rest.pop(key.name, None)
        if value is None:
            if key.attribute == "id":
                raise CorruptStorage(f"a {what} record has no id")
            continue  # absent or null: Go leaves the zero value
        try:
            found[key.attribute] = key.kind.read(value)
        except InvalidDigest:
            rest[key.name] = value
        except _Wrong as wrong:
            raise CorruptStorage(f"{key.name!r} is not {wrong}", subject=subject) from None
    found["extra"] = rest
    return found


def _write(keys: tuple[_Key, ...], record: Any) -> dict[str, Any]:
    extra = dict(record.extra)
    written: dict[str, Any] = {}
    for key in keys:
        kept = extra.pop(key.name, None)  # a digest that we could not parse
        value = getattr(record, key.attribute)
        if value or key.always:
            written[key.name] = key.kind.write(value)
        elif kept is not None:
            written[key.name] = kept
    written.update(extra)
    return written


# -- the records ---------------------------------------------------------------------

_LAYER: Final = (
    _Key("id", "id", _ID, always=True),
    _Key("names", "names", _TEXTS),
    _Key("parent", "parent", _PARENT),
    _Key("metadata", "metadata", _TEXT),
    _Key("mountlabel", "mount_label", _TEXT),
    _Key("created", "created", _TIME, always=True),
    _Key("compressed-diff-digest", "compressed_diff_digest", _DIGEST),
    _Key("compressed-size", "compressed_size", _NUMBER),
    _Key("diff-digest", "diff_digest", _DIGEST),
    _Key("toc-digest", "toc_digest", _DIGEST),
    _Key("diff-size", "diff_size", _NUMBER),
    _Key("compression", "compression", _NUMBER),
    _Key("uidset", "uids", _NUMBERS),
    _Key("gidset", "gids", _NUMBERS),
    _Key("flags", "flags", _FLAGS),
    _Key("uidmap", "uid_map", _MAPS),
    _Key("gidmap", "gid_map", _MAPS),
    _Key("big-data-names", "big_data_names", _TEXTS),
)
_IMAGE: Final = (
    _Key("id", "id", _ID, always=True),
    _Key("digest", "digest", _DIGEST),
    _Key("names", "names", _TEXTS),
    _Key("names-history", "names_history", _TEXTS),
    _Key("layer", "layer", _PARENT),
    _Key("mapped-layers", "mapped_layers", _IDS),
    _Key("metadata", "metadata", _TEXT),
    _Key("big-data-names", "big_data_names", _TEXTS),
    _Key("big-data-sizes", "big_data_sizes", _SIZES),
    _Key("big-data-digests", "big_data_digests", _DIGESTS),
    _Key("created", "created", _TIME, always=True),
    _Key("flags", "flags", _FLAGS),
)
_CONTAINER: Final = (
    _Key("id", "id", _ID, always=True),
    _Key("names", "names", _TEXTS),
    _Key("image", "image", _PARENT, always=True),
    _Key("layer", "layer", _PARENT, always=True),
    _Key("metadata", "metadata", _TEXT),
    _Key("big-data-names", "big_data_names", _TEXTS),
    _Key("big-data-sizes", "big_data_sizes", _SIZES),
    _Key("big-data-digests", "big_data_digests", _DIGESTS),
    _Key("created", "created", _TIME, always=True),
    _Key("uidmap", "uid_map", _MAPS),
    _Key("gidmap", "gid_map", _MAPS),
    _Key("flags", "flags", _FLAGS),
)


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One layer.  Sizes are bytes; ``diff_size`` -1 means unknown (TOC-identified layers only).

    ``compressed_diff_digest`` and ``compressed_size`` are of the blob as it came, ``diff_digest``
    and ``diff_size`` of the uncompressed tar.  ``compression``: 0 none, 1 bzip2, 2 gzip, 3 xz,
    4 zstd.  ``volatile`` is not a key: it says in which of the two files the record stands.
    """

    id: str
    names: tuple[str, ...] = ()
    parent: str = ""
    metadata: str = ""
    mount_label: str = ""
    created: str = ZERO_TIME
    compressed_diff_digest: Digest | None = None
    compressed_size: int = 0
    diff_digest: Digest | None = None
    toc_digest: Digest | None = None
    diff_size: int = 0
    compression: int = 0
    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict, hash=False)
    uid_map: tuple[IdMap, ...] = ()
    gid_map: tuple[IdMap, ...] = ()
    big_data_names: tuple[str, ...] = ()
    volatile: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def incomplete(self) -> bool:
        """Whether the content is still being written, or was when its writer died."""
        return self.flags.get(INCOMPLETE) is True

    @property
    def expected_diff_id(self) -> Digest | None:
        """The diff ID that the image's config announced and nobody has verified."""
        value = self.flags.get(EXPECTED_DIFF_ID)
        try:
            return Digest.parse(value) if isinstance(value, str) else None
        except InvalidDigest:
            return None

    @classmethod
    def from_json(cls, obj: Any) -> Self:
        """Raises ``CorruptStorage`` for keys of a wrong type."""
        return cls(**_read(_LAYER, obj, "layer"))

    def to_json(self) -> dict[str, Any]:
        """The object in the order of keys that Go writes."""
        return _write(_LAYER, self)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image.  ``layer`` is the id of its top layer ("" for none).

    ``digest`` is that of its manifest, or of the index through which that was chosen:
    containers/storage takes the first one that was stored.

    ``metadata`` is itself JSON (sizes of signatures).  ``names_history`` has the newest first.
    """

    id: str
    digest: Digest | None = None
    names: tuple[str, ...] = ()
    names_history: tuple[str, ...] = ()
    layer: str = ""
    mapped_layers: tuple[str, ...] = ()
    metadata: str = ""
    big_data_names: tuple[str, ...] = ()
    big_data_sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    big_data_digests: Mapping[str, Digest] = field(default_factory=dict, hash=False)
    created: str = ZERO_TIME
    flags: Mapping[str, Any] = field(default_factory=dict, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def manifest_digest(self) -> Digest | None:
        """The digest of its manifest, which is stored as ``manifest``."""
        return self.big_data_digests.get("manifest", self.digest)

    @property
    def digests(self) -> tuple[Digest, ...]:
        """Every manifest digest by which the image may be asked for, its own first."""
        found = [self.digest] if self.digest is not None else []
        found += [
            self.big_data_digests[name]
            for name in self.big_data_names
            if name.startswith("manifest") and name in self.big_data_digests
        ]
        return tuple(dict.fromkeys(found))

    @classmethod
    def from_json(cls, obj: Any) -> Self:
        """Raises ``CorruptStorage`` for keys of a wrong type."""
        return cls(**_read(_IMAGE, obj, "image"))

    def to_json(self) -> dict[str, Any]:
        """The object in the order of keys that Go writes."""
        return _write(_IMAGE, self)


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """One container: its image's id ("" for none) and its own, writable layer.

    ``volatile`` is not a key: it says in which of the two files the record stands.
    """

    id: str
    names: tuple[str, ...] = ()
    image: str = ""
    layer: str = ""
    metadata: str = ""
    big_data_names: tuple[str, ...] = ()
    big_data_sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    big_data_digests: Mapping[str, Digest] = field(default_factory=dict, hash=False)
    created: str = ZERO_TIME
    uid_map: tuple[IdMap, ...] = ()
    gid_map: tuple[IdMap, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict, hash=False)
    volatile: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_json(cls, obj: Any) -> Self:
        """Raises ``CorruptStorage`` for keys of a wrong type."""
        return cls(**_read(_CONTAINER, obj, "container"))

    def to_json(self) -> dict[str, Any]:
        """The object in the order of keys that Go writes."""
        return _write(_CONTAINER, self)


# -- JSON text -----------------------------------------------------------------------


def dumps(value: Any) -> bytes:
    """JSON as Go's ``json.Marshal`` writes it: one line, UTF-8, its escapes; order as given."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _SURROGATE.sub("\\\\ufffd", text.translate(_GO_ESCAPES)).encode()


def dump_records(records: Iterable[Record]) -> bytes:
    """The whole file: an array of the records."""
    return dumps([record.to_json() for record in records])


def load_json(data: bytes, subject: str) -> Any:
    """Parse a JSON file of the graph root; ``CorruptStorage`` if it is none."""
    try:
        return json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptStorage(f"is no JSON: {error}", subject=subject) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# -- time ----------------------------------------------------------------------------


def now() -> str:
    """The present as records give it: RFC 3339, UTC, nanoseconds without trailing zeros."""
    return time_text(time.time_ns())


def time_text(nanoseconds: int) -> str:
    """Nanoseconds since 1970 as records give them."""
    seconds, fraction = divmod(nanoseconds, _SECOND)
    cycles, rest = divmod(seconds - _EPOCH_2000, _CYCLE)
    moment = datetime.fromtimestamp(_EPOCH_2000 + rest, UTC)
    year = moment.year + 400 * cycles
    text = f"{'-' * (year < 0)}{abs(year):04d}-{moment:%m-%dT%H:%M:%S}"
    digits = f"{fraction:09d}".rstrip("0")
    return f"{text}.{digits}Z" if digits else f"{text}Z"


def parse_time(text: str) -> int | None:
    """An RFC 3339 time, of any zone, as nanoseconds since 1970; None if it is none."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    *numbers, fraction, zone = match.groups()
    year, month, day, hour, minute, second = map(int, numbers)
    offset = 0
    if zone not in "Zz":
        offset = (int(zone[1:3]) * 60 + int(zone[4:6])) * 60 * (-1 if zone[0] == "-" else 1)
    cycles, year = divmod(year - 2000, 400)
    try:
        moment = datetime(2000 + year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None
    seconds = round(moment.timestamp()) + cycles * _CYCLE - offset
    return seconds * _SECOND + int((fraction or "0").ljust(9, "0"))


def same_time(text: str) -> str | None:
    """``text``, an RFC 3339 time, as Go writes it again: its zone stays; None if it is none."""
    match = _RFC3339.fullmatch(text)
    if match is None or parse_time(text) is None:
        return None
    fraction, zone = (match[7] or "").rstrip("0"), match[8]
    if zone[1:] in ("", "00:00"):
        zone = "Z"
    return f"{text[:10]}T{text[11:19]}{'.' * bool(fraction)}{fraction}{zone}"
