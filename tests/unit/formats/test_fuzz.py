"""Every parser of layers against malformed ones (``lab.fuzz``): in time, in memory, our errors only.

LAYERSTORE_FUZZ_EXAMPLES says how many broken inputs each parser is given; ``python -m lab.fuzz`` goes
on as long as it is told.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.fuzz import Target, targets

EXAMPLES = int(os.environ.get("LAYERSTORE_FUZZ_EXAMPLES", "100"))
CPU_SECONDS = 5.0  # for one input of some kilobytes; real ones take milliseconds
MEMORY_BYTES = 512 << 20

every_target = pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)


@pytest.fixture
def bounded() -> Iterator[None]:
    """More memory cannot be had: it would be a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    bound = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (bound, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@every_target
def test_what_is_broken_was_whole(target: Target):
    for seed in target.seeds:
        assert target.try_one(seed) == "accepted"


@every_target
def test_what_is_broken_is_refused_or_taken(target: Target, bounded: None):
    seen = set()

    @settings(max_examples=EXAMPLES, database=None)
    @given(st.integers(0, (1 << 64) - 1))
    def run(seed: int) -> None:
        data = target.input(seed)
        began = time.process_time()
        seen.add(target.try_one(data))
        assert time.process_time() - began < CPU_SECONDS

    run()
    assert seen - {"accepted"}, "nothing was broken enough"
