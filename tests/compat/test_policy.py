"""Signed images: what Skopeo signs we accept as Podman does, and nothing that Podman refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.gpg import GpgKey
from lab.podman import CommandError, Flavour, PodmanEnv, run
from lab.registry import DebianRegistry
from layerstore.copy.policy import Policy
from layerstore.copy.pull import PullOptions, pull
from layerstore.errors import ConfigError, PolicyRejected
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.store import Store
from layerstore.image import Digest
from layerstore.registry import RegistrySettings

pytestmark = pytest.mark.skipif(shutil.which("gpg") is None, reason="gpg is not installed")
MakePodmanEnv = Callable[..., PodmanEnv]


@pytest.fixture(scope="module")
def key() -> Iterator[GpgKey]:
    with GpgKey() as made:
        yield made


@pytest.fixture(scope="module")
def other() -> Iterator[GpgKey]:
    with GpgKey("other@lab.example") as made:
        yield made


@pytest.fixture
def env(flavour: Flavour, make_podman_env: MakePodmanEnv) -> PodmanEnv:
    """Signatures are read from and written to ``sigstore`` in the environment."""
    made = make_podman_env(flavour)
    conf = made.home / ".config/containers/registries.d"
    conf.mkdir()
    place = (made.directory / "sigstore").as_uri()
    (conf / "lab.yaml").write_text(
        f"# of the test\ndefault-docker:\n  lookaside: {place}\n  lookaside-staging: {place}\n"
    )
    return made


def demand(env: PodmanEnv, *keys: GpgKey, **more: Any) -> None:
    """From now on, images of registries must be signed."""
    requirement = {
        "type": "signedBy",
        "keyType": "GPGKeys",
        **({"keyPath": str(keys[0].public)} if len(keys) == 1 else {}),
        **({"keyPaths": [str(key.public) for key in keys]} if len(keys) > 1 else {}),
        **more,
    }
    document = {"default": [{"type": "reject"}], "transports": {"docker": {"": [requirement]}}}
    env.policy.write_text(json.dumps(document))


def publish(env: PodmanEnv, registry: DebianRegistry, name: str, key: GpgKey | None) -> str:
    """Push the small image, signed; its reference."""
    env.policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    reference = f"{registry.host}/{name}"
    sign = () if key is None else ("--sign-by", key.address)
    skopeo(env, key, "copy", "--quiet", *sign, source(), f"docker://{reference}")
    return reference


def source() -> str:
    return images.small_image(marker="policy").source


def skopeo(env: PodmanEnv, key: GpgKey | None, *arguments: str) -> str:
    environment = env.environment() | (key.environment if key is not None else {})
    return run([*env.command("skopeo"), *arguments], environment).stdout


def verdicts(env: PodmanEnv, reference: str) -> tuple[bool, bool]:
    """Whether we and whether Podman pull it; what was pulled is removed again."""
    environment = env.environment()
    store = Store.open(StorageConfig.from_system(env=environment))
    settings = RegistrySettings.from_system(env=environment, home=env.home)
    options = PullOptions(registry=settings, policy=Policy.load(home=env.home))
    try:
        pull(reference, store, options)
        ours = True
        assert store.image(reference)
        store.remove_image(reference)
    except PolicyRejected:
        ours = False
    assert store.images() == []
    assert store.layers() == []
    try:
        env.podman("pull", "--quiet", reference)
        theirs = True
        env.podman("rmi", reference)
    except CommandError:
        theirs = False
    return ours, theirs


def signature_files(env: PodmanEnv) -> list[Path]:
    return sorted((env.directory / "sigstore").rglob("signature-*"))


def test_the_right_key_is_accepted_and_another_refused(
    env: PodmanEnv, registry: DebianRegistry, key: GpgKey, other: GpgKey
) -> None:
    reference = publish(env, registry, f"policy/{env.flavour}/signed:1", key)
    assert len(signature_files(env)) == 1
    demand(env, key)
    assert verdicts(env, reference) == (True, True)
    demand(env, other)
    assert verdicts(env, reference) == (False, False)
    demand(env, other, signedIdentity={"type": "matchRepository"})
    assert verdicts(env, reference) == (False, False)


def test_unsigned_and_tampered_images_are_refused(
    env: PodmanEnv, registry: DebianRegistry, key: GpgKey
) -> None:
    unsigned = publish(env, registry, f"policy/{env.flavour}/unsigned:1", None)
    demand(env, key)
    assert verdicts(env, unsigned) == (False, False)
    signed = publish(env, registry, f"policy/{env.flavour}/tampered:1", key)
    demand(env, key)
    (file,) = signature_files(env)
    good = file.read_bytes()
    file.write_bytes(good[:-20] + bytes(20))
    assert verdicts(env, signed) == (False, False)
    # The good one beside it is enough.
    file.with_name("signature-2").write_bytes(good)
    assert verdicts(env, signed) == (True, True)


def test_a_signature_is_for_one_name(env: PodmanEnv, registry: DebianRegistry, key: GpgKey) -> None:
    signed = publish(env, registry, f"policy/{env.flavour}/named:1", key)
    digest = skopeo(env, None, "inspect", "--format", "{{.Digest}}", f"docker://{signed}").strip()
    renamed = publish(env, registry, f"policy/{env.flavour}/named:2", None)
    by_digest = f"{signed.removesuffix(':1')}@{digest}"
    demand(env, key)
    assert verdicts(env, signed) == (True, True)
    assert verdicts(env, renamed) == (False, False)
    assert verdicts(env, by_digest) == (True, True)
    demand(env, key, signedIdentity={"type": "matchExact"})
    assert verdicts(env, by_digest) == (False, False)
    demand(env, key, signedIdentity={"type": "matchRepository"})
    assert verdicts(env, renamed) == (True, True)
    demand(env, key, signedIdentity={"type": "exactReference", "dockerReference": signed})
    assert verdicts(env, renamed) == (True, True)


@pytest.mark.parametrize("reference", ["own", "foreign"])
def test_signatures_made_by_hand(
    env: PodmanEnv, registry: DebianRegistry, key: GpgKey, other: GpgKey, reference: str
) -> None:
    """`skopeo standalone-sign`, and a message of gpg's own."""
    name = publish(env, registry, f"policy/{env.flavour}/by-hand-{reference}:1", None)
    raw = skopeo(env, None, "inspect", "--raw", f"docker://{name}")
    manifest = env.directory / "manifest.json"
    manifest.write_text(raw)
    digest = Digest.of(raw.encode())
    repository = name.partition("/")[2].removesuffix(":1")
    place = env.directory / f"sigstore/{repository}@sha256={digest.hex}"
    place.mkdir(parents=True)
    if reference == "own":
        skopeo(
            *(env, key, "standalone-sign", str(manifest), name, key.address),
            *("--output", str(place / "signature-1")),
        )
    else:
        payload = {
            "critical": {
                "type": "atomic container signature",
                "image": {"docker-manifest-digest": digest},
                "identity": {"docker-reference": name},
            },
            "optional": {},
        }
        (place / "signature-1").write_bytes(key.sign(json.dumps(payload).encode()))
    demand(env, other, key)
    assert verdicts(env, name) == (True, True)
    demand(env, other)
    assert verdicts(env, name) == (False, False)


def test_policies_that_podman_cannot_read_neither(env: PodmanEnv, registry: DebianRegistry) -> None:
    reference = publish(env, registry, f"policy/{env.flavour}/plain:1", None)
    for text in (
        '{"default": [{"type": "insecureAcceptAnything"}], "more": 1}',
        '{"default": [{"type": "insecureAcceptAnything"}], "default": [{"type": "reject"}]}',
        '{"default": []}',
    ):
        env.policy.write_text(text)
        with pytest.raises(ConfigError):
            Policy.load(home=env.home)
        with pytest.raises(CommandError):
            env.podman("pull", "--quiet", reference)
    scopes = {registry.host: [{"type": "insecureAcceptAnything"}], "": [{"type": "reject"}]}
    env.policy.write_text(
        json.dumps({"default": [{"type": "reject"}], "transports": {"docker": scopes}})
    )
    assert verdicts(env, reference) == (True, True)
    scopes[f"{reference.rpartition(':')[0]}"] = [{"type": "reject"}]
    env.policy.write_text(
        json.dumps({"default": [{"type": "reject"}], "transports": {"docker": scopes}})
    )
    assert verdicts(env, reference) == (False, False)
