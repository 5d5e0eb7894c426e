"""What all tests share: `compat` tests may not be skipped where everything they need is promised."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile(
    "busy",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("busy")

pytest_plugins = ["pytester", "lab.fixtures"]

_COMPAT = {Path(__file__).parent / name for name in ("compat", "faults")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _COMPAT.intersection(item.path.parents):
            item.add_marker("compat")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI the real tools are installed by the run itself: a skip there hides a missing step."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and _must_run(item):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where nothing may be missing: {report.longrepr}"
    return report


def _must_run(item: pytest.Item) -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true"} and bool(
        item.get_closest_marker("compat")
    )
