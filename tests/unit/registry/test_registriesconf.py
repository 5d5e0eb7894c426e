"""registries.conf: choice by prefix, rewriting, mirrors, files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import ConfigError
from layerstore.image import Digest, Reference
from layerstore.registry import Endpoint, RegistriesConf
from layerstore.registry.registriesconf import load, parse, system_files


def _conf(text: str) -> RegistriesConf:
    content = parse(text)
    return RegistriesConf(content.registry, content.unqualified_search_registries or ())


def _places(text: str, reference: str) -> list[str]:
    found = _conf(text).endpoints(Reference.parse(reference))
    return [f"{'!' if place.insecure else ''}{place.physical}" for place in found]


def test_unknown_registry_is_itself() -> None:
    assert _conf("").endpoints(Reference.parse("h.example/a:1")) == (Endpoint("h.example", "a"),)


@pytest.mark.parametrize(
    ("prefix", "reference", "matches"),
    [
        ("example.com", "example.com/a", True),
        ("example.com", "example.com:5000/a", True),
        ("example.com", "example.comx/a", False),
        ("example.com/a", "example.com/a/b", True),
        ("example.com/a", "example.com/ab", False),
        ("example.com/a", "example.com/a@sha256:" + "a" * 64, True),
        ("*.example.com", "x.example.com/a", True),
        ("*.example.com", "x.y.example.com:5000/a", True),
        ("*.example.com", "example.com/a", False),
        ("*.example.com", "other.com/x.example.com", False),
        ("docker.io/library", "alpine", True),
    ],
)
def test_prefixes(prefix: str, reference: str, matches: bool) -> None:
    location = "" if prefix.startswith("*") else 'location="new.example"'
    conf = _conf(f'[[registry]]\nprefix="{prefix}"\n{location}')
    assert (conf.find(Reference.parse(reference)) is not None) is matches


def test_longest_prefix_rewrites() -> None:
    text = """
        [[registry]]
        prefix = "example.com"
        location = "one.example"
        [[registry]]
        prefix = "example.com/a/"
        location = "two.example:5000/x/y/"
        insecure = true
    """
    assert _places(text, "example.com/b:1") == ["one.example/b"]
    assert _places(text, "example.com/a/b:1") == ["!two.example:5000/x/y/b"]


def test_mirrors_in_order_then_the_primary() -> None:
    text = """
        [[registry]]
        location = "example.com"
        [[registry.mirror]]
        location = "m1.example/cache"
        insecure = true
        [[registry.mirror]]
        location = "m2.example"
        pull-from-mirror = "digest-only"
        [[registry.mirror]]
        location = "m3.example"
        pull-from-mirror = "tag-only"
    """
    digest = Digest.of(b"")
    by_tag = ["!m1.example/cache/a", "m3.example/a", "example.com/a"]
    by_digest = ["!m1.example/cache/a", "m2.example/a", "example.com/a"]
    assert _places(text, "example.com/a:1") == by_tag
    assert _places(text, f"example.com/a@{digest}") == by_digest
    pinned = _conf(text).endpoints(Reference.parse("example.com/a:1"), digested=True)
    assert [place.mirror for place in pinned] == [True, True, False]
    assert pinned[1].host == "m2.example"


def test_docker_hub_prefix_with_library() -> None:
    text = '[[registry]]\nprefix="docker.io"\nlocation="mirror.example/hub"'
    assert _places(text, "alpine") == ["mirror.example/hub/library/alpine"]


def test_blocked_concerns_the_place_contacted() -> None:
    text = """
        [[registry]]
        location = "example.com"
        blocked = true
        [[registry.mirror]]
        location = "m.example"
    """
    assert _places(text, "example.com/a") == ["m.example/a"]
    with pytest.raises(ConfigError, match="blocked"):
        _places('[[registry]]\nlocation="example.com"\nblocked=true', "example.com/a")
    with pytest.raises(ConfigError, match="blocked"):
        _conf(text).push_endpoint(Reference.parse("example.com/a"))


def test_push_is_not_rewritten() -> None:
    text = '[[registry]]\nprefix="example.com"\nlocation="other.example"\ninsecure=true'
    place = _conf(text).push_endpoint(Reference.parse("example.com/a"))
    assert (place.physical, place.insecure) == ("example.com/a", True)


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "registry = 1",
        "[[registry]]\ninsecure = true",
        '[[registry]]\nprefix = "a.example"',
        '[[registry]]\nlocation = "http://a.example"',
        '[[registry]]\nprefix = "*.a.example/x"',
        '[[registry]]\nlocation = "a.example"\ninsecure = "yes"',
        '[[registry]]\nlocation = "a"\n[[registry.mirror]]\nlocation = ""',
        '[[registry]]\nlocation = "a"\n[[registry.mirror]]\nlocation="b"\npull-from-mirror="x"',
        '[[registry]]\nlocation = "a"\nmirror-by-digest-only = true\n'
        '[[registry.mirror]]\nlocation="b"\npull-from-mirror="all"',
        'unqualified-search-registries = ["a"]\n[registries.search]\nregistries = ["b"]',
    ],
)
def test_broken(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_location_that_is_no_registry() -> None:
    text = '[[registry]]\nprefix="example.com"\nlocation="nodots"'
    with pytest.raises(ConfigError, match="rewrites"):
        _places(text, "example.com/a")


def test_version_1() -> None:
    conf = _conf(
        '[registries.search]\nregistries=["s"]\n[registries.insecure]\nregistries=["i.example"]\n'
        '[registries.block]\nregistries=["b.example"]'
    )
    assert conf.search == ("s",)
    assert conf.push_endpoint(Reference.parse("i.example/a")).insecure
    with pytest.raises(ConfigError):
        conf.endpoints(Reference.parse("b.example/a"))


class TestFiles:
    def _write(self, path: Path, name: str, location: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f'[[registry]]\nprefix="p.example"\nlocation="{location}"')

    def _location(self, env: dict[str, str], home: Path, etc: Path) -> str:
        main, dropins, required = system_files(env, home, etc)
        conf = load(main, dropins, required=required)
        return conf.endpoints(Reference.parse("p.example/x"))[0].host

    def test_later_files_replace_earlier(self, tmp_path: Path) -> None:
        home, etc = tmp_path / "home", tmp_path / "etc"
        assert self._location({}, home, etc) == "p.example"
        self._write(etc, "registries.conf", "etc.example")
        assert self._location({}, home, etc) == "etc.example"
        self._write(etc / "registries.conf.d", "10.conf", "ten.example")
        self._write(etc / "registries.conf.d", "05.conf", "five.example")
        self._write(etc / "registries.conf.d", "99.txt", "text.example")
        assert self._location({}, home, etc) == "ten.example"
        self._write(home / ".config/containers/registries.conf.d", "01.conf", "user-d.example")
        assert self._location({}, home, etc) == "user-d.example"

    def test_users_main_file_hides_etc(self, tmp_path: Path) -> None:
        home, etc = tmp_path / "home", tmp_path / "etc"
        self._write(etc / "registries.conf.d", "10.conf", "ten.example")
        self._write(home / ".config/containers", "registries.conf", "user.example")
        assert self._location({}, home, etc) == "user.example"
        self._write(tmp_path / "xdg/containers", "registries.conf", "xdg.example")
        env = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
        assert self._location(env, home, etc) == "xdg.example"

    def test_explicit_file_must_exist(self, tmp_path: Path) -> None:
        env = {"CONTAINERS_REGISTRIES_CONF": str(tmp_path / "mine.conf")}
        with pytest.raises(ConfigError, match="does not exist"):
            self._location(env, tmp_path, tmp_path)
        self._write(tmp_path, "mine.conf", "mine.example")
        assert self._location(env, tmp_path, tmp_path) == "mine.example"

    def test_entries_that_disagree(self, tmp_path: Path) -> None:
        text = '[[registry]]\nprefix="{}"\nlocation="l.example"\ninsecure={}\n'
        file = tmp_path / "r.conf"
        file.write_text(text.format("a.example", "true") + text.format("b.example", "false"))
        with pytest.raises(ConfigError, match="disagree"):
            load(file)

    def test_broken_file_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "r.conf"
        file.write_bytes(b"\xff")
        with pytest.raises(ConfigError) as caught:
            load(file)
        assert caught.value.subject == str(file)


@given(st.text())
def test_any_text_is_taken_or_refused(text: str) -> None:
    try:
        parse(text)
    except ConfigError:
        return
