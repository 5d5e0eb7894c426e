from __future__ import annotations

from layerstore import limits
from layerstore.content.pace import Pace


def test_before_anything_is_measured_the_window_is_moderate():
    assert Pace().window == limits.DEMAND_RANGE_FIRST_BYTES


def test_a_fast_link_is_asked_for_much_and_a_slow_one_for_little():
    fast, slow, far = Pace(), Pace(), Pace()
    for _ in range(5):
        fast.measured(0.004, 1_000_000, 0.005)
        slow.measured(0.01, 1_000_000, 1.0)
        far.measured(0.2, 1_000_000, 0.28)
    assert fast.window == limits.DEMAND_RANGE_PACED_BYTES
    assert slow.window == limits.DEMAND_RANGE_MIN_BYTES
    assert far.window == limits.DEMAND_RANGE_PACED_BYTES


def test_short_answers_say_nothing_about_the_rate():
    pace = Pace()
    pace.measured(0.01, 100, 0.0101)
    assert pace.window == limits.DEMAND_RANGE_FIRST_BYTES


def test_the_window_follows_the_link():
    pace = Pace()
    pace.measured(0.02, 1_000_000, 0.021)
    for _ in range(20):
        pace.measured(0.02, 1_000_000, 1.0)
    assert pace.window == limits.DEMAND_RANGE_MIN_BYTES
