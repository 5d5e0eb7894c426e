"""Auth files and credential helpers."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerstore import limits
from layerstore.errors import ConfigError
from layerstore.registry import AuthFile, Credential, CredentialStore
from layerstore.registry.credentials import auth_files, keys, run_helper


def _entry(name: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{name}:password".encode()).decode()}


def _auths(path: Path, **content: Any) -> AuthFile:
    path.write_text(json.dumps(content))
    return AuthFile(path)


def _user(store: CredentialStore, repository: str) -> str | None:
    found = store.lookup(repository)
    return None if found is None else found.username


@pytest.fixture
def helper(tmp_path: Path) -> Callable[[str, str], dict[str, str]]:
    """Writes ``docker-credential-NAME`` and gives an environment that finds it."""

    def make(name: str, script: str) -> dict[str, str]:
        path = tmp_path / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    return make


class TestPlaces:
    def test_order(self) -> None:
        env = {"XDG_RUNTIME_DIR": "/run/user/7"}
        assert [str(file.path) for file in auth_files(env, Path("/h"), 7)] == [
            "/run/user/7/containers/auth.json",
            "/h/.config/containers/auth.json",
            "/h/.docker/config.json",
            "/h/.dockercfg",
        ]

    def test_variables(self) -> None:
        env = {"XDG_CONFIG_HOME": "/c", "DOCKER_CONFIG": "/d"}
        assert [str(file.path) for file in auth_files(env, None, 7)] == [
            "/run/containers/7/auth.json",
            "/c/containers/auth.json",
            "/d/config.json",
        ]

    def test_explicit_file_is_the_only_one(self) -> None:
        assert auth_files({"REGISTRY_AUTH_FILE": "/x"}, Path("/h"), 0) == (
            AuthFile(Path("/x"), required=True),
        )


class TestFiles:
    def test_most_specific_key_wins(self, tmp_path: Path) -> None:
        names = ("host:5000", "host:5000/ns", "host:5000/ns/repo")
        file = _auths(tmp_path / "a", auths={name: _entry(name) for name in names})
        store = CredentialStore((file,))
        # The user name ends at the first colon.
        found = {
            name: store.lookup(name)
            for name in ("host:5000/ns/repo", "host:5000/ns/other", "host:5000/nsx/repo")
        }
        assert [c and c.password for c in found.values()] == [
            "5000/ns/repo:password",
            "5000/ns:password",
            "5000:password",
        ]
        assert store.lookup("host/ns/repo") is None

    def test_keys(self) -> None:
        assert list(keys("h/a/b")) == ["h/a/b", "h/a", "h"]

    @pytest.mark.parametrize(
        ("key", "repository"),
        [
            ("https://index.docker.io/v1/", "docker.io/library/x"),
            ("index.docker.io", "docker.io/library/x"),
            ("docker.io", "docker.io/library/x"),
            ("https://host.example/v2/", "host.example/x"),
            ("http://host.example", "host.example/x"),
        ],
    )
    def test_old_keys(self, tmp_path: Path, key: str, repository: str) -> None:
        store = CredentialStore((_auths(tmp_path / "a", auths={key: _entry("u")}),))
        assert _user(store, repository) == "u"
        assert store.lookup("other.example/x") is None

    def test_other_repositorys_key_is_not_taken(self, tmp_path: Path) -> None:
        store = CredentialStore((_auths(tmp_path / "a", auths={"host/ns": _entry("u")}),))
        assert store.lookup("host/other") is None

    def test_legacy_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        path.write_text(json.dumps({"https://host/v1/": _entry("u")}))
        assert _user(CredentialStore((AuthFile(path, legacy=True),)), "host/x") == "u"

    def test_first_file_with_an_answer(self, tmp_path: Path) -> None:
        files = (
            AuthFile(tmp_path / "missing"),
            _auths(tmp_path / "a", auths={"host": {}, "other": _entry("z")}),
            _auths(tmp_path / "b", auths={"host": _entry("u")}),
            _auths(tmp_path / "c", auths={"host": _entry("v")}),
        )
        assert _user(CredentialStore(files), "host/x") == "u"

    def test_identity_token_and_padding(self, tmp_path: Path) -> None:
        auth = base64.b64encode(b"u:pass\0\0").decode()
        entry = {"auth": auth, "identitytoken": "t"}
        store = CredentialStore((_auths(tmp_path / "a", auths={"host": entry}),))
        assert store.lookup("host/x") == Credential("u", "pass", "t")

    def test_broken_file_matters_only_if_nothing_is_found(self, tmp_path: Path) -> None:
        broken = AuthFile(tmp_path / "broken")
        broken.path.write_text("{")
        good = _auths(tmp_path / "a", auths={"host": _entry("u")})
        store = CredentialStore((broken, good))
        assert _user(store, "host/x") == "u"
        with pytest.raises(ConfigError, match="broken"):
            store.lookup("other/x")

    @pytest.mark.parametrize(
        "auth", ["!!!", "\u00e9", base64.b64encode(b"no colon").decode(), "w7wK/w=="]
    )
    def test_broken_entry(self, tmp_path: Path, auth: str) -> None:
        store = CredentialStore((_auths(tmp_path / "a", auths={"host": {"auth": auth}}),))
        with pytest.raises(ConfigError):
            store.lookup("host/x")

    def test_answers_are_remembered_until_refreshed(self, tmp_path: Path) -> None:
        file = _auths(tmp_path / "a", auths={"host": _entry("u")})
        store = CredentialStore((file,))
        assert _user(store, "host/x") == "u"
        _auths(file.path, auths={"host": _entry("v")})
        assert _user(store, "host/x") == "u"
        found = store.lookup("host/x", refresh=True)
        assert found is not None
        assert found.username == "v"

    def test_what_is_known_stays_where_it_cannot_be_read_again(self, tmp_path: Path) -> None:
        file = _auths(tmp_path / "a", auths={"host": _entry("u")})
        store = CredentialStore((file,))
        assert _user(store, "host/x") == "u"
        file.path.write_text("{broken")
        found = store.lookup("host/x", refresh=True)
        assert found is not None
        assert found.username == "u"
        with pytest.raises(ConfigError):
            store.lookup("other/x")

    def test_many_who_are_refused_at_once_read_once(self) -> None:
        asked: list[str] = []
        gate = threading.Event()

        def source(repository: str) -> Credential:
            asked.append(repository)
            gate.wait(10)
            return Credential(f"u{len(asked)}")

        store = CredentialStore((), (source,))
        found: list[Credential | None] = []
        threads = [
            threading.Thread(target=lambda: found.append(store.lookup("host/x", refresh=True)))
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        gate.set()
        for thread in threads:
            thread.join(10)
        assert len(found) == 20
        assert len(asked) <= 2  # who came while it was being read cannot tell how new that is

    def test_sources_come_first(self, tmp_path: Path) -> None:
        file = _auths(tmp_path / "a", auths={"host": _entry("u")})
        asked: list[str] = []

        def source(repository: str) -> Credential | None:
            asked.append(repository)
            return Credential("s") if repository == "host/x" else None

        store = CredentialStore((file,), (source,))
        assert _user(store, "host/x") == "s"
        assert _user(store, "host/y") == "u"
        assert asked == ["host/x", "host/y"]


class TestHelpers:
    Make = Callable[[str, str], dict[str, str]]

    def test_user_and_password(self, helper: Make) -> None:
        script = 'read host; echo "{\\"ServerURL\\":\\"$host\\",\\"Username\\":\\"$1\\",'
        env = helper("good", script + '\\"Secret\\":\\"$host\\"}"')
        assert run_helper("good", "reg:5000", env) == Credential("get", "reg:5000")

    def test_identity_token(self, helper: Make) -> None:
        env = helper("token", """echo '{"Username":"<token>","Secret":"s"}'""")
        assert run_helper("token", "host", env) == Credential(identity_token="s")

    def test_nothing_found(self, helper: Make) -> None:
        env = helper("empty", "echo credentials not found in native keychain; exit 1")
        assert run_helper("empty", "host", env) is None

    @pytest.mark.parametrize("script", ["exit 3", "echo nonsense", "echo '[]'"])
    def test_broken(self, helper: Make, script: str) -> None:
        with pytest.raises(ConfigError):
            run_helper("broken", "host", helper("broken", script))

    @pytest.mark.parametrize("name", ["does-not-exist-at-all", "../x", ""])
    def test_cannot_be_run(self, name: str) -> None:
        with pytest.raises(ConfigError):
            run_helper(name, "host")

    def test_time_out(self, helper: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "HELPER_SECONDS", 0.2)
        with pytest.raises(ConfigError, match="no answer"):
            run_helper("slow", "host", helper("slow", "exec sleep 30"))

    def test_cred_helpers_are_final(self, helper: Make, tmp_path: Path) -> None:
        env = helper("none", "echo credentials not found; exit 1")
        file = _auths(tmp_path / "a", auths={"host": _entry("u")}, credHelpers={"host": "none"})
        store = CredentialStore((file,), env=env)
        assert store.lookup("host/x") is None
        assert store.lookup("other/x") is None

    def test_creds_store_comes_last(self, helper: Make, tmp_path: Path) -> None:
        env = helper("store", """echo '{"Username":"stored","Secret":"s"}'""")
        file = _auths(tmp_path / "a", auths={"host": _entry("u"), "empty": {}}, credsStore="store")
        store = CredentialStore((file,), env=env)
        assert _user(store, "host/x") == "u"
        assert _user(store, "empty/x") == "stored"


class TestHelperOrder:
    """``credential-helpers`` of registries.conf."""

    def _answer(self, name: str) -> str:
        return f'cat >/dev/null; echo \'{{"Username":"{name}","Secret":"s"}}\''

    def test_helpers_are_asked_in_order(
        self, tmp_path: Path, helper: Callable[[str, str], dict[str, str]]
    ) -> None:
        file = _auths(tmp_path / "a", auths={"host": _entry("file")})
        env = helper("one", self._answer("one"))
        for helpers, wanted in (
            (("one", "containers-auth.json"), "one"),
            (("containers-auth.json", "one"), "file"),
            (("one",), "one"),
        ):
            assert _user(CredentialStore((file,), (), env, helpers), "host/x") == wanted

    def test_one_without_an_answer_passes_on_to_the_next(
        self, tmp_path: Path, helper: Callable[[str, str], dict[str, str]]
    ) -> None:
        file = _auths(tmp_path / "a", credHelpers={"host": "none"}, auths={"host": _entry("u")})
        env = helper("none", "echo credentials not found in native keychain; exit 1")
        env = helper("two", self._answer("two")) | env
        store = CredentialStore((file,), (), env, ("none", "containers-auth.json", "two"))
        assert _user(store, "host/x") == "two"

    def test_a_broken_one_counts_only_if_nothing_is_found(
        self, tmp_path: Path, helper: Callable[[str, str], dict[str, str]]
    ) -> None:
        file = _auths(tmp_path / "a", auths={"host": _entry("file")})
        env = helper("broken", "exit 3")
        store = CredentialStore((file,), (), env, ("broken", "containers-auth.json"))
        assert _user(store, "host/x") == "file"
        with pytest.raises(ConfigError):
            store.lookup("other/x")
