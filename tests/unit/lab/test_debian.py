"""Sources for another suite come from the machine's own, and only from Debian's."""

from pathlib import Path

import pytest

from lab import debian

DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://deb.example/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
Signed-By: /somewhere

Types: deb
URIs: http://deb.example/security
Suites: bookworm-security
Components: main

Types: deb-src
URIs: http://deb.example/sources-only
Suites: bookworm
"""
CLASSIC = """\
# deb http://off.example/debian bookworm main
deb [arch=amd64 signed-by=/k] http://old.example/debian bookworm main
deb http://vendor.example/apt cloud-sdk-bookworm main
deb http://node.example/ nodistro main
"""


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    monkeypatch.setattr(debian, "_APT_ETC", tmp_path)
    monkeypatch.setattr(debian, "host_suite", lambda: "bookworm")
    return tmp_path


def test_the_suite_is_renamed_and_foreign_sources_are_left_out(etc: Path) -> None:
    (etc / "sources.list.d" / "debian.sources").write_text(DEB822)
    (etc / "sources.list").write_text(CLASSIC)
    text = debian.sources_for("trixie")
    lines = [line for line in text.splitlines() if line.startswith(("URIs", "Suites"))]
    assert lines == [
        "URIs: http://deb.example/debian",
        "Suites: trixie trixie-updates",
        "URIs: http://deb.example/security",
        "Suites: trixie-security",
        "URIs: http://old.example/debian",
        "Suites: trixie",
    ]
    assert text.count("Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg") == 3


def test_a_machine_without_debian_sources_is_an_error(etc: Path) -> None:
    (etc / "sources.list").write_text("deb http://node.example/ nodistro main\n")
    with pytest.raises(debian.DebianError, match="no source for bookworm"):
        debian.sources_for("trixie")


def test_a_known_set_is_answered_without_apt(
    etc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "CACHE", tmp_path / "cache")
    runs = []

    class FakeApt:
        def __init__(self, suite: str, place: Path) -> None:
            self.place = place

        def resolve_and_download(self, packages: list[str]) -> list[str]:
            runs.append(packages)
            (self.place / "a_1_all.deb").touch()
            return ["a_1_all.deb"]

    monkeypatch.setattr(debian, "_PrivateApt", FakeApt)
    first = debian.download(["b", "a"], "trixie")
    assert debian.download(["a", "b", "a"], "trixie") == first
    assert runs == [["a", "b"]]
    first[0].unlink()
    debian.download(["a", "b"], "trixie")
    assert len(runs) == 2
