"""Manifests, blobs and ranges against a registry that behaves and one that does not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.simregistry import SimRegistry
from layerstore import limits
from layerstore.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineExceeded,
    LimitExceeded,
    NetworkError,
    NotFound,
    RateLimited,
    RegistryError,
    UsageError,
    VerificationError,
)
from layerstore.image import Digest, Reference, media_types
from layerstore.registry import BlobReader, Credential, Mirror, Registry, RegistryClient

MakeRegistry = Callable[..., SimRegistry]
MakeClient = Callable[..., RegistryClient]
MakeReference = Callable[..., Reference]
Opened = tuple[SimRegistry, RegistryClient, Callable[..., BlobReader]]
Redirected = tuple[SimRegistry, Callable[..., BlobReader], Digest]
Pair = tuple[SimRegistry, SimRegistry]

MANIFEST = b'{"schemaVersion":2}'
DATA = bytes(range(256)) * 4096  # 1 MiB


class TestManifest:
    def test_by_tag_and_by_digest(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        digest = Digest(registry.add_manifest("a/b", MANIFEST, "1"))
        client, ref = make_client(registry), reference(registry)
        by_tag = client.manifest(ref)
        assert (by_tag.raw, by_tag.media_type, by_tag.digest) == (
            MANIFEST,
            media_types.OCI_MANIFEST,
            digest,
        )
        assert client.manifest(ref, digest) == by_tag
        assert client.manifest(ref.with_digest(digest)) == by_tag
        accept = registry.requests("GET", "/manifests/1")[0].headers["accept"]
        assert all(kind in accept for kind in media_types.ALL_MANIFESTS)

    def test_bytes_are_checked_against_the_digest(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        digest = Digest(registry.add_manifest("a/b", MANIFEST, "1"))
        registry.fault("flip", "manifests", after=3)
        with pytest.raises(VerificationError):
            make_client(registry).manifest(reference(registry), digest)

    def test_docker_content_digest_is_only_a_hint(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        digest = registry.add_manifest("a/b", MANIFEST, "1")
        registry.fault("header", headers={"Docker-Content-Digest": "sha256:" + "0" * 64})
        assert make_client(registry).manifest(reference(registry)).digest == digest

    def test_unknown_has_the_registrys_code(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        with pytest.raises(NotFound) as caught:
            make_client(registry).manifest(reference(registry))
        assert caught.value.status == 404
        assert caught.value.codes == ("MANIFEST_UNKNOWN",)

    @pytest.mark.parametrize("kind", ["status", "chunked"])
    def test_body_is_bounded(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        kind: Any,
    ) -> None:
        registry = make_registry()
        registry.add_manifest("a/b", b" " * (limits.MANIFEST_BYTES + 1), "1")
        if kind == "chunked":
            registry.fault("chunked", "manifests")
        with pytest.raises(LimitExceeded):
            make_client(registry).manifest(reference(registry))

    def test_broken_body_is_fetched_again(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        registry.add_manifest("a/b", MANIFEST, "1")
        short = registry.fault("short", "manifests", after=5, times=1)
        reset = registry.fault("reset", "manifests", after=5, times=1)
        assert make_client(registry).manifest(reference(registry)).raw == MANIFEST
        assert (short.hits, reset.hits) == (1, 1)

    def test_content_encoding_is_refused(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        registry.add_manifest("a/b", MANIFEST, "1")
        registry.fault("header", "manifests", headers={"Content-Encoding": "gzip"})
        with pytest.raises(RegistryError, match="Content-Encoding"):
            make_client(registry).manifest(reference(registry))
        assert registry.requests("GET", "manifests")[0].headers["accept-encoding"] == "identity"


class TestBlob:
    def test_whole_and_verified(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        digest = Digest(registry.add_blob("a/b", DATA))
        client, ref = make_client(registry), reference(registry)
        assert client.blob(ref, digest, len(DATA)) == DATA
        with pytest.raises(LimitExceeded):
            client.blob(ref, digest, len(DATA) - 1)

    @pytest.mark.parametrize("kind", ["flip", "other"])
    def test_other_bytes_never_come_out(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        kind: Any,
    ) -> None:
        registry = make_registry()
        digest = Digest(registry.add_blob("a/b", DATA))
        registry.fault(kind, "blobs", after=77, data=b"something else")
        with pytest.raises(VerificationError):
            make_client(registry).blob(reference(registry), digest, len(DATA))


class TestRanges:
    @pytest.fixture
    def opened(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> Any:
        registry = make_registry()
        digest = Digest(registry.add_blob("a/b", DATA))
        client, ref = make_client(registry), reference(registry)
        return registry, client, lambda **kw: client.open_blob(ref, digest, **kw)

    def test_middle(self, opened: Opened) -> None:
        _, _, open_blob = opened
        with open_blob(offset=1000, length=5000, size=len(DATA)) as reader:
            assert (reader.start, reader.length, reader.total) == (1000, 5000, len(DATA))
            assert reader.partial
            assert reader.read(100) + reader.read(10_000) == DATA[1000:6000]
            assert reader.read(1) == b""

    def test_tail_is_cut_at_the_end_of_the_blob(self, opened: Opened) -> None:
        _, _, open_blob = opened
        with open_blob(offset=len(DATA) - 10, length=100) as reader:
            assert (reader.length, reader.read(100)) == (10, DATA[-10:])
        with open_blob(offset=len(DATA) - 10) as reader:
            assert (reader.length, reader.read(100)) == (10, DATA[-10:])

    def test_without_a_range_the_whole_blob(self, opened: Opened) -> None:
        registry, _, open_blob = opened
        with open_blob() as reader:
            assert not reader.partial
            assert reader.read(len(DATA) + 1) == DATA
        assert "range" not in registry.requests("GET", "blobs")[0].headers

    def test_ignored_range_is_left_to_the_caller(self, opened: Opened) -> None:
        registry, client, open_blob = opened
        registry.fault("ignore-range")
        before = client.stats.bytes
        with open_blob(offset=1000, length=10) as reader:
            assert (reader.partial, reader.start, reader.length) == (False, 0, len(DATA))
            assert client.stats.bytes == before
            assert reader.read(1010)[1000:] == DATA[1000:1010]
        assert registry.count("GET", "blobs") == 1

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "bytes 1001-1010/1048576",  # begins too late
            "bytes 1000-1010/1048576",  # one too many
            "bytes 1000-1008/1048576",  # one too few
            "bytes 1000-1009/1048577",  # another blob
            "bytes 1009-1000/1048576",
            "bytes 1000-1009/5",
            "items 1000-1009/1048576",
            "bytes */1048576",
        ],
    )
    def test_wrong_content_range(self, opened: Opened, value: str) -> None:
        registry, _, open_blob = opened
        registry.fault("range", value=value)
        with pytest.raises(RegistryError):
            open_blob(offset=1000, length=10, size=len(DATA))

    def test_missing_content_range_is_said(self, opened: Opened) -> None:
        registry, _, open_blob = opened
        registry.fault("range", value="")
        with pytest.raises(RegistryError, match="sent a range without a Content-Range"):
            open_blob(offset=1000, length=10, size=len(DATA))

    def test_unknown_total_needs_the_size(self, opened: Opened) -> None:
        registry, _, open_blob = opened
        registry.fault("range", value="bytes 1000-1009/*")
        with pytest.raises(RegistryError):
            open_blob(offset=1000, length=10)
        with open_blob(offset=1000, length=10, size=len(DATA)) as reader:
            assert reader.read(10) == DATA[1000:1010]

    def test_size_that_disagrees(self, opened: Opened) -> None:
        _, _, open_blob = opened
        with pytest.raises(RegistryError, match="bytes, not"):
            open_blob(size=len(DATA) + 1)

    def test_chunked_needs_the_size(self, opened: Opened) -> None:
        registry, _, open_blob = opened
        registry.fault("chunked", "blobs")
        with pytest.raises(RegistryError, match="without a length"):
            open_blob()
        with open_blob(size=len(DATA)) as reader:
            assert reader.read(2 * len(DATA)) == DATA
        connections = registry.connections
        with open_blob(offset=5, length=5, size=len(DATA)) as reader:
            assert reader.read(9) == DATA[5:10]
        assert registry.connections == connections

    def test_not_satisfiable(self, opened: Opened) -> None:
        _, _, open_blob = opened
        with pytest.raises(RegistryError) as caught:
            open_blob(offset=len(DATA), length=1)
        assert caught.value.status == 416

    @pytest.mark.parametrize(
        "wrong", [{"offset": -1}, {"length": 0}, {"offset": 9, "size": 9}, {"length": -5}]
    )
    def test_senseless_range(self, opened: Opened, wrong: dict[str, int]) -> None:
        registry, _, open_blob = opened
        with pytest.raises(UsageError):
            open_blob(**wrong)
        assert registry.count() == 0

    def test_short_body(self, opened: Opened) -> None:
        registry, _, open_blob = opened
        registry.fault("short", after=2000)
        with open_blob(offset=10, length=5000) as reader:
            with pytest.raises(NetworkError, match="2000 of 5000"):
                reader.read(5000)
            assert reader.position == 2010

    def test_reset_in_the_body(self, opened: Opened) -> None:
        registry, _, open_blob = opened
        registry.fault("reset", "blobs", after=2000)
        with open_blob(offset=10, length=5000) as reader, pytest.raises(NetworkError):
            reader.read(5000)

    def test_stall(self, opened: Opened) -> None:
        registry, _, open_blob = opened
        registry.fault("stall", "blobs", after=2000)
        with open_blob(offset=10, length=5000) as reader:
            assert reader.read(2000) == DATA[10:2010]
            with pytest.raises(NetworkError, match="stalled"):
                reader.read(1)

    def test_close_ends_a_read_in_another_thread(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        digest = Digest(registry.add_blob("a/b", DATA))
        registry.fault("stall", "blobs", after=10)
        client = make_client(registry, read_seconds=30.0)
        reader = client.open_blob(reference(registry), digest)
        seen: list[Exception] = []

        def read() -> None:
            try:
                reader.read(100)
            except NetworkError as error:
                seen.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.1)
        begun = time.monotonic()
        reader.close()
        thread.join(5)
        assert time.monotonic() - begun < 2
        assert len(seen) == 1

    def test_connections_are_kept(self, opened: Opened) -> None:
        registry, _, open_blob = opened
        open_blob(length=1).close()
        before = registry.connections
        for start in range(10):
            with open_blob(offset=start, length=100) as reader:
                assert reader.read(100) == DATA[start : start + 100]
        assert registry.connections <= before + 1

    def test_aborted_reader_reads_no_further(self, opened: Opened) -> None:
        _, client, open_blob = opened
        with open_blob() as reader:
            reader.read(10)
        assert client.stats.bytes < len(DATA)
        with open_blob(offset=3, length=3) as reader:
            assert reader.read(3) == DATA[3:6]

    def test_counters(self, opened: Opened) -> None:
        registry, client, open_blob = opened
        with open_blob(length=1000) as reader:
            reader.read(1000)
        assert client.stats.bytes == 1000
        assert client.stats.requests == registry.count() + 1  # one TLS attempt of the probe


class TestRetries:
    def test_passing_errors_are_retried_with_growing_pauses(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        clock: Any,
    ) -> None:
        registry = make_registry()
        registry.add_manifest("a/b", MANIFEST, "1")
        fault = registry.fault("status", "manifests", status=503, times=3)
        client = make_client(registry)
        assert client.manifest(reference(registry)).raw == MANIFEST
        assert fault.hits == 3
        assert clock.slept == pytest.approx([0.2, 0.4, 0.8])
        assert client.stats.retries == 3

    def test_resets_before_the_answer(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        registry.add_manifest("a/b", MANIFEST, "1")
        fault = registry.fault("reset", "manifests", times=2)
        assert make_client(registry).manifest(reference(registry)).raw == MANIFEST
        assert fault.hits == 2

    def test_attempts_are_bounded(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        fault = registry.fault("status", "manifests", status=500)
        with pytest.raises(RegistryError) as caught:
            make_client(registry).manifest(reference(registry))
        assert caught.value.status == 500
        assert fault.hits == limits.ATTEMPTS

    def test_final_errors_are_not_retried(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        fault = registry.fault("status", "manifests", status=400)
        with pytest.raises(RegistryError):
            make_client(registry).manifest(reference(registry))
        assert fault.hits == 1

    @pytest.mark.parametrize(
        ("value", "pause"),
        [
            ("7", 7.0),
            ("99999", limits.RETRY_AFTER_MAX_SECONDS),
            ("Thu, 01 Jan 1970 00:16:45 GMT", 5.0),  # the test's clock stands at 1000
            ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
            ("soon", 0.2),
        ],
    )
    def test_retry_after(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        clock: Any,
        value: str,
        pause: float,
    ) -> None:
        registry = make_registry()
        registry.add_manifest("a/b", MANIFEST, "1")
        registry.fault("status", "manifests", status=429, headers={"Retry-After": value}, times=1)
        assert make_client(registry).manifest(reference(registry)).raw == MANIFEST
        assert clock.slept == pytest.approx([pause])

    def test_rate_limit_that_lasts(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        registry.fault("status", "manifests", status=429)
        with pytest.raises(RateLimited):
            make_client(registry).manifest(reference(registry))

    def test_nobody_there(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        client, ref = make_client(registry), reference(registry)
        registry.close()
        with pytest.raises(NetworkError):
            client.manifest(ref)


class TestDeadline:
    def test_no_pause_reaches_beyond_it(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        clock: Any,
    ) -> None:
        registry = make_registry()
        registry.fault("status", "manifests", status=429, headers={"Retry-After": "20"})
        with pytest.raises(RateLimited):
            make_client(registry).manifest(reference(registry), deadline=clock.now + 10)
        assert clock.slept == []

    def test_silence_before_the_answer(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        real_time: dict[str, Any],
    ) -> None:
        registry = make_registry()
        registry.fault("latency", "manifests", seconds=5)
        client = make_client(registry, **{**real_time, "read_seconds": 30.0})
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.manifest(reference(registry), deadline=begun + 0.5)
        assert time.monotonic() - begun < 2

    def test_silence_in_the_body(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        real_time: dict[str, Any],
    ) -> None:
        registry = make_registry()
        digest = Digest(registry.add_blob("a/b", DATA))
        registry.fault("stall", "blobs", after=100)
        client = make_client(registry, **{**real_time, "read_seconds": 30.0})
        begun = time.monotonic()
        reader = client.open_blob(reference(registry), digest, deadline=begun + 0.5)
        with reader, pytest.raises(DeadlineExceeded):
            reader.read(1000)
        assert time.monotonic() - begun < 2

    def test_already_over(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        clock: Any,
    ) -> None:
        registry = make_registry()
        with pytest.raises(DeadlineExceeded):
            make_client(registry).manifest(reference(registry), deadline=clock.now - 1)
        assert registry.count() == 0


class TestPlaces:
    @pytest.fixture
    def pair(self, make_registry: MakeRegistry) -> Any:
        mirror, primary = make_registry(), make_registry()
        for registry in (mirror, primary):
            registry.add_manifest("x/b", MANIFEST, "1")
            registry.add_blob("x/b", DATA)
        return mirror, primary

    def client(self, make_client: MakeClient, mirror: Any, primary: Any, **options: Any) -> Any:
        places = (Mirror(mirror.host + "/x", insecure=True),)
        entry = Registry(
            prefix="logical.example/a",
            location=primary.host + "/x",
            insecure=True,
            mirror=places,
            **options,
        )
        return make_client(conf=(entry,))

    @pytest.fixture
    def logical(self) -> Any:
        return Reference.parse("logical.example/a/b:1")

    def test_mirror_first(self, make_client: MakeClient, pair: Pair, logical: Reference) -> None:
        mirror, primary = pair
        client = self.client(make_client, mirror, primary)
        assert client.manifest(logical).raw == MANIFEST
        assert (mirror.count("GET", "manifests"), primary.count()) == (1, 0)

    def test_falls_back_to_the_primary_and_stays_there_for_a_while(
        self, make_client: MakeClient, pair: Pair, logical: Reference, clock: Any
    ) -> None:
        mirror, primary = pair
        mirror.manifests.clear()
        client = self.client(make_client, mirror, primary)
        assert client.manifest(logical).raw == MANIFEST
        assert client.blob(logical, Digest.of(DATA), len(DATA)) == DATA
        assert mirror.count("GET", "blobs") == 0
        clock.now += limits.PREFERRED_SECONDS
        assert client.blob(logical, Digest.of(DATA), len(DATA)) == DATA
        assert mirror.count("GET", "blobs") == 1  # the order of registries.conf

    def test_who_answered_lately_is_known(
        self, make_client: MakeClient, pair: Pair, logical: Reference, clock: Any
    ) -> None:
        mirror, primary = pair
        client = self.client(make_client, mirror, primary)
        assert client.hosts(logical) == (mirror.host, primary.host)
        assert not client.answered_since(logical, clock.now - 100)
        client.manifest(logical)
        assert client.answered_since(logical, clock.now - 1)
        assert not client.answered_since(logical, clock.now)
        clock.now += 50
        for registry in pair:
            registry.fault("status", "", status=503)
        with pytest.raises(RegistryError):
            client.manifest(logical)
        assert not client.answered_since(logical, clock.now - 40)

    def test_blob_missing_where_the_manifest_was(
        self, make_client: MakeClient, pair: Pair, logical: Reference
    ) -> None:
        mirror, primary = pair
        mirror.blobs.clear()
        client = self.client(make_client, mirror, primary)
        client.manifest(logical)
        assert client.blob(logical, Digest.of(DATA), len(DATA)) == DATA
        assert mirror.count("GET", "blobs") == 1

    def test_mirror_with_wrong_bytes(
        self, make_client: MakeClient, pair: Pair, logical: Reference
    ) -> None:
        mirror, primary = pair
        mirror.fault("flip", "manifests")
        client = self.client(make_client, mirror, primary)
        assert client.manifest(logical, Digest.of(MANIFEST)).raw == MANIFEST
        assert primary.count("GET", "manifests") == 1

    def test_all_failing_names_all(
        self, make_client: MakeClient, pair: Pair, logical: Reference
    ) -> None:
        mirror, primary = pair
        mirror.fault("status", "manifests", status=400)
        primary.manifests.clear()
        client = self.client(make_client, mirror, primary)
        with pytest.raises(NotFound, match=f"failed too: .{mirror.host}: registry answered 400"):
            client.manifest(logical)

    def test_mirror_by_digest_only(
        self, make_client: MakeClient, pair: Pair, logical: Reference
    ) -> None:
        mirror, primary = pair
        client = self.client(make_client, mirror, primary, mirror_by_digest_only=True)
        client.manifest(logical)
        assert mirror.count() == 0
        client.manifest(logical, Digest.of(MANIFEST))
        assert mirror.count("GET", "manifests") == 1

    def test_silent_mirror_takes_only_its_share_and_then_rests(
        self, make_client: MakeClient, pair: Pair, logical: Reference, real_time: dict[str, Any]
    ) -> None:
        mirror, primary = pair
        mirror.fault("latency", seconds=30)
        places = (Mirror(mirror.host + "/x", insecure=True),)
        entry = Registry(
            prefix="logical.example/a", location=primary.host + "/x", insecure=True, mirror=places
        )
        client = make_client(conf=(entry,), **{**real_time, "read_seconds": 30.0})
        begun = time.monotonic()
        assert client.manifest(logical, deadline=begun + 4).raw == MANIFEST
        assert 1.9 < time.monotonic() - begun < 3.9
        asked = mirror.count()
        assert client.manifest(logical).raw == MANIFEST
        assert mirror.count() == asked

    def test_blocked(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        client = make_client(
            conf=(Registry(prefix="127.0.0.1", location="127.0.0.1", blocked=True),)
        )
        with pytest.raises(ConfigError, match="blocked"):
            client.manifest(reference(registry))
        assert registry.connections == 0


class TestSecurity:
    def test_loopback_is_not_insecure_by_itself(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        with pytest.raises(NetworkError, match="insecure = true"):
            make_client().manifest(reference(registry))
        assert registry.count() == 0

    def test_scheme_is_found_once(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        registry.add_manifest("a/b", MANIFEST, "1")
        client = make_client(registry)
        for _ in range(3):
            client.manifest(reference(registry))
        assert registry.count("GET", "/v2/") == 1 + 3

    def test_certs_d(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        certificates: dict[str, Path],
        tmp_path: Path,
    ) -> None:
        registry = make_registry(tls=(certificates["server.crt"], certificates["server.key"]))
        registry.add_manifest("a/b", MANIFEST, "1")
        with pytest.raises(NetworkError, match=r"certs\.d"):
            make_client().manifest(reference(registry))
        place = tmp_path / "certs.d" / registry.host
        place.mkdir(parents=True)
        (place / "ca.crt").write_bytes(certificates["ca.crt"].read_bytes())
        client = make_client(cert_directories=(tmp_path / "certs.d",))
        assert client.manifest(reference(registry)).raw == MANIFEST

    def test_insecure_takes_any_certificate(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        certificates: dict[str, Path],
    ) -> None:
        registry = make_registry(tls=(certificates["server.crt"], certificates["server.key"]))
        registry.add_manifest("a/b", MANIFEST, "1")
        assert make_client(registry).manifest(reference(registry)).raw == MANIFEST
        assert make_client(tls_verify=False).manifest(reference(registry)).raw == MANIFEST

    def test_verification_can_be_forced(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        with pytest.raises(NetworkError):
            make_client(registry, tls_verify=True).manifest(reference(registry))


class TestRedirects:
    @pytest.fixture
    def redirected(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> Any:
        registry = make_registry(auth="bearer", anonymous=True, redirect=True)
        digest = Digest(registry.add_blob("a/b", DATA))
        client, ref = make_client(registry), reference(registry)
        return registry, lambda **kw: client.open_blob(ref, digest, **kw), digest

    def test_authorization_stays_at_home(self, redirected: Redirected) -> None:
        registry, open_blob, _ = redirected
        with open_blob(offset=10, length=10) as reader:
            assert reader.read(10) == DATA[10:20]
        at_home = [entry.authorization for entry in registry.requests("GET", "/blobs/")]
        assert at_home[-1] is not None
        away = registry.requests("GET", "/storage/")
        assert len(away) == 1
        assert away[0].authorization is None
        assert away[0].headers["range"] == "bytes=10-19"
        assert away[0].headers["accept-encoding"] == "identity"

    def test_target_is_used_again_for_a_while(self, redirected: Redirected, clock: Any) -> None:
        registry, open_blob, _ = redirected
        for start in range(5):
            open_blob(offset=start, length=10).read(10)
        assert registry.count("GET", "/storage/") == 5
        first = registry.count("GET", "/blobs/")
        assert first == 2  # the challenge, the redirect
        clock.now += limits.REDIRECT_SECONDS
        open_blob(offset=0, length=10).close()
        assert registry.count("GET", "/blobs/") == first + 1

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_expired_target_is_asked_for_again(self, redirected: Redirected, status: int) -> None:
        registry, open_blob, _ = redirected
        open_blob(offset=0, length=10).close()
        before = registry.count("GET", "/blobs/")
        fault = registry.fault("status", "/storage/", status=status, times=1)
        with open_blob(offset=5, length=10) as reader:
            assert reader.read(10) == DATA[5:15]
        assert fault.hits == 1
        assert registry.count("GET", "/blobs/") == before + 1

    def test_storage_that_refuses_is_not_answered_with_a_token(
        self, redirected: Redirected
    ) -> None:
        registry, open_blob, _ = redirected
        registry.fault(
            "status", "/storage/", status=401, headers={"WWW-Authenticate": "Basic realm=x"}
        )
        with pytest.raises(AuthenticationError):
            open_blob(offset=0, length=10)
        assert all(entry.authorization is None for entry in registry.requests("", "/storage/"))

    def test_failing_storage_is_retried_through_the_registry(self, redirected: Redirected) -> None:
        registry, open_blob, _ = redirected
        open_blob(offset=0, length=10).close()
        registry.fault("status", "/storage/", status=503, times=2)
        with open_blob(offset=5, length=10) as reader:
            assert reader.read(10) == DATA[5:15]

    def test_loop(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        fault = registry.fault("redirect", "blobs", value="?again")
        with pytest.raises(RegistryError, match="redirects"):
            make_client(registry).open_blob(reference(registry), Digest.of(b""))
        assert fault.hits == limits.REDIRECTS + 1

    @pytest.mark.parametrize(
        "value",
        [
            "ftp://127.0.0.1/x",
            "file:///etc/passwd",
            "http://u:p@127.0.0.1/",
            "http://h:99999/",
            "https://",
        ],
    )
    def test_address_that_is_none(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        value: str,
    ) -> None:
        registry = make_registry()
        registry.fault("redirect", "blobs", value=value)
        with pytest.raises(RegistryError, match="no address"):
            make_client(registry).open_blob(reference(registry), Digest.of(b""))

    def test_no_way_from_https_to_http(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        certificates: dict[str, Path],
    ) -> None:
        plain = make_registry()
        registry = make_registry(tls=(certificates["server.crt"], certificates["server.key"]))
        registry.fault("redirect", "blobs", value=f"{plain.url}/x")
        client = make_client(cert_directory=certificates["authority"])
        with pytest.raises(RegistryError, match="plain HTTP"):
            client.open_blob(reference(registry), Digest.of(b""))
        assert plain.count() == 0


class TestPush:
    def test_upload_mount_and_manifest(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry(auth="bearer", users={"u": "p"})
        client = make_client(registry, credential_sources=(lambda _: Credential("u", "p"),))
        ref, other = reference(registry), reference(registry, "c/d:1")
        data = os.urandom(300_000)
        digest = Digest.of(data)
        assert not client.has_blob(ref, digest)
        client.upload_blob(ref, digest, lambda: (data[:1000], data[1000:]), len(data))
        assert client.has_blob(ref, digest)
        assert client.mount_blob(other, digest, ref)
        assert client.has_blob(other, digest)
        assert client.put_manifest(ref, MANIFEST, media_types.OCI_MANIFEST) == Digest.of(MANIFEST)
        assert client.manifest(ref).raw == MANIFEST

    def test_mount_of_what_is_not_there_leaves_no_upload(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        client = make_client(registry)
        ref = reference(registry)
        assert not client.mount_blob(ref, Digest.of(b"x"), reference(registry, "c/d:1"))
        assert registry.open_uploads == 0

    def test_broken_upload_is_started_again(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        fault = registry.fault("reset", "^PUT", times=1)
        client, ref = make_client(registry), reference(registry)
        client.upload_blob(ref, Digest.of(DATA), lambda: (DATA,), len(DATA))
        assert fault.hits == 1
        assert client.blob(ref, Digest.of(DATA), len(DATA)) == DATA

    @pytest.mark.parametrize("size", [99, 101])
    def test_chunks_that_do_not_add_up(
        self,
        make_registry: MakeRegistry,
        make_client: MakeClient,
        reference: MakeReference,
        size: int,
    ) -> None:
        registry = make_registry()
        data = bytes(100)
        with pytest.raises(UsageError):
            make_client(registry).upload_blob(
                reference(registry), Digest.of(data), lambda: (data,), size
            )
        assert registry.blobs == {}

    def test_registry_checks_the_digest(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        with pytest.raises(RegistryError) as caught:
            make_client(registry).upload_blob(
                reference(registry), Digest.of(b"a"), lambda: (b"b",), 1
            )
        assert caught.value.codes == ("DIGEST_INVALID",)

    def test_manifest_must_have_the_digest_of_its_reference(
        self, make_registry: MakeRegistry, make_client: MakeClient, reference: MakeReference
    ) -> None:
        registry = make_registry()
        ref = reference(registry).with_digest(Digest.of(b"other"))
        with pytest.raises(VerificationError):
            make_client(registry).put_manifest(ref, MANIFEST, media_types.OCI_MANIFEST)
        assert registry.count() == 0
