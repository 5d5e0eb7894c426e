import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import CorruptStorage
from layerstore.graphroot.records import (
    ZERO_TIME,
    ContainerRecord,
    IdMap,
    ImageRecord,
    LayerRecord,
    dump_records,
    dumps,
    load_json,
    now,
    parse_time,
    same_time,
    time_text,
)
from layerstore.image import Digest

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64

# All keys that the structs of containers/storage have, in their order, none of them zero.
LAYER = (
    f'{{"id":"{"1" * 64}","names":["one","two"],"parent":"{"2" * 64}","metadata":"{{\\"a\\":1}}",'
    '"mountlabel":"system_u:object_r:container_file_t:s0:c1,c2",'
    f'"created":"2024-05-06T07:08:09.123456789Z","compressed-diff-digest":"{A}",'
    f'"compressed-size":10,"diff-digest":"{B}","toc-digest":"{A}","diff-size":-1,"compression":2,'
    '"uidset":[0,33],"gidset":[0],"flags":{"expected-layer-diffid":"'
    f'{B}","incomplete":true}},'
    '"uidmap":[{"container_id":0,"host_id":100000,"size":65536}],'
    '"gidmap":[{"container_id":0,"host_id":100000,"size":65536}],"big-data-names":["x"]}'
)
IMAGE = (
    f'{{"id":"{"3" * 64}","digest":"{A}","names":["docker.io/library/a:1"],'
    '"names-history":["docker.io/library/a:1","localhost/b:2"],'
    f'"layer":"{"1" * 64}","mapped-layers":["{"4" * 64}"],"metadata":"{{}}",'
    f'"big-data-names":["manifest","{B}"],"big-data-sizes":{{"manifest":3,"{B}":4}},'
    f'"big-data-digests":{{"manifest":"{A}","{B}":"{B}"}},"created":"2024-05-06T07:08:09Z",'
    '"flags":{"pinned":true}}'
)
CONTAINER = (
    f'{{"id":"{"5" * 64}","names":["box"],"image":"","layer":"{"1" * 64}",'
    '"metadata":"m","big-data-names":["config"],"big-data-sizes":{"config":2},'
    f'"big-data-digests":{{"config":"{A}"}},"created":"2024-05-06T07:08:09.1Z",'
    '"uidmap":[{"container_id":0,"host_id":1,"size":1}],'
    '"gidmap":[{"container_id":0,"host_id":1,"size":1}],'
    '"flags":{"MountLabel":"","ProcessLabel":"","Volatile":true}}'
)


@pytest.mark.parametrize(
    ("kind", "text"),
    [(LayerRecord, LAYER), (ImageRecord, IMAGE), (ContainerRecord, CONTAINER)],
)
def test_a_full_record_is_written_as_it_was_read(kind, text: str) -> None:
    record = kind.from_json(json.loads(text))
    assert dumps(record.to_json()).decode() == text
    assert record.extra == {}


def test_the_fields_of_a_layer() -> None:
    layer = LayerRecord.from_json(json.loads(LAYER))
    assert layer.names == ("one", "two")
    assert layer.parent == "2" * 64
    assert layer.compressed_diff_digest == A
    assert isinstance(layer.compressed_diff_digest, Digest)
    assert (layer.diff_digest, layer.toc_digest, layer.diff_size) == (B, A, -1)
    assert layer.uids == (0, 33)
    assert layer.uid_map == (IdMap(0, 100000, 65536),)
    assert layer.incomplete
    assert layer.expected_diff_id == B
    assert not layer.volatile


def test_what_is_zero_is_left_out_except_a_few() -> None:
    assert dumps(LayerRecord("x").to_json()) == f'{{"id":"x","created":"{ZERO_TIME}"}}'.encode()
    assert dumps(ImageRecord("x").to_json()) == f'{{"id":"x","created":"{ZERO_TIME}"}}'.encode()
    assert (
        dumps(ContainerRecord("x").to_json())
        == f'{{"id":"x","image":"","layer":"","created":"{ZERO_TIME}"}}'.encode()
    )


def test_volatile_is_no_key() -> None:
    assert dumps(LayerRecord("x", volatile=True).to_json()) == dumps(LayerRecord("x").to_json())


def test_unknown_keys_follow_the_known_ones() -> None:
    text = '{"id":"x","created":"2024-05-06T07:08:09Z","shade":{"b":[1,2.5,null],"a":"<"},"z":0}'
    record = replace(LayerRecord.from_json(json.loads(text)), names=("n",))
    expected = text.replace('"x",', '"x","names":["n"],').replace("<", "\\u003c")
    assert dumps(record.to_json()).decode() == expected


def test_a_digest_we_cannot_compute_is_kept_and_never_compared() -> None:
    text = f'{{"id":"x","created":"{ZERO_TIME}","diff-digest":"sha384:00","diff-size":5}}'
    record = LayerRecord.from_json(json.loads(text))
    assert record.diff_digest is None
    assert dumps(record.to_json()).decode() == text
    known = replace(record, diff_digest=Digest(A))
    assert json.loads(dumps(known.to_json()))["diff-digest"] == A


def test_null_and_empty_are_absent() -> None:
    record = ImageRecord.from_json({"id": "x", "names": None, "flags": {}, "digest": ""})
    assert record == ImageRecord("x")


def test_flags_are_sorted_at_every_depth() -> None:
    flags = {"b": [{"y": 1, "x": 2}], "a": {"d": 1, "c": 2}, "é": 1, "\U0001f600": 2, "\uffff": 3}
    text = dumps(LayerRecord("x", flags=flags).to_json()).decode()
    assert '"flags":{"a":{"c":2,"d":1},"b":[{"x":2,"y":1}],"é":1,"\uffff":3,"😀":2}' in text


