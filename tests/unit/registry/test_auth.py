"""Basic authentication and tokens, by a client of the simulated registry."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.simregistry import SimRegistry
from layerstore.errors import AuthenticationError, RegistryError
from layerstore.image import Reference
from layerstore.registry import AuthFile, Credential, RegistryClient

MakeRegistry = Callable[..., SimRegistry]
MakeClient = Callable[..., RegistryClient]
MakeReference = Callable[..., Reference]

MANIFEST = b'{"schemaVersion":2}'
USERS = {"u": "p"}


def _as(user: str, password: str) -> dict[str, Any]:
    return {"credential_sources": (lambda _: Credential(user, password),)}


def _write(path: Path, host: str, user: str, password: str) -> None:
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


@pytest.fixture
def start(make_registry: MakeRegistry) -> MakeRegistry:
    def start(**options: Any) -> SimRegistry:
        registry = make_registry(**options)
        for name in ("a/b", "c/d"):
            registry.add_manifest(name, MANIFEST, "1")
        return registry

    return start


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_credentials_are_used_and_remembered(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference, auth: str
) -> None:
    registry = start(auth=auth, users=USERS)
    client = make_client(registry, **_as("u", "p"))
    for _ in range(5):
        assert client.manifest(reference(registry)).raw == MANIFEST
    assert registry.count("GET", "/manifests/") == 6  # the challenge only once
    assert registry.count("GET", "/token") == (1 if auth == "bearer" else 0)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
@pytest.mark.parametrize("user", [None, "wrong"])
def test_refused(
    start: MakeRegistry,
    make_client: MakeClient,
    reference: MakeReference,
    auth: str,
    user: str | None,
) -> None:
    registry = start(auth=auth, users=USERS)
    client = make_client(registry, **({} if user is None else _as(user, "p")))
    with pytest.raises(AuthenticationError) as caught:
        client.manifest(reference(registry))
    assert caught.value.status == 401
    assert caught.value.codes == ("UNAUTHORIZED",)
    assert registry.count() < 8


def test_anonymous_token(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", anonymous=True)
    assert make_client(registry).manifest(reference(registry)).raw == MANIFEST
    (asked,) = registry.requests("GET", "/token")
    assert asked.authorization is None
    assert "scope=repository%3Aa%2Fb%3Apull" in asked.path
    assert "service=sim" in asked.path


def test_each_repository_has_its_token(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", anonymous=True)
    client = make_client(registry)
    for name in ("a/b:1", "c/d:1", "a/b:1"):
        client.manifest(reference(registry, name))
    assert registry.count("GET", "/token") == 2


def test_token_is_renewed_when_it_expires(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference, clock: Any
) -> None:
    registry = start(auth="bearer", anonymous=True, token_seconds=300)
    client, ref = make_client(registry), reference(registry)
    client.manifest(ref)
    clock.now += 280
    client.manifest(ref)
    assert registry.count("GET", "/token") == 1
    clock.now += 20
    before = registry.count("GET", "/manifests/")
    client.manifest(ref)
    assert registry.count("GET", "/token") == 2
    assert registry.count("GET", "/manifests/") == before + 1  # renewed before it was refused


def test_a_token_is_renewed_before_it_expires_while_others_use_the_old_one(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference, clock: Any
) -> None:
    registry = start(auth="bearer", anonymous=True, token_seconds=1000)
    client, ref = make_client(registry, jitter=lambda: 0.0, read_seconds=10.0), reference(registry)
    client.manifest(ref)
    clock.now += 880
    client.manifest(ref)
    assert registry.count("GET", "/token") == 1
    clock.now += 20  # the last tenth
    slow = registry.fault("latency", "/token", seconds=1.0)
    renewing = threading.Thread(target=client.manifest, args=(ref,))
    renewing.start()
    while not slow.hits:
        pass
    client.manifest(ref)
    assert renewing.is_alive()
    renewing.join(10)
    assert registry.count("GET", "/token") == 2
    slow.times = 0
    registry.fault("status", "/token", status=503)
    clock.now += 900
    client.manifest(ref)  # the old one is still good
    assert registry.requests("GET", "/manifests/")[-1].status == 200


def test_an_old_token_that_gets_403_is_renewed(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference, clock: Any
) -> None:
    registry = start(auth="bearer", anonymous=True, token_seconds=1000)
    client, ref = make_client(registry), reference(registry)
    client.manifest(ref)
    clock.now += 100
    refused = registry.fault("status", "manifests", status=403, times=1)
    assert client.manifest(ref).raw == MANIFEST
    assert refused.hits == 1
    assert registry.count("GET", "/token") == 2
    registry.fault("status", "manifests", status=403)  # a new one is not the reason
    with pytest.raises(AuthenticationError):
        client.manifest(ref)
    assert registry.count("GET", "/token") == 2


def test_token_is_kept_for_a_minute_at_least(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference, clock: Any
) -> None:
    registry = start(auth="bearer", anonymous=True, announced_seconds=1)
    client, ref = make_client(registry), reference(registry)
    client.manifest(ref)
    clock.now += 59
    client.manifest(ref)
    assert registry.count("GET", "/token") == 1
    clock.now += 2
    client.manifest(ref)
    assert registry.count("GET", "/token") == 2


def test_revoked_token_is_renewed_once(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", anonymous=True)
    client, ref = make_client(registry), reference(registry)
    client.manifest(ref)
    registry.revoke_tokens()
    assert client.manifest(ref).raw == MANIFEST
    assert registry.count("GET", "/token") == 2


def test_registry_that_likes_no_token(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", anonymous=True, token_seconds=0, announced_seconds=300)
    with pytest.raises(AuthenticationError):
        make_client(registry).manifest(reference(registry))
    assert registry.count("GET", "/token") <= 3


def test_identity_token(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", identity_tokens=("refresh",))
    sources = (lambda _: Credential(identity_token="refresh"),)
    client = make_client(registry, credential_sources=sources)
    assert client.manifest(reference(registry)).raw == MANIFEST
    assert registry.count("POST", "/token") == 1
    assert registry.count("GET", "/token") == 0


def test_threads_do_not_stampede(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", anonymous=True)
    registry.fault("latency", "/token", seconds=0.2)
    client, ref = make_client(registry, read_seconds=10.0), reference(registry)
    good: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: good.append(client.manifest(ref).raw)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert good == [MANIFEST] * 8
    assert registry.count("GET", "/token") == 1


def test_waiting_threads_share_a_failure(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", users=USERS)
    registry.fault("latency", "/token", seconds=0.3)
    client, ref = make_client(registry, read_seconds=10.0), reference(registry)
    failed: list[int] = []

    def ask() -> None:
        try:
            client.manifest(ref)
        except AuthenticationError as error:
            failed.append(error.status)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert failed == [401] * 6
    assert registry.count("GET", "/token") < 4


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_changed_password_is_found_in_the_file(
    start: MakeRegistry,
    make_client: MakeClient,
    reference: MakeReference,
    tmp_path: Path,
    auth: str,
) -> None:
    registry = start(auth=auth, users=USERS)
    file = tmp_path / "auth.json"
    _write(file, registry.host, "u", "p")
    client, ref = make_client(registry, auth_files=(AuthFile(file),)), reference(registry)
    client.manifest(ref)
    registry.users["u"] = "new"
    registry.revoke_tokens()
    _write(file, registry.host, "u", "new")
    assert client.manifest(ref).raw == MANIFEST


def test_403_reads_the_file_again(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference, tmp_path: Path
) -> None:
    registry = start(auth="basic", users={"u": "p", "v": "q"})
    file = tmp_path / "auth.json"
    _write(file, registry.host, "u", "p")
    client, ref = make_client(registry, auth_files=(AuthFile(file),)), reference(registry)
    client.manifest(ref)
    refused = registry.fault("status", "manifests", status=403, times=1)
    _write(file, registry.host, "v", "q")
    assert client.manifest(ref).raw == MANIFEST
    assert refused.hits == 1
    registry.fault("status", "manifests", status=403)
    before = registry.count("GET", "manifests")
    with pytest.raises(AuthenticationError):
        client.manifest(ref)
    assert registry.count("GET", "manifests") == before + 1


def test_token_server_errors_are_retried(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", anonymous=True)
    fault = registry.fault("status", "/token", status=503, times=2)
    assert make_client(registry).manifest(reference(registry)).raw == MANIFEST
    assert fault.hits == 2


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"token":""}', b'{"token":"a\\nb"}', b'{"token":7}', b"\xff"]
)
def test_token_answer_that_is_none(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference, body: bytes
) -> None:
    registry = start(auth="bearer", anonymous=True)
    registry.fault("status", "/token", status=200, data=body)
    with pytest.raises(AuthenticationError, match="token"):
        make_client(registry).manifest(reference(registry))


def test_endless_token_answer(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry = start(auth="bearer", anonymous=True)
    registry.fault("status", "/token", status=200, data=b" " * 2_000_000)
    with pytest.raises(Exception, match="at most") as caught:
        make_client(registry).manifest(reference(registry))
    assert type(caught.value).__name__ == "LimitExceeded"


def test_credentials_do_not_follow_the_token_servers_redirect(
    start: MakeRegistry, make_client: MakeClient, reference: MakeReference
) -> None:
    registry, thief = start(auth="bearer", users=USERS), start()
    registry.fault("redirect", "/token", value=f"{thief.url}/token")
    with pytest.raises((AuthenticationError, RegistryError)):
        make_client(registry, **_as("u", "p")).manifest(reference(registry))
    seen = thief.requests()
    assert seen
    assert all(entry.authorization is None for entry in seen)


def test_secure_registry_cannot_ask_for_the_password_over_http(
    start: MakeRegistry,
    make_client: MakeClient,
    reference: MakeReference,
    certificates: dict[str, Path],
) -> None:
    plain = start()
    registry = start(tls=(certificates["server.crt"], certificates["server.key"]))
    challenge = f'Bearer realm="{plain.url}/token",service="x"'
    registry.fault("status", "manifests", status=401, headers={"WWW-Authenticate": challenge})
    client = make_client(cert_directory=certificates["authority"], **_as("u", "p"))
    with pytest.raises(AuthenticationError, match="plain HTTP"):
        client.manifest(reference(registry))
    assert plain.count() == 0


def test_secrets_stay_out_of_texts() -> None:
    credential = Credential("user", "s3cret", "t0ken")
    assert "s3cret" not in repr(credential)
    assert "t0ken" not in repr(credential)
