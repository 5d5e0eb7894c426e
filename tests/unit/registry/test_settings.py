"""Settings from the machine, certificates and proxies."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from layerstore.errors import ConfigError
from layerstore.image import Reference
from layerstore.registry import Credential, RegistrySettings
from layerstore.registry.tls import cert_directories, make_context


def test_from_system_reads_every_place(tmp_path: Path) -> None:
    etc, home = tmp_path / "etc", tmp_path / "home"
    (etc / "containers").mkdir(parents=True)
    (etc / "containers/registries.conf").write_text(
        '[[registry]]\nlocation="r.example"\ninsecure=true'
    )
    settings = RegistrySettings.from_system(env={}, home=home, uid=42, etc=etc)
    (place,) = settings.registries.endpoints(Reference.parse("r.example/x"))
    assert place.insecure
    assert settings.auth_files[0].path == Path("/run/containers/42/auth.json")
    assert settings.cert_directories == (
        home / ".config/containers/certs.d",
        etc / "containers/certs.d",
        etc / "docker/certs.d",
    )


def test_a_user_in_a_namespace_of_his_own_keeps_his_auth_file(tmp_path: Path) -> None:
    env = {"_CONTAINERS_ROOTLESS_UID": "42"}
    settings = RegistrySettings.from_system(env=env, home=tmp_path, etc=tmp_path)
    assert settings.auth_files[0].path == Path("/run/containers/42/auth.json")


def test_what_the_user_names_wins(tmp_path: Path) -> None:
    conf = tmp_path / "r.conf"
    with pytest.raises(ConfigError):
        RegistrySettings.from_system(env={}, home=tmp_path, etc=tmp_path, registries_conf=conf)
    conf.write_text("")
    settings = RegistrySettings.from_system(
        env={"REGISTRY_AUTH_FILE": "/other"},
        home=tmp_path,
        etc=tmp_path,
        registries_conf=conf,
        auth_file=tmp_path / "auth",
    )
    assert [file.path for file in settings.auth_files] == [tmp_path / "auth"]


def test_sources_are_put_in_front() -> None:
    def first(_: str) -> Credential | None:
        return None

    def second(_: str) -> Credential | None:
        return None

    settings = RegistrySettings(credential_sources=(second,)).with_sources(first)
    assert settings.credential_sources == (first, second)


def test_proxies() -> None:
    settings = RegistrySettings(
        proxies={"https": "http://proxy:3128", "no": ".inside.example,plain.example"}
    )
    assert settings.proxy_for("https", "r.example") == "http://proxy:3128"
    assert settings.proxy_for("http", "r.example") is None
    for host in ("a.inside.example", "plain.example", "localhost", "127.0.0.1", "::1"):
        assert settings.proxy_for("https", host) is None


class TestCertificates:
    def test_directories(self) -> None:
        found = cert_directories({"XDG_CONFIG_HOME": "/c"}, Path("/h"))
        assert str(found[0]) == "/c/containers/certs.d"

    def test_first_directory_for_the_host_and_its_port(
        self, tmp_path: Path, certificates: dict[str, Path]
    ) -> None:
        places = (tmp_path / "a", tmp_path / "b")
        before = len(make_context("h:5000", places).get_ca_certs())
        place = tmp_path / "b/h:5000"
        place.mkdir(parents=True)
        (place / "x.crt").write_bytes(certificates["ca.crt"].read_bytes())
        assert len(make_context("h:5000", places).get_ca_certs()) == before + 1
        assert len(make_context("h", places).get_ca_certs()) == before
        (tmp_path / "a/h:5000").mkdir(parents=True)
        assert len(make_context("h:5000", places).get_ca_certs()) == before

    def test_client_certificate_needs_both_halves(
        self, tmp_path: Path, certificates: dict[str, Path]
    ) -> None:
        (tmp_path / "c.cert").write_bytes(certificates["server.crt"].read_bytes())
        with pytest.raises(ConfigError, match="missing"):
            make_context("h", (), explicit=tmp_path)
        (tmp_path / "c.key").write_bytes(certificates["server.key"].read_bytes())
        assert isinstance(make_context("h", (), explicit=tmp_path), ssl.SSLContext)
        (tmp_path / "c.cert").unlink()
        with pytest.raises(ConfigError, match="missing"):
            make_context("h", (), explicit=tmp_path)

    def test_broken_certificate(self, tmp_path: Path) -> None:
        (tmp_path / "c.crt").write_text("nonsense")
        with pytest.raises(ConfigError, match=r"c\.crt"):
            make_context("h", (), explicit=tmp_path)

    def test_insecure_checks_nothing(self) -> None:
        context = make_context("h", (), insecure=True)
        assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_NONE)
