"""A compat test that is skipped in CI must fail the run; elsewhere a skip is a skip."""

from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    plugins = 'pytest_plugins = ["pytester", "lab.fixtures"]'
    text = CONFTEST.read_text()
    assert plugins in text
    text = text.replace(plugins, "")
    pytester.makeini("[pytest]\nmarkers = compat: real tools")
    pytester.path.joinpath("conftest.py").write_text(text)
    skipping = "import pytest\ndef test_tool() -> None:\n    pytest.skip('no tool')\n"
    for room in ("compat", "faults", "unit"):
        directory = pytester.path / room
        directory.mkdir()
        (directory / f"test_{room}.py").write_text(skipping)
    return pytester


def test_a_skip_of_a_compat_test_fails_in_ci(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    result = suite.runpytest()
    result.assert_outcomes(failed=2, skipped=1)
    result.stdout.fnmatch_lines(["*skipped in CI*no tool*"])


def test_a_skip_is_a_skip_elsewhere(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    suite.runpytest().assert_outcomes(skipped=3)