@pytest.mark.parametrize(
    "broken",
    [
        [],
        "x",
        None,
        {},
        {"id": ""},
        {"id": "a/b"},
        {"id": ".."},
        {"id": 7},
        {"id": None},
        {"id": "x", "names": "n"},
        {"id": "x", "names": [1]},
        {"id": "x", "parent": "../y"},
        {"id": "x", "created": "yesterday"},
        {"id": "x", "created": 5},
        {"id": "x", "diff-digest": 5},
        {"id": "x", "diff-size": "5"},
        {"id": "x", "diff-size": True},
        {"id": "x", "diff-size": 1.5},
        {"id": "x", "uidset": [True]},
        {"id": "x", "flags": []},
        {"id": "x", "uidmap": [[0, 1, 2]]},
        {"id": "x", "uidmap": [{"container_id": "0"}]},
    ],
)
def test_wrong_types_are_damage(broken) -> None:
    with pytest.raises(CorruptStorage):
        LayerRecord.from_json(broken)


@pytest.mark.parametrize(
    "broken",
    [
        {"big-data-sizes": {"a": "1"}},
        {"big-data-digests": {"a": "no digest"}},
        {"big-data-digests": {"a": None}},
        {"layer": "a/b"},
        {"mapped-layers": [""]},
    ],
)
def test_wrong_types_in_an_image_are_damage(broken) -> None:
    with pytest.raises(CorruptStorage, match=next(iter(broken))):
        ImageRecord.from_json({"id": "x", **broken})


def test_the_digests_of_an_image_are_those_of_its_manifests() -> None:
    image = ImageRecord.from_json(json.loads(IMAGE))
    assert image.digests == (A,)
    more = replace(
        image,
        big_data_names=("manifest-x", "sha256:y"),
        big_data_digests={"manifest-x": Digest(B), "sha256:y": Digest("sha256:" + "c" * 64)},
    )
    assert more.digests == (A, B)


def test_text_is_escaped_as_go_does() -> None:
    text = '<a href="x">&amp;</a>\\ \u2028\u2029\x7f\x00\x1f\n\r\t é 😀 \ud800'
    assert dumps([text]).decode() == (
        '["\\u003ca href=\\"x\\"\\u003e\\u0026amp;\\u003c/a\\u003e\\\\ \\u2028\\u2029\x7f'
        '\\u0000\\u001f\\n\\r\\t é 😀 \\ufffd"]'
    )


def test_a_number_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps(float("nan"))


@pytest.mark.parametrize("data", [b"[", b"\xff", b"[NaN]", b"[1]]", b"[" * 200_000])
def test_broken_json_is_damage(data: bytes) -> None:
    with pytest.raises(CorruptStorage, match="the-file"):
        load_json(data, "the-file")


@given(
    st.builds(
        LayerRecord,
        id=st.text(
            st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1
        ).filter(lambda text: text not in (".", "..")),
        names=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
        metadata=st.text(st.characters(exclude_categories=["Cs"])),
        compressed_size=st.integers(-1, 2**63 - 1),
        uids=st.lists(st.integers(0, 2**32 - 1)).map(tuple),
        flags=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.booleans()),
        diff_digest=st.none() | st.binary(max_size=4).map(Digest.of),
    )
)
def test_any_layer_survives(layer: LayerRecord) -> None:
    data = dump_records([layer])
    assert b"\n" not in data
    (again,) = (LayerRecord.from_json(item) for item in load_json(data, "x"))
    assert again == layer
    assert dump_records([again]) == data


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_000_000_000_000_000_100, "2001-09-09T01:46:40.0000001Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (-62135596800 * 10**9, ZERO_TIME),
    ],
)
def test_times(nanoseconds: int, text: str) -> None:
    assert time_text(nanoseconds) == text
    assert parse_time(text) == nanoseconds


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("2024-05-06T09:08:09.5+02:00", "2024-05-06T07:08:09.5Z"),
        ("2024-05-06T00:08:09-07:00", "2024-05-06T07:08:09Z"),
        ("2024-05-06T07:08:09.1234567891234Z", "2024-05-06T07:08:09.123456789Z"),
        ("0001-01-01T00:00:00+23:00", "0000-12-31T01:00:00Z"),
        ("9999-12-31T23:59:59-23:59", "10000-01-01T23:58:59Z"),
        ("0000-01-01T00:00:00+01:00", "-0001-12-31T23:00:00Z"),
        ("0000-02-29T00:00:00Z", "0000-02-29T00:00:00Z"),
    ],
)
def test_times_of_other_zones(text: str, same: str) -> None:
    nanoseconds = parse_time(text)
    assert nanoseconds is not None
    assert time_text(nanoseconds) == same


@pytest.mark.parametrize("text", ["", "2024-05-06", "2024-13-06T07:08:09Z", "2024-05-06T07:08:09"])
def test_what_is_no_time(text: str) -> None:
    assert parse_time(text) is None


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("2024-05-06t07:08:09.50+02:00", "2024-05-06T07:08:09.5+02:00"),
        ("2024-05-06T07:08:09.000z", "2024-05-06T07:08:09Z"),
        ("2024-05-06T07:08:09-00:00", "2024-05-06T07:08:09Z"),
        ("9999-12-31T23:59:59-23:59", "9999-12-31T23:59:59-23:59"),
        ("2024-02-30T00:00:00Z", None),
        ("soon", None),
    ],
)
def test_a_time_is_written_again_as_go_does(text: str, again: str | None) -> None:
    assert same_time(text) == again


def test_now_is_a_time() -> None:
    assert parse_time(now()) is not None
