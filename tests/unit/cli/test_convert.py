"""``layerstore convert`` from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lab import oci, tars
from layerstore.cli import main


@pytest.fixture
def source(tmp_path: Path) -> str:
    out = io.BytesIO()
    tars.write_tar(out, [tars.directory(b"etc"), tars.regular(b"etc/hosts", b"localhost\n")])
    return oci.write_image(
        tmp_path / "in", "v1", [oci.LayerSource(out.getvalue())], oci.RunConfig()
    ).source


def run(*arguments: str) -> int:
    try:
        main(("convert", *arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_json_names_all_digests(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, f"oci:{tmp_path}/out:v1", "--json", "--level", "9") == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    stored = oci.read_image(tmp_path / "out", "v1")
    assert report["digest"] == stored.digest
    (layer,) = report["images"][0]["layers"]
    assert (layer["digest"], layer["size"]) == (stored.layers[0].digest, stored.layers[0].size)
    assert layer["diffId"] == stored.layers[0].diff_id
    assert layer["kept"] is False
    assert said.err == f"Copying blob {layer['source']}\n"


def test_plain_words_and_quiet(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, f"oci:{tmp_path}/out:v1", "-q") == 0
    said = capsys.readouterr()
    digest = oci.read_image(tmp_path / "out", "v1").digest
    assert said.out.splitlines()[-1] == f"oci:{tmp_path}/out:v1@{digest}"
    assert said.err == ""


def test_files_to_place_first_come_from_the_line_and_from_lists(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = tmp_path / "wanted"
    wanted.write_text("/etc/hosts\n\n/nowhere\n")
    arguments = ("--prioritize", "/also/nowhere", "--prioritize", f"@{wanted}", "--quiet")
    assert run(source, f"oci:{tmp_path}/out:v1", *arguments, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["notFound"] == ["/also/nowhere", "/nowhere"]
    assert said.err.count("no layer holds") == 2


def test_a_list_may_hold_any_bytes(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = tmp_path / "wanted"
    wanted.write_bytes(b"\xff\x1b[31m\n")
    arguments = ("--prioritize", f"@{wanted}", "--quiet", "--json")
    assert run(source, f"oci:{tmp_path}/out:v1", *arguments) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["notFound"] == ["\ufffd\x1b[31m"]
    assert said.err.rstrip("\n").isprintable()


def test_zstd_chunked_leaves_the_diff_id(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--format", "zstd:chunked", "--level", "3", "--chunk-size", "8192", "--json")
    assert run(source, f"oci:{tmp_path}/out:v1", *options) == 0
    report = json.loads(capsys.readouterr().out)
    (layer,) = report["images"][0]["layers"]
    assert layer["diffId"] == oci.read_image(tmp_path / "in", "v1").layers[0].diff_id
    (stored,) = oci.read_image(tmp_path / "out", "v1").layers
    assert stored.media_type == "application/vnd.oci.image.layer.v1.tar+zstd"
    assert "tocImage" not in report


def test_the_image_of_external_tocs_is_named(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, f"oci:{tmp_path}/out:v1", "--external-toc", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tocImage"] == f"oci:{tmp_path}/out:v1-esgztoc"
    assert run(source, f"oci:{tmp_path}/out:v2", "--external-toc", "--quiet") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"oci:{tmp_path}/out:v2-esgztoc@{report['tocImageDigest']}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--level", "0"),
        ("--chunk-size", "1"),
        ("--platform", "linux"),
        ("--prioritize", "@/no/such/list"),
        ("--prioritize", "../q/a"),
        ("--prioritize", "a" * 5000),
        ("--format", "zstd:chunked", "--external-toc"),
        ("--format", "zstd:chunked", "--prioritize", "etc"),
        ("--format", "zstd:chunked", "--min-chunk-size", "4096"),
        ("--format", "zstd:chunked", "--level", "20"),
        ("--external-toc", "--prioritize", "etc"),
    ],
)
def test_wrong_options_end_with_status_2(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(source, f"oci:{tmp_path}/out:v1", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("layerstore: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "form", [(), ("--external-toc",), ("--format", "zstd:chunked")], ids=["estargz", "toc", "zstd"]
)
@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (
            [tars.symlink(b"lib2", b"usr/lib2"), tars.regular(b"lib2/x\x1b", b"x")],
            "lib2/x\\x1b: an entry below one that is no directory",
        ),
        ([tars.regular(b"q/../q/e", b"e")], "'..'"),
    ],
    ids=["below-a-link", "dots"],
)
def test_a_layer_that_nobody_could_read_lazily_stays_and_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: tuple[str, ...],
    odd: list[tars.Member],
    said: str,
) -> None:
    layers = []
    for members in (odd, [tars.regular(b"etc/hosts", b"localhost\n")]):
        out = io.BytesIO()
        tars.write_tar(out, members)
        layers.append(oci.LayerSource(out.getvalue()))
    source = oci.write_image(tmp_path / "in", "v1", layers, oci.RunConfig())
    assert run(source.source, f"oci:{tmp_path}/out:v1", *form, "--quiet", "--json") == 0
    output, errors = capsys.readouterr()
    assert errors.startswith(f"layerstore: layer {source.layers[0].digest} stays as it is, ")
    assert said in errors
    assert errors.count("\n") == 1
    assert errors.rstrip("\n").isprintable()
    stays, other = json.loads(output)["images"][0]["layers"]
    assert (stays["kept"], stays["digest"]) == (True, source.layers[0].digest)
    assert stays["problem"]
    assert (other["kept"], other["problem"]) == (False, "")
    there = oci.read_image(tmp_path / "out", "v1")
    assert [layer.digest for layer in there.layers] == [stays["digest"], other["digest"]]
    assert there.layers[0].diff_id == source.layers[0].diff_id


def test_an_image_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"oci:{tmp_path}/none:v1", f"oci:{tmp_path}/out:v1") == 1
    assert "no OCI layout" in capsys.readouterr().err
