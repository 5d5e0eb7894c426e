"""Handing credentials to the additional layer store."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from layerstore import limits
from layerstore.image import Digest, Reference
from layerstore.registry import (
    AuthFile,
    Mirror,
    RegistriesConf,
    Registry,
    RegistryClient,
    RegistrySettings,
)
from layerstore.registry.alsauthhelper import hand_over

MakeClient = Callable[..., RegistryClient]


@pytest.fixture
def make_client(tmp_path: Path) -> MakeClient:
    """``make(script, auths)``: a client whose helper is that shell script."""

    def make(script: str, auths: dict[str, dict[str, str]] | None = None) -> RegistryClient:
        helper = tmp_path / "helper"
        helper.write_text(f"#!/bin/sh\n{script}\n")
        helper.chmod(0o755)
        auth = tmp_path / "auth.json"
        auth.write_text(json.dumps({"auths": auths or {}}))
        entry = Registry(
            prefix="h.example",
            location="h.example",
            mirror=(Mirror("mirror.example/copy"),),
        )
        conf = RegistriesConf((entry,), auth_helper=str(helper))
        return RegistryClient(RegistrySettings(conf, (AuthFile(auth),)))

    return make


def basic(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def test_the_helper_hears_the_physical_name_and_the_credential(
    make_client: MakeClient, tmp_path: Path
) -> None:
    client = make_client(
        f'[ $# = 0 ] && echo noise && echo noise >&2 && cat > "{tmp_path}/heard"',
        {"mirror.example": basic("u:p"), "h.example": basic("x:y")},
    )
    assert hand_over(client, Reference.parse("h.example/a/b:1")) is True
    assert json.loads((tmp_path / "heard").read_text()) == {
        "mirror.example/copy/a/b:1": {"username": "u", "password": "p"}
    }


def test_anonymous_access_by_digest(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client(f'cat > "{tmp_path}/heard"')
    digest = Digest.of(b"")
    assert hand_over(client, Reference.parse(f"other.example/a@{digest}")) is True
    assert (tmp_path / "heard").read_text() == f'{{"other.example/a@{digest}":{{}}}}'


def test_identity_tokens(make_client: MakeClient, tmp_path: Path) -> None:
    auths = {"other.example": {"identitytoken": "secret"}}
    client = make_client(f'cat > "{tmp_path}/heard"', auths)
    assert hand_over(client, Reference.parse("other.example/a")) is True
    assert json.loads((tmp_path / "heard").read_text()) == {
        "other.example/a:latest": {"identityToken": "secret"}
    }


@pytest.mark.parametrize("script", ["exit 3", "exec sleep 60", "exec /no/such/program"])
def test_a_helper_that_fails_is_a_warning(
    make_client: MakeClient,
    script: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "HELPER_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING):
        assert hand_over(make_client(script), Reference.parse("h.example/a")) is False
    assert len(caplog.records) == 1


def test_a_helper_that_is_not_there_and_a_broken_auth_file(
    make_client: MakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client("true")
    (tmp_path / "auth.json").write_text("{")
    assert hand_over(client, Reference.parse("h.example/a")) is False
    (tmp_path / "helper").unlink()
    (tmp_path / "auth.json").write_text("{}")
    assert hand_over(client, Reference.parse("h.example/a")) is False
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_without_a_helper_nothing_is_run() -> None:
    assert hand_over(RegistryClient(RegistrySettings()), Reference.parse("h.example/a")) is False
