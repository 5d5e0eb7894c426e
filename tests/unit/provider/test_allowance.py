"""A policy that has changed, and layers that were shown under the old one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from lab.simimages import without_tocs
from lab.waiting import until
from layerstore import limits
from layerstore.provider import DialectL, Needs, Ordinary, Policy, View

FILES = [{"bin/sh": b"shell" * 3000, "etc/a": b"a"}]
OFF = Policy(dialect_l=DialectL.OFF)
VERIFIED = Policy(dialect_l=DialectL.VERIFIED, ordinary=Ordinary.KNOWN)
ORDINARY_OFF = Policy(ordinary=Ordinary.OFF)


def ref(registry, repository: str = "app") -> str:
    return f"{registry.host}/{repository}:1"


class Clients:
    """The graph roots of the machine: what they refer to, and how often somebody looked."""

    def __init__(self) -> None:
        self.needs = Needs(known=True)
        self.looks = 0

    def __call__(self) -> Needs:
        self.looks += 1
        return self.needs


@pytest.fixture
def clients() -> Clients:
    return Clients()


@pytest.fixture
def under(asker, clients) -> Callable[[Policy], None]:
    """Start the store anew under a policy."""

    def start(policy: Policy) -> None:
        asker.options = {"background": False, "policy": policy, "needs": clients}
        asker.restart()

    return start


@pytest.fixture
def lazy(asker, publisher, registry, under) -> View:
    """A layer that was taken by its blob digest while it was being fetched."""
    under(Policy())
    image = publisher.push("app", "1", FILES)
    view: View = asker.view(ref(registry), image.layers[0].digest)
    return view


@pytest.fixture
def ordinary(asker, publisher, registry, under) -> View:
    """A layer without a TOC that was taken when it was complete."""
    under(Policy(ordinary=Ordinary.EAGER))
    image = publisher.push("app", "1", FILES, change=without_tocs)
    view: View = asker.view(ref(registry), image.layers[0].digest)
    return view


@pytest.mark.parametrize(
    ("kind", "policy", "reason"),
    [
        ("lazy", OFF, "dialect-l-off"),
        ("lazy", VERIFIED, "not-here"),
        ("ordinary", OFF, "dialect-l-off"),
        ("ordinary", ORDINARY_OFF, "ordinary-layers-off"),
    ],
)
def test_a_layer_that_nobody_uses_is_judged_by_the_policy_of_today(
    asker, under, caplog, request, kind, policy, reason
):
    view: View = request.getfixturevalue(kind)
    under(policy)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert asker.reason(view.reference, view.name) == reason
    lines = [one for one in caplog.messages if "event=lookup-refused" in one]
    assert len(lines) == 2
    assert f"reason={reason} reference={view.reference} layer={view.name}" in lines[0]
    assert asker.store.status()["lookups"] == {reason: 2}
    # it is not forgotten: under the old policy it is the same again
    under(Policy())
    assert asker.view(view.reference, view.name) == view


def test_a_pull_of_many_layers_looks_at_the_graph_roots_once(
    asker, publisher, registry, under, clients, monkeypatch
):
    under(Policy())
    image = publisher.push("app", "1", [{f"f{n}": bytes([n]) * 100} for n in range(6)])
    views = [asker.view(ref(registry), layer.digest) for layer in image.layers]
    monkeypatch.setattr(limits, "IN_USE_LOOK_SECONDS", 60.0)
    under(OFF)
    before = clients.looks
    for view in views:
        assert asker.reason(view.reference, view.name) == "dialect-l-off"
    assert clients.looks == before + 1
    # who comes after the look is counted, and who was there before was seen
    asker.store.use(views[0])
    assert asker.view(views[0].reference, views[0].name) == views[0]


def of_registry(registry) -> Policy:
    return Policy(ordinary_by_prefix={registry.host: Ordinary.OFF})


def test_the_policy_of_a_prefix_is_obeyed(asker, registry, ordinary, under):
    under(of_registry(registry))
    assert asker.reason(ordinary.reference, ordinary.name) == "ordinary-layers-off"
    assert asker.reason("", ordinary.name) == "ordinary-layers-off"


def test_a_name_without_reference_is_judged_too(asker, registry, ordinary, under):
    nameless = asker.view("", ordinary.name)
    under(of_registry(registry))
    assert asker.reason("", nameless.name) == "ordinary-layers-off"


@pytest.mark.parametrize("policy", [OFF, VERIFIED])
@pytest.mark.parametrize("used", ["counted", "referenced", "mounted", "unknown"])
def test_who_uses_a_layer_goes_on_with_it(
    asker, registry, lazy, under, clients, caplog, policy, used
):
    if used == "counted":
        asker.store.use(lazy)
    else:
        clients.needs = {
            "referenced": Needs(referenced={lazy.key}, known=True),
            "mounted": Needs(mounted={lazy.key}, known=True),
            "unknown": Needs(known=False),
        }[used]
    under(policy)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert asker.view(lazy.reference, lazy.name) == lazy
    assert asker.read(lazy, "bin/sh") == FILES[0]["bin/sh"]
    assert "lookup-refused" not in caplog.text
    assert caplog.text.count(f"event=kept-in-use reference={lazy.reference} layer=") == 1
    # as soon as it is let go of, without a restart
    asker.store.release(lazy)
    clients.needs = Needs(known=True)
    assert asker.reason(lazy.reference, lazy.name) in ("dialect-l-off", "not-here")


def test_a_look_that_fails_takes_nothing_from_anybody(asker, lazy, under):
    def broken() -> Needs:
        raise OSError("the disk is gone")

    asker.options = {"background": False, "policy": OFF, "needs": broken}
    asker.restart()
    assert asker.view(lazy.reference, lazy.name) == lazy


def test_a_layer_that_was_verified_meanwhile_is_shown_where_that_is_demanded(
    asker, lazy, under, clients
):
    asker.store.layers.hasten(lazy.slot, lambda _: None)
    until(lambda: asker.store.status()["layers"][0]["verified"])
    under(VERIFIED)
    looks = clients.looks
    assert asker.view(lazy.reference, lazy.name) == lazy
    assert clients.looks == looks


def test_a_layer_that_came_as_a_whole_takes_the_place_of_the_lazy_one(asker, lazy, under):
    """Where only what was verified is shown, `info` claims what was verified."""
    assert "compressed-diff-digest" not in json.loads(lazy.info)
    under(Policy(dialect_l=DialectL.VERIFIED, ordinary=Ordinary.EAGER))
    whole = asker.view(lazy.reference, lazy.name)
    assert whole.slot != lazy.slot
    assert json.loads(whole.info)["compressed-diff-digest"] == lazy.name
    assert asker.store.views() == (whole,)
    assert asker.read(whole, "bin/sh") == FILES[0]["bin/sh"]
    asker.restart()
    assert asker.view(lazy.reference, lazy.name) == whole
    assert asker.store.views() == (whole,)


def test_layers_with_a_toc_do_not_ask_for_the_ordinary_policy(asker, registry, lazy, under):
    under(ORDINARY_OFF)
    asked = registry.count("GET", "")
    for _ in range(2):
        assert asker.view(lazy.reference, lazy.name) == lazy
    assert registry.count("GET", "") == asked


def test_by_the_toc_no_policy_stands_in_the_way(asker, publisher, registry, under, clients):
    under(Policy())
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[0].toc_digest)
    looks: list[Any] = []
    for policy in (OFF, VERIFIED, ORDINARY_OFF):
        under(policy)
        before = clients.looks
        assert asker.view(view.reference, view.name) == view
        looks.append(clients.looks - before)
    assert looks == [0, 0, 0]
