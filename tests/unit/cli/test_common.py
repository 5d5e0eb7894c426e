"""Podman's way with numbers, times and tables, and what the flags come to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerstore.cli import common
from layerstore.errors import InUse, NetworkError, UnknownObject, UsageError, exit_status
from layerstore.image import Digest

NOW = 1_700_000_000.0
DAY = 86400


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1024, "1.02 kB"),
        (12_288, "12.3 kB"),
        (2_021_376, "2.02 MB"),
        (14_967_327, "15 MB"),
        (999_999_999, "1e+03 MB"),  # as Podman has it
        (10**9, "1 GB"),
        (5 * 10**12, "5 TB"),
        (10**21, "1e+03 EB"),
    ],
)
def test_sizes(size: int, said: str) -> None:
    assert common.human_size(size) == said
    assert common.human_size(size, space=False) == said.replace(" ", "")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "Less than a second"),
        (0, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "About a minute"),
        (119, "About a minute"),
        (120, "2 minutes"),
        (3599, "59 minutes"),
        (3600, "About an hour"),
        (5399, "About an hour"),
        (5400, "2 hours"),
        (47 * 3600, "47 hours"),
        (2 * DAY, "2 days"),
        (13 * DAY, "13 days"),
        (14 * DAY, "2 weeks"),
        (59 * DAY, "8 weeks"),
        (60 * DAY, "2 months"),
        (729 * DAY, "24 months"),
        (730 * DAY, "2 years"),
    ],
)
def test_ages(seconds: int, said: str) -> None:
    assert common.human_age("2023-11-14T22:13:20Z", now=NOW + seconds) == f"{said} ago"


def test_ages_of_no_time_and_of_times_with_nanoseconds() -> None:
    assert common.human_age("2023-11-14T22:13:20.123456789Z", now=NOW + 60) == "59 seconds ago"
    for text in ("", "soon", "0001-01-01T00:00:00Z"):
        assert common.human_age(text, now=NOW) == "292 years ago"
    assert common.human_age("1970-01-01T00:00:00Z", now=NOW) == "53 years ago"
    assert common.human_age("9999-12-31T23:59:59-23:59", now=NOW) == "Less than a second ago"


def test_a_table_is_aligned_as_podmans(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("localhost/rather-long", "1", "x"), ("b", "two", "")]
    common.print_table(("NAME", "TAG", "SIZE"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "NAME                   TAG         SIZE",
        "localhost/rather-long  1           x",
        "b                      two         ",
    ]
    common.print_table(("NAME", "TAG", "SIZE"), rows, heading=False)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_json_knows_paths_and_digests(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    digest = Digest.of(b"")
    common.print_json({"path": Path("/a"), "digest": digest, "names": ("x",)})
    out = capsysbinary.readouterr().out
    assert json.loads(out) == {"path": "/a", "digest": str(digest), "names": ["x"]}
    assert out.startswith(b'{\n    "path"')
    assert out.endswith(b"}\n")


def test_errors_of_several_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    common.finish([])
    with pytest.raises(SystemExit) as ended:
        common.finish([UnknownObject("gone", subject="a"), InUse("needed", subject="b")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "layerstore: a: gone\nlayerstore: b: needed\n"
    assert exit_status(UnknownObject("gone")) == 1
    assert exit_status(NetworkError("down")) == 1
    assert exit_status(UsageError("what")) == 2


def test_storage_flags_win_over_storage_conf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "storage.conf"
    conf.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/a"\nrunroot = "{tmp_path}/b"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(conf))
    monkeypatch.chdir(tmp_path)
    assert common.StorageFlags().config().graph_root == tmp_path / "a"
    shared = tmp_path / "shared"
    flags = common.StorageFlags(
        root=Path("here"), runroot=Path("run"), storage_opt=(f"overlay.imagestore={shared}",)
    )
    config = flags.config()
    assert (config.graph_root, config.run_root) == (tmp_path / "here", tmp_path / "run")
    assert config.additional_image_stores == (shared,)


def test_credentials_of_the_command_line_go_to_one_registry_only() -> None:
    flags = common.RegistryFlags(creds="me:pass:word", tls_verify=False)
    settings = flags.settings(host="example.com")
    (source,) = settings.credential_sources
    found = source("example.com/team/app")
    assert found is not None
    assert (found.username, found.password) == ("me", "pass:word")
    assert source("mirror.example/team/app") is None
    assert settings.tls_verify is False
    assert common.RegistryFlags().settings().credential_sources == ()


def test_nobody_to_ask_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    with pytest.raises(UsageError, match="--force"):
        common.confirmed("sure?")
    monkeypatch.setattr("sys.stdin", Terminal())
    for answer, expected in (("y", True), ("Yes", True), ("", False), ("n", False)):
        monkeypatch.setattr("builtins.input", lambda _, said=answer: said)
        assert common.confirmed("sure?") is expected
