"""The TOC document, split and decoded entry by entry."""

import contextlib
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.errors import ContentError, InvalidLayer, LimitExceeded
from layerstore.formats import TocEntry, iter_toc

ENTRY = {"name": "a", "type": "reg"}


def document(*entries: object, version: object = 1, indent: str | None = None) -> bytes:
    return json.dumps({"version": version, "entries": list(entries)}, indent=indent).encode()


def test_every_field_is_read() -> None:
    fields = {
        "name": "usr/bin/x",
        "type": "reg",
        "size": 5,
        "modtime": "2024-01-02T03:04:05Z",
        "linkName": "l",
        "mode": 493,
        "uid": 1,
        "gid": 2,
        "userName": "u",
        "groupName": "g",
        "offset": 7,
        "endOffset": 8,
        "devMajor": 3,
        "devMinor": 4,
        "xattrs": {"user.a": "YmFy"},
        "digest": "sha256:d",
        "chunkOffset": 9,
        "chunkSize": 10,
        "chunkDigest": "sha256:c",
        "chunkType": "zeros",
        "innerOffset": 11,
        "nameRaw": "bg==",
        "linkNameRaw": "bA==",
    }
    (entry,) = iter_toc(document(fields))
    assert entry == TocEntry(
        name="usr/bin/x",
        type="reg",
        size=5,
        modtime="2024-01-02T03:04:05Z",
        link_name="l",
        mode=493,
        uid=1,
        gid=2,
        user_name="u",
        group_name="g",
        offset=7,
        end_offset=8,
        dev_major=3,
        dev_minor=4,
        xattrs={"user.a": "YmFy"},
        digest="sha256:d",
        chunk_offset=9,
        chunk_size=10,
        chunk_digest="sha256:c",
        chunk_type="zeros",
        inner_offset=11,
        name_raw="bg==",
        link_name_raw="bA==",
    )


@pytest.mark.parametrize("indent", [None, "\t", ""])
def test_order_and_layout(indent: str | None) -> None:
    entries = [{"name": f"n{number}", "type": "dir"} for number in range(100)]
    names = [entry.name for entry in iter_toc(document(*entries, indent=indent))]
    assert names == [f"n{number}" for number in range(100)]


@pytest.mark.parametrize(
    "name", ['"', "\\", '\\"', "}", "{", '"}],{', "\u2028", "\U0001f600", "é", "\n", "\\\\"]
)
def test_names_that_look_like_json(name: str) -> None:
    entries = {"name": name, "type": "reg", "xattrs": {name: "{}"}}, ENTRY
    for text in (
        document(*entries),
        json.dumps({"version": 1, "entries": entries}, ensure_ascii=False).encode(),
    ):
        first, second = iter_toc(text)
        assert (first.name, first.xattrs, second.name) == (name, {name: "{}"}, "a")


def test_unknown_fields_are_skipped() -> None:
    entry = ENTRY | {"NumLink": 0, "later": [{"x": {"y": [1, "}"]}}], "accesstime": "t"}
    text = json.dumps({"extra": {"entries": [1]}, "version": 1, "entries": [entry], "z": "s"})
    assert [entry.name for entry in iter_toc(text.encode())] == ["a"]


@pytest.mark.parametrize(
    "text", [b'{"version":1,"entries":[ ]}', b'{"version":1,"entries":null}', b'{"version":1}']
)
def test_a_layer_without_entries(text: bytes) -> None:
    assert list(iter_toc(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"entries":[]}',
        b'{"version":1,"entries":[]}x',
        b'{"version":1,"entries":[]',
        b'{"version":2,"entries":[]}',
        b'{"version":0,"entries":[]}',
        b'{"version":"1","entries":[]}',
        b'{"version":1,"entries":{}}',
        b'{"version":1,"entries":"[]"}',
        b'{"version":1,"entries":[1]}',
        b'{"version":1,"entries":[null]}',
        b'{"version":1,"entries":[[]]}',
        b'{"version":1,"entries":[{}]}',
        b'{"version":1,"entries":[{"name":"a"}]}',
        b'{"version":1,"entries":[{"name":"a","type":"reg"},]}',
        b'{"version":1,"entries":[{"name":"a","type":"reg"}{"name":"a","type":"reg"}]}',
        b'{"version":1,"entries":[{"name":"a","type":"reg","size":"5"}]}',
        b'{"version":1,"entries":[{"name":"a","type":"reg","size":1.5}]}',
        b'{"version":1,"entries":[{"name":"a","type":"reg","size":null}]}',
        b'{"version":1,"entries":[{"name":1,"type":"reg"}]}',
        b'{"version":1,"entries":[{"name":"a","type":"reg","xattrs":{"a":1}}]}',
        b'{"version":1,"entries":[{"name":"\xff","type":"reg"}]}',
        b'{"version":1,"entries":[{"name":"\\ud800","type":"reg"}]}',
        b'{"version":1,"entries":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"version":1,"entries":[{"name":"a","type":"r","x":'
        + b'{"a":' * 5
        + b"1"
        + b"}" * 5
        + b"}]}",
    ],
)
def test_what_is_no_toc_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidLayer):
        list(iter_toc(text))


def test_the_number_of_entries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOC_ENTRIES", 10)
    assert len(list(iter_toc(document(*[ENTRY] * 10)))) == 10
    with pytest.raises(LimitExceeded):
        list(iter_toc(document(*[ENTRY] * 11)))


def test_one_entry_is_bounded() -> None:
    huge = ENTRY | {"xattrs": {f"user.{number}": "" for number in range(400_000)}}
    with pytest.raises(LimitExceeded):
        list(iter_toc(document(huge)))


def test_the_document_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOC_BYTES", 100)
    with pytest.raises(LimitExceeded):
        list(iter_toc(document(*[ENTRY] * 10)))


@pytest.mark.parametrize("item", [b"0,", b"{},", b'{"name":"a","type":"reg"},'])
def test_memory_does_not_grow_with_the_number_of_entries(item: bytes) -> None:
    text = b'{"version":1,"entries":[' + item * 100_000 + b"0]}"
    tracemalloc.start()
    try:
        for _ in iter_toc(text):
            pass
    except ContentError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200_000


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["version", "entries", "name", "type", "xattrs", "x"]), inner
            )
        ),
    )
)
def test_arbitrary_json_only_raises_content_errors(value: object) -> None:
    for candidate in (value, {"version": 1, "entries": value}, {"version": 1, "entries": [value]}):
        with contextlib.suppress(ContentError):
            list(iter_toc(json.dumps(candidate).encode()))


@given(st.binary(max_size=80), st.integers(0, 60))
def test_arbitrary_bytes_only_raise_content_errors(noise: bytes, position: int) -> None:
    text = document(ENTRY)
    with contextlib.suppress(ContentError):
        list(iter_toc(text[:position] + noise + text[position + len(noise) // 2 :]))
