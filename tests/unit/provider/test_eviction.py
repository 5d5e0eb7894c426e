"""Which contents go first: a pure function over facts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layerstore.provider.eviction import (
    NO_LAYER,
    LayerFacts,
    Standing,
    Step,
    in_order,
    plan,
)

MANY = 1 << 62

facts = st.builds(
    LayerFacts,
    slot=st.integers(1, 50),
    standing=st.sampled_from(Standing),
    used=st.integers(0, 5).map(float),
    blob=st.integers(0, 100),
    files=st.integers(0, 100),
)
some = st.lists(facts, max_size=12, unique_by=lambda one: one.slot).map(in_order)


def going(steps: list[Step]) -> list[tuple[int, str]]:
    return [(step.slot, "b" * step.blob + "f" * step.files) for step in steps]


def test_who_needs_it_comes_before_when_it_was_used():
    ordered = in_order(
        [
            LayerFacts(1, Standing.PINNED, 1.0, 10, 10),
            LayerFacts(2, Standing.RUNNING, 1.0, 10, 10),
            LayerFacts(3, Standing.IDLE, 3.0, 10, 10),
            LayerFacts(4, Standing.IDLE, 2.0, 10, 10),
            LayerFacts(5, Standing.UNREFERENCED, 9.0, 10, 10),
            LayerFacts(6, Standing.QUARANTINED, 9.0, 10, 10),
        ]
    )
    steps = plan(ordered, orphans=5, wanted=MANY, extent=Standing.RUNNING)
    assert going(steps) == [
        (NO_LAYER, "f"), (6, "bf"), (5, "bf"), (4, "bf"), (3, "bf"), (2, "f"), (2, "b"),
    ]  # fmt: skip


def test_running_layers_give_their_files_before_any_blob():
    ordered = in_order(LayerFacts(n, Standing.RUNNING, float(n), 10, 10) for n in (1, 2))
    steps = plan(ordered, wanted=25, extent=Standing.RUNNING)
    assert going(steps) == [(1, "f"), (2, "f"), (1, "b")]


def test_no_more_goes_than_is_wanted():
    ordered = in_order(LayerFacts(n, Standing.IDLE, float(n), 10, 10) for n in (1, 2, 3))
    assert going(plan(ordered, wanted=20, extent=Standing.IDLE)) == [(1, "bf")]
    assert going(plan(ordered, wanted=21, extent=Standing.IDLE)) == [(1, "bf"), (2, "bf")]
    assert plan(ordered, wanted=MANY, extent=Standing.UNREFERENCED) == []


@given(some, st.integers(0, 50), st.integers(0, 2000), st.sampled_from(Standing))
def test_a_plan_is_in_order_enough_and_within_its_extent(ordered, orphans, wanted, extent):
    steps = plan(ordered, orphans=orphans, wanted=wanted, extent=extent)
    assert all(step.size > 0 for step in steps)
    assert all(step.standing <= extent or step.slot == NO_LAYER for step in steps)
    assert all(step.standing is not Standing.PINNED for step in steps)
    assert [step.standing for step in steps] == sorted(step.standing for step in steps)
    freed = sum(step.size for step in steps)
    possible = orphans + sum(
        one.size for one in ordered if one.standing <= min(extent, Standing.RUNNING)
    )
    assert freed >= min(wanted, possible)
    if steps and steps[-1].standing > Standing.QUARANTINED:
        assert freed - steps[-1].size < wanted, "one step more than was needed"
