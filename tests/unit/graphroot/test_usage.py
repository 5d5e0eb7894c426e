"""Who needs what in a graph root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab import tars
from lab.graphroot import layer_tar, open_store, put_container, put_image
from layerstore.errors import InvalidReference, UsageError
from layerstore.graphroot import usage
from layerstore.graphroot.store import Store

BASE = layer_tar(tars.regular(b"etc/base", b"base"))
MORE = layer_tar(tars.regular(b"etc/more", b"more and more"))
LAST = layer_tar(tars.regular(b"etc/last", b"last"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x", "localhost/x:latest"),
        ("small:1", "localhost/small:1"),
        ("a/b", "localhost/a/b:latest"),
        ("localhost/x:y", "localhost/x:y"),
        ("quay.io/a/b:c", "quay.io/a/b:c"),
        ("host:5000/x", "host:5000/x:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
    ],
)
def test_names_without_a_registry_are_of_this_machine(text: str, name: str) -> None:
    assert usage.local_name(text) == name


@pytest.mark.parametrize(
    "text", ["", "Bad", "a b", "x@sha256:" + "0" * 64, "x:/", "sha256:" + "0" * 64, "sha256:1"]
)
def test_what_is_no_name_to_give(text: str) -> None:
    with pytest.raises(InvalidReference, match=text or "localhost"):
        usage.local_name(text)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("quay.io/team/app:v1", True),
        ("quay.io/team/app", True),
        ("team/app", True),
        ("app", True),
        ("app:v1", True),
        ("app:*", True),
        ("a*", True),
        ("quay.io/*/*", True),
        ("a?p", True),
        ("[a-c]pp:v[12]", True),
        ("app:v2", False),
        ("*/app:v2", False),
        ("quay.io/*", False),  # a star does not match a slash
        ("ap", False),
        ("[^a]pp", False),
        ("", False),
        ("[", False),
    ],
)
def test_patterns_of_names(pattern: str, matches: bool) -> None:
    assert usage.reference_matches("quay.io/team/app:v1", pattern) is matches


def test_filters_are_strict() -> None:
    assert usage.ImageFilter.parse(["reference=a*", "dangling=1", "reference=b"]) == (
        usage.ImageFilter(("a*", "b"), dangling=True)
    )
    for text in ("dangling", "dangling=maybe", "since=x", "=x"):
        with pytest.raises(UsageError, match=text.partition("=")[2] or text):
            usage.ImageFilter.parse([text])


def test_an_image_was_made_from_the_nearest_whose_history_it_continues(store: Store) -> None:
    first = put_image(store, [BASE], "localhost/first:1")
    second = put_image(store, [BASE, MORE], "localhost/second:1")
    third = put_image(store, [BASE, MORE, LAST], "localhost/third:1")
    other = put_image(
        store, [BASE, MORE], "localhost/other:1", steps=[{"created_by": "x"}, {"created_by": "y"}]
    )
    unrelated = put_image(store, [MORE], "localhost/unrelated:1")
    found = usage.parents(store.images())
    assert found == {second.id: first.id, third.id: second.id}
    assert {other.id, unrelated.id}.isdisjoint(found)


def test_a_step_that_adds_no_layer_counts(store: Store) -> None:
    first = put_image(store, [BASE], "localhost/first:1")
    steps = [*json.loads(first.config())["history"], {"created_by": "CMD", "empty_layer": True}]
    second = put_image(store, [BASE], "localhost/second:1", steps=steps)
    assert usage.parents(store.images()) == {second.id: first.id}


def test_what_several_steps_made_at_once_has_no_parent(store: Store) -> None:
    base = put_image(store, [BASE])
    steps = [
        *json.loads(base.config())["history"],
        {"created_by": "ENV a=b", "empty_layer": True},
        {"created_by": "COPY"},
    ]
    app = put_image(store, [BASE, MORE], "localhost/app:1", steps=steps)
    assert usage.parents(store.images()) == {}
    assert {one.image.id for one in usage.summaries(store)} == {base.id, app.id}
    store.remove_image("localhost/app:1")
    assert [image.id for image in store.images()] == [base.id]


def test_the_parent_has_the_layer_below_or_the_same(store: Store) -> None:
    # one step added two layers: the base is two layers down
    base = put_image(store, [BASE])
    (step,) = json.loads(base.config())["history"]
    put_image(store, [BASE, MORE, LAST], "localhost/app:1", steps=[step, {"created_by": "x"}])
    assert usage.parents(store.images()) == {}


def test_images_that_differ_in_their_configs_only_all_have_the_child(store: Store) -> None:
    twins = {put_image(store, [BASE], settings={"User": user}).id for user in ("a", "b")}
    app = put_image(store, [BASE, MORE], "localhost/app:1")
    (found,) = usage.origins(store.images()).values()
    assert set(found) == twins
    assert usage.parents(store.images())[app.id] == found[0]
    assert [one.image.id for one in usage.summaries(store)] == [app.id]
    assert store.prune() == []
    store.remove_image("localhost/app:1")
    assert [image.id for image in store.images()] == [found[1]]  # as Podman does


def test_times_of_steps_are_compared_as_times(store: Store) -> None:
    def step(created: str) -> dict[str, str]:
        return {"created": created, "created_by": "x"}

    base = put_image(store, [BASE], steps=[step("2024-01-01T02:00:00.50+02:00")])
    same = step("2024-01-01T00:00:00.5Z")
    app = put_image(store, [BASE, MORE], "localhost/app:1", steps=[same, {"created_by": "y"}])
    assert usage.parents(store.images()) == {app.id: base.id}


def test_summaries_hide_intermediate_images_and_come_newest_first(store: Store) -> None:
    step = put_image(store, [BASE])
    built = put_image(store, [BASE, MORE], "localhost/app:1")
    loose = put_image(store, [LAST], created="2025-01-01T00:00:00Z")
    put_container(store, built, "c1")
    found = usage.summaries(store)
    assert [one.image.id for one in found] == [loose.id, built.id]
    assert [one.containers for one in found] == [0, 1]
    everything = usage.summaries(store, all_images=True)
    assert {one.image.id for one in everything if one.intermediate} == {step.id}
    assert {one.image.id: one.parent for one in everything}[built.id] == step.id


def test_filters_choose(store: Store) -> None:
    app = put_image(store, [BASE], "quay.io/team/app:v1", "localhost/x:1")
    loose = put_image(store, [LAST])

    def chosen(*texts: str) -> list[str]:
        wanted = usage.ImageFilter.parse(texts)
        return [one.image.id for one in usage.summaries(store, wanted)]

    assert chosen("dangling=true") == [loose.id]
    assert chosen("dangling=false") == [app.id]
    assert chosen("reference=a*") == [app.id]
    assert chosen("reference=nothing", "reference=x") == [app.id]
    assert chosen("reference=a*", "dangling=true") == []
    assert chosen(f"reference={loose.id[:12]}") == [loose.id]


def test_a_damaged_image_is_listed_all_the_same(store: Store, tmp_path: Path) -> None:
    image = put_image(store, [BASE, MORE], "localhost/app:1")
    for path in (tmp_path / "root/overlay-images" / image.id).iterdir():
        path.unlink()
    (found,) = usage.summaries(store, with_parents=True)
    assert (found.image.id, found.parent) == (image.id, "")
