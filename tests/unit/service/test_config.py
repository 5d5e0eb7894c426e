from __future__ import annotations

from pathlib import Path

import pytest

from layerstore.content import DiskRoom
from layerstore.errors import ConfigError
from layerstore.provider import DialectL, Ordinary, Outage, Policy
from layerstore.service import Config, load


def test_a_missing_named_file_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.toml")


def test_an_empty_file_means_the_defaults(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text("")
    assert load(path) == Config()


def test_every_documented_key_is_taken(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text(
        'dialect_l = "verified"\n'
        'root = "/srv/ls"\nprefetch = false\nbackground_fetch = false\nlog_level = "debug"\n'
        "silent_seconds = 7.5\n"
        '[registry]\nauthfile = "/a.json"\nregistries_conf = "/r.conf"\n'
        '[repair]\nenabled = false\ngraph_roots = ["/srv/root"]\n'
        '[ordinary]\npolicy = "known"\neager_seconds = 3.5\n'
        '[ordinary.prefixes]\n"host.example/ai" = "eager"\n'
        '[outage]\npolicy = "fail"\nwait_seconds = 20\n'
        '[outage.prefixes]\n"host.example" = "wait"\n'
        '[disk]\nlimit = "1.5 GiB"\nkeep_free_percent = 20\n'
    )
    config = load(path)
    assert (config.root, config.prefetch, config.background_fetch) == ("/srv/ls", False, False)
    assert config.silent_seconds == 7.5
    assert config.registry.authfile == "/a.json"
    assert config.registry.registries_conf == "/r.conf"
    assert (config.repair.enabled, config.repair.graph_roots) == (False, ("/srv/root",))
    assert config.policy == Policy(
        dialect_l=DialectL.VERIFIED,
        ordinary=Ordinary.KNOWN,
        ordinary_by_prefix={"host.example/ai": Ordinary.EAGER},
        eager_seconds=3.5,
        outage=Outage.FAIL,
        outage_by_prefix={"host.example": Outage.WAIT},
        wait_seconds=20,
        disk=DiskRoom(3 << 29, 0.2),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prefetsh = true", "prefetsh"),
        ('prefetch = "yes"', "prefetch"),
        ('dialect_l = "maybe"', "dialect_l"),
        ('[ordinary]\npolicy = "always"', "policy"),
        ("[ordinary]\neager_seconds = 25", "eager_seconds"),
        ('[ordinary.prefixes]\nx = "never"', """`ordinary.prefixes."x"`"""),
        ('[outage]\npolicy = "panic"', "policy"),
        ("[outage]\nwait_seconds = 1e9", "wait_seconds"),
        ('[disk]\nlimit = "much"', "disk.limit"),
        ("[disk]\nlimit = -1", "disk.limit"),
        ("[disk]\nkeep_free_percent = 101", "keep_free_percent"),
        ('root = "relative"', "absolute"),
        ('log_level = "loud"', "log_level"),
        ("silent_seconds = -1", "silent_seconds"),
        ("silent_seconds = 0.5", "silent_seconds: at least 1, or 0"),
        ('root = "/x\\u0000y"', "root must be an absolute path"),
        ('[ordinary.prefixes]\n"https://docker.io" = "off"', "ordinary.prefixes: no reference"),
        ('[ordinary.prefixes]\n"" = "off"', "begins with ''"),
        ('[ordinary.prefixes]\n"*.exa*mple.com" = "off"', "begins with '*.exa*mple.com'"),
        ('[ordinary.prefixes]\n"host.example/" = "off"', "begins with 'host.example/'"),
        ('[outage.prefixes]\n"a b" = "fail"', "outage.prefixes: no reference begins with 'a b'"),
        ('[outage.prefixes]\n"library/app" = "fail"', "begins with 'library/app'"),
        (
            '[outage.prefixes]\n"a.example" = "fail"\n"b.example" = "fial"',
            """Invalid enum value 'fial' - at `outage.prefixes."b.example"`""",
        ),
        ("[ordinary.prefixes]\n'b.example' = 3", """at `ordinary.prefixes."b.example"`"""),
        ("[registry]\nauthfle = '/x'", "authfle"),
        ("root = ", "TOML"),
        ('[registry]\nauthfile = "x"', "absolute"),
        ('[repair]\ngraph_roots = ["x"]', "absolute"),
        ('[repair]\nimage_stores = ["x"]', "absolute"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "prefix",
    [
        "docker.io",
        "localhost",
        "host.example:5000",
        "host.example/a/b",
        "host.example/a:tag",
        f"host.example/a@sha256:{'0' * 64}",
        "*.example.com",
    ],
)
def test_prefixes_of_references_are_taken(tmp_path: Path, prefix: str):
    path = tmp_path / "config.toml"
    path.write_text(f'[outage.prefixes]\n"{prefix}" = "fail"\n')
    assert load(path).outage.prefixes == {prefix: Outage.FAIL}
