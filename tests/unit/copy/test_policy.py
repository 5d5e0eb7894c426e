"""policy.json: reading it, finding what applies, and judging."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.gpg import GpgKey
from layerstore import limits
from layerstore.copy import strictjson
from layerstore.copy.gpg import verified_payload
from layerstore.copy.policy import Policy, scopes_of
from layerstore.copy.signedidentity import parse_signed_identity
from layerstore.copy.simplesigning import parse_claim
from layerstore.copy.strictjson import NotStrict
from layerstore.errors import ConfigError, PolicyRejected
from layerstore.image import Digest, Reference

ACCEPT = {"type": "insecureAcceptAnything"}
REJECT = {"type": "reject"}
MANIFEST = b'{"schemaVersion": 2}'
DIGEST = Digest.of(MANIFEST)
IMAGE = Reference.parse("h.example:5000/a/b:1")
GPG = pytest.mark.skipif(shutil.which("gpg") is None, reason="there is no gpg")


def policy(default: Any = REJECT, **transports: Any) -> Policy:
    document: dict[str, Any] = {"default": [default]}
    if transports:
        document["transports"] = {
            name.replace("_", "-"): {scope: [each] for scope, each in scopes.items()}
            for name, scopes in transports.items()
        }
    return Policy.parse(json.dumps(document).encode())


def accepts(given: Policy, transport: str, identity: Reference | str) -> bool:
    try:
        given.check(transport, identity, MANIFEST)
    except PolicyRejected:
        return False
    return True


# -- reading -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"default": []}',
        '{"default": {}}',
        '{"default": [{"type": "insecureAcceptAnything"}], "other": 1}',
        '{"default": [{"type": "reject"}], "default": [{"type": "insecureAcceptAnything"}]}',
        '{"default": [{"type": "insecureAcceptAnything", "more": 1}]}',
        '{"default": [{"type": "insecureAcceptAnything", "type": "reject"}]}',
        '{"default": [{"type": "accept"}]}',
        '{"default": [{}]}',
        '{"default": ["reject"]}',
        '{"default": [{"type": "reject"}]} {}',
        '{"default": [{"type": "reject"}], "transports": []}',
        '{"default": [{"type": "reject"}], "transports": {"docker": {"": []}}}',
        '{"default": [{"type": "reject"}], "transports": {"docker": []}}',
        '{"default": [{"type": "reject"}], "transports": {"dir": {"relative": [{"type":"reject"}]}}}',
        '{"default": [{"type": "reject"}], "transports": {"dir": {"/": [{"type":"reject"}]}}}',
        '{"default": [{"type": "reject"}], "transports": {"dir": {"/a/../b": [{"type":"reject"}]}}}',
        '{"default": [{"type": "signedBy", "keyType": "GPGKeys"}]}',
        '{"default": [{"type": "signedBy", "keyPath": "/k"}]}',
        '{"default": [{"type": "signedBy", "keyType": "other", "keyPath": "/k"}]}',
        '{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": ""}]}',
        '{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPaths": []}]}',
        '{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyData": "*"}]}',
        '{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k", "keyData": ""}]}',
        '{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k", "key": 1}]}',
        '{"default": [{"type": "sigstoreSigned", "unknown": 1}]}',
        '{"default": NaN}',
        "[" * 100_000,
    ],
)
def test_a_policy_that_breaks_the_rules_is_none(text: str) -> None:
    with pytest.raises(ConfigError):
        Policy.parse(text.encode())


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["default", "transports", "docker", "", "type"]), x)
        ),
    )
)
def test_no_document_does_worse_than_a_config_error(document: Any) -> None:
    try:
        Policy.parse(json.dumps(document).encode())
    except ConfigError:
        return


def test_the_users_file_comes_before_the_machines(tmp_path: Path) -> None:
    home, etc = tmp_path / "home", tmp_path / "etc"
    for place, kind in ((home / ".config", REJECT), (etc, ACCEPT)):
        (place / "containers").mkdir(parents=True)
        (place / "containers/policy.json").write_text(json.dumps({"default": [kind]}))
    assert not accepts(Policy.load(home=home, etc=etc), "docker", IMAGE)
    assert accepts(Policy.load(home=tmp_path, etc=etc), "docker", IMAGE)
    assert accepts(Policy.load(etc / "containers/policy.json", home=home, etc=etc), "docker", IMAGE)


def test_without_a_file_nothing_may_be_copied(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="insecureAcceptAnything"):
        Policy.load(home=tmp_path, etc=tmp_path)
    with pytest.raises(ConfigError, match="missing"):
        Policy.load(tmp_path / "missing")


# -- scopes ----------------------------------------------------------------------------


def test_scopes_of_a_registry_image() -> None:
    assert list(scopes_of("docker", Reference.parse("h.sub.example:5000/a/b:1"))) == [
        "h.sub.example:5000/a/b:1",
        "h.sub.example:5000/a/b",
        "h.sub.example:5000/a",
        "h.sub.example:5000",
        "*.sub.example",
        "*.example",
    ]
    assert next(scopes_of("docker", IMAGE.with_digest(DIGEST))) == f"h.example:5000/a/b@{DIGEST}"


def test_scopes_of_paths_and_storages() -> None:
    assert list(scopes_of("oci", "/a/b:tag")) == ["/a/b:tag", "/a/b", "/a"]
    assert list(scopes_of("dir", "/a/b")) == ["/a/b", "/a"]
    assert list(scopes_of("docker-archive", "")) == []
    assert list(scopes_of("containers-storage", "[overlay@/g]h.example/a:1@abc")) == [
        "[overlay@/g]h.example/a:1@abc",
        "[overlay@/g]h.example/a:1",
        "[overlay@/g]h.example/a",
        "[overlay@/g]h.example",
        "[overlay@/g]",
        "[/g]",
    ]


@pytest.mark.parametrize(
    ("scope", "applies"),
    [
        ("h.example:5000/a/b:1", True),
        ("h.example:5000/a/b:2", False),
        ("h.example:5000/a/b", True),
        ("h.example:5000/a", True),
        ("h.example:5000", True),
        ("h.example", False),
        ("*.example", True),
        ("*.h.example", False),
        ("", True),
    ],
)
def test_what_applies(scope: str, applies: bool) -> None:
    assert accepts(policy(docker={scope: ACCEPT}), "docker", IMAGE) is applies


def test_the_most_specific_scope_decides_alone() -> None:
    given = policy(ACCEPT, docker={"": ACCEPT, "h.example:5000": REJECT, "*.example": ACCEPT})
    assert not accepts(given, "docker", IMAGE)
    assert accepts(given, "docker", Reference.parse("alpine"))
    assert accepts(given, "dir", "/a")


def test_all_requirements_must_be_met() -> None:
    both = Policy.parse(json.dumps({"default": [ACCEPT, REJECT]}).encode())
    with pytest.raises(PolicyRejected, match=r"docker:h\.example:5000/a/b:1: .*rejects"):
        both.check("docker", IMAGE, MANIFEST)


@pytest.mark.parametrize(
    "requirement",
    [
        {"type": "sigstoreSigned", "keyPath": "/k"},
        {"type": "signedBaseLayer", "baseLayerIdentity": {"type": "matchExact"}},
        {"type": "signedBy", "keyType": "X509Certificates", "keyPath": "/k"},
    ],
)
def test_what_cannot_be_checked_is_refused(requirement: dict[str, Any]) -> None:
    with pytest.raises(PolicyRejected, match="not supported"):
        policy(requirement).check("docker", IMAGE, MANIFEST, [b"x"])


# -- names in signatures -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "wanted", "signed", "good"),
    [
        ({"type": "matchExact"}, "h.io/a:1", "h.io/a:1", True),
        ({"type": "matchExact"}, "h.io/a:1", "h.io/a:2", False),
        ({"type": "matchExact"}, "h.io/a:latest", "h.io/a", False),
        ({"type": "matchExact"}, "docker.io/library/a:1", "a:1", True),
        ({"type": "matchExact"}, f"h.io/a@{DIGEST}", "h.io/a:1", False),
        ({"type": "matchRepoDigestOrExact"}, "h.io/a:1", "h.io/a:1", True),
        ({"type": "matchRepoDigestOrExact"}, "h.io/a:1", "h.io/a:2", False),
        ({"type": "matchRepoDigestOrExact"}, f"h.io/a@{DIGEST}", "h.io/a:2", True),
        ({"type": "matchRepoDigestOrExact"}, f"h.io/a@{DIGEST}", "h.io/b:2", False),
        ({"type": "matchRepoDigestOrExact"}, f"h.io/a@{DIGEST}", "h.io/a", False),
        ({"type": "matchRepoDigestOrExact"}, "h.io/a:1", "UPPER", False),
        ({"type": "matchRepository"}, "h.io/a:1", "h.io/a:2", True),
        ({"type": "matchRepository"}, "h.io/a:1", "h.io/a", True),
        ({"type": "matchRepository"}, "h.io/a:1", "h.io/b:1", False),
        ({"type": "exactReference", "dockerReference": "h.io/x:1"}, "h.io/a:1", "h.io/x:1", True),
        ({"type": "exactReference", "dockerReference": "h.io/x:1"}, "h.io/a:1", "h.io/a:1", False),
        ({"type": "exactReference", "dockerReference": "h.io/x:1"}, None, "h.io/x:1", True),
        ({"type": "exactRepository", "dockerRepository": "h.io/x"}, "h.io/a:1", "h.io/x:9", True),
        ({"type": "exactRepository", "dockerRepository": "h.io/x"}, None, "h.io/y:9", False),
        ({"type": "matchExact"}, None, "h.io/a:1", False),
        ({"type": "matchRepository"}, None, "h.io/a:1", False),
        *(
            (
                {"type": "remapIdentity", "prefix": prefix, "signedPrefix": "v.io/n"},
                wanted,
                signed,
                good,
            )
            for prefix, wanted, signed, good in (
                ("m.io/p", "m.io/p/a:1", "v.io/n/a:1", True),
                ("m.io/p", "m.io/pa:1", "v.io/na:1", False),
                ("m.io/p", "m.io/p:1", "v.io/n:1", True),
                ("m.io/p", "m.io/p/a:1", "m.io/p/a:1", False),
                ("m.io/p", "h.io/a:1", "h.io/a:1", True),
                ("m.io/p", None, "v.io/n/a:1", False),
            )
        ),
    ],
)
def test_signed_identities(
    rule: dict[str, str], wanted: str | None, signed: str, good: bool
) -> None:
    reference = None if wanted is None else Reference.parse(wanted)
    assert parse_signed_identity(rule).accepts(reference, signed) is good


@pytest.mark.parametrize(
    "rule",
    [
        None,
        {},
        {"type": "other"},
        {"type": "matchExact", "more": 1},
        {"type": "exactReference"},
        {"type": "exactReference", "dockerReference": "h.io/a"},
        {"type": "exactRepository", "dockerRepository": "A"},
        {"type": "remapIdentity", "prefix": "m.io/p:1", "signedPrefix": "v.io"},
        {"type": "remapIdentity", "prefix": "m.io/p/", "signedPrefix": "v.io"},
        {"type": "remapIdentity", "prefix": 1, "signedPrefix": "v.io"},
    ],
)
def test_broken_signed_identities(rule: Any) -> None:
    with pytest.raises(NotStrict):
        parse_signed_identity(rule)


# -- what a signature says ---------------------------------------------------------------


def payload(
    digest: str = str(DIGEST),
    reference: str = str(IMAGE),
    edit: Callable[[Any], None] | None = None,
) -> bytes:
    document: dict[str, Any] = {
        "critical": {
            "type": "atomic container signature",
            "image": {"docker-manifest-digest": digest},
            "identity": {"docker-reference": reference},
        },
        "optional": {"creator": "us", "timestamp": 1},
    }
    if edit is not None:
        edit(document)
    return json.dumps(document).encode()


def test_a_claim() -> None:
    claim = parse_claim(payload())
    assert (claim.manifest, claim.reference) == (DIGEST, str(IMAGE))
    assert claim.covers(MANIFEST)
    assert not claim.covers(MANIFEST + b" ")
    parse_claim(payload(edit=lambda document: document["optional"].update(other=1)))


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document.update(more=1),
        lambda document: document.pop("optional"),
        lambda document: document["critical"].update(more=1),
        lambda document: document["critical"].update(type="cosign container image signature"),
        lambda document: document["critical"]["image"].update(more=1),
        lambda document: document["critical"]["image"].clear(),
        lambda document: document["critical"]["image"].update({"docker-manifest-digest": "md5:1"}),
        lambda document: document["critical"]["identity"].update({"docker-reference": 1}),
        lambda document: document["optional"].update(timestamp=1.5),
        lambda document: document["optional"].update(timestamp="1"),
        lambda document: document["optional"].update(creator=1),
        lambda document: document.update(optional=[]),
    ],
)
def test_claims_of_another_form(edit: Callable[[Any], None]) -> None:
    with pytest.raises(NotStrict):
        parse_claim(payload(edit=edit))


def test_keys_may_not_stand_twice() -> None:
    with pytest.raises(NotStrict, match="twice"):
        strictjson.decode(b'{"a": {"b": 1, "b": 1}}')


# -- OpenPGP -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key() -> Iterator[GpgKey]:
    with GpgKey(algorithm="ed25519") as made:
        yield made


@pytest.fixture(scope="module")
def other() -> Iterator[GpgKey]:
    with GpgKey("other@lab.example", algorithm="ed25519") as made:
        yield made


def signed_by(*keys: GpgKey, **members: Any) -> Policy:
    requirement = {"type": "signedBy", "keyType": "GPGKeys", **members}
    if not {"keyData", "keyPath"} & members.keys():
        requirement["keyPaths"] = [str(each.public) for each in keys]
    return policy(requirement)


@GPG
def test_a_good_signature(key: GpgKey, other: GpgKey) -> None:
    signature = key.sign(payload())
    signed_by(key).check("docker", IMAGE, MANIFEST, [signature])
    signed_by(other, key).check("docker", IMAGE, MANIFEST, [b"junk", other.sign(b"{}"), signature])
    data = base64.b64encode(key.public.read_bytes()).decode()
    signed_by(keyData=data).check("docker", IMAGE, MANIFEST, [signature])
    signed_by(key).check("dir", "/a", MANIFEST, [signature], reference=IMAGE)
    assert signed_by(key).needs_signatures("docker", IMAGE)
    assert not policy(ACCEPT).needs_signatures("docker", IMAGE)


@GPG
def test_bad_signatures(key: GpgKey, other: GpgKey) -> None:
    good = key.sign(payload())
    given = signed_by(key)

    def refused(why: str, signature: bytes, manifest: bytes = MANIFEST) -> None:
        with pytest.raises(PolicyRejected, match=why):
            given.check("docker", IMAGE, manifest, [signature])

    refused("another manifest", good, MANIFEST + b" ")
    refused("another name", key.sign(payload(reference="h.example:5000/a/b:2")))
    refused("malformed", key.sign(b"{}"))
    refused("not valid", other.sign(payload()))
    refused("not valid", good[:-5] + bytes(5))
    refused("not valid", good[:20])
    refused("not valid", payload())
    refused("not valid", key.run("--store", stdin=payload()))
    refused("not valid", key.sign(payload(), "--detach-sign"))
    refused("not valid", key.run("--symmetric", "--passphrase", "x", stdin=payload()))
    with pytest.raises(PolicyRejected, match="no signature exists"):
        given.check("docker", IMAGE, MANIFEST)
    with pytest.raises(PolicyRejected, match="none of the signatures"):
        given.check("docker", IMAGE, MANIFEST, [b"", other.sign(payload())])
    with pytest.raises(PolicyRejected, match="another name"):
        given.check("dir", "/a", MANIFEST, [good])


@GPG
def test_a_message_says_one_thing_by_one_signer(key: GpgKey, other: GpgKey) -> None:
    both = [key.public.read_bytes(), other.public.read_bytes()]
    plain = ("--sign", "--compress-algo", "none")
    unsigned = key.run("--store", "--compress-algo", "none", stdin=b"unsigned")
    for message in (
        key.sign(b"A", *plain) + other.sign(b"B", *plain),
        unsigned + key.sign(b"A", *plain),
        key.sign(b"A", *plain) + unsigned,
    ):
        with pytest.raises(PolicyRejected):
            verified_payload(message, both)
    # What follows a compressed message gpg does not look at: it is no part of the payload.
    assert verified_payload(key.sign(b"A") + other.sign(b"B"), both) == b"A"


@GPG
def test_two_signers_of_one_message_are_refused() -> None:
    with GpgKey(algorithm="ed25519") as key:
        key.run("--quick-gen-key", "second", "ed25519", "sign", "0")
        users = ("--local-user", key.address, "--local-user", "second")
        with pytest.raises(PolicyRejected, match="2 times"):
            verified_payload(key.sign(b"A", *users, "--sign"), [key.run("--export")])


@GPG
def test_an_expired_key_signs_nothing() -> None:
    with GpgKey(algorithm="ed25519") as key:
        signature = key.sign(payload())
        key.run(
            "--faked-system-time",
            "20200101T000000!",
            "--quick-gen-key",
            "old",
            "ed25519",
            "sign",
            "1d",
        )
        old = key.run(
            "--faked-system-time",
            "20200101T010000!",
            "--local-user",
            "old",
            "--sign",
            stdin=payload(),
        )
        ring = key.run("--export")
        assert verified_payload(signature, [ring]) == payload()
        with pytest.raises(PolicyRejected, match="EXPKEYSIG"):
            verified_payload(old, [ring])


@GPG
def test_keys_that_are_none(key: GpgKey, tmp_path: Path) -> None:
    signature = key.sign(payload())
    with pytest.raises(PolicyRejected, match="no public key"):
        signed_by(keyData="").check("docker", IMAGE, MANIFEST, [signature])
    with pytest.raises(PolicyRejected, match="cannot be read"):
        signed_by(keyPath=str(tmp_path / "none")).check("docker", IMAGE, MANIFEST, [signature])


@GPG
def test_a_payload_that_is_a_bomb(key: GpgKey, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = key.sign(bytes(3 << 20))
    assert len(bomb) < 1 << 16
    monkeypatch.setattr(limits, "SIGNATURE_BYTES", 1 << 16)
    with pytest.raises(PolicyRejected):
        verified_payload(bomb, [key.public.read_bytes()])
    with pytest.raises(PolicyRejected, match="too large"):
        verified_payload(bytes((1 << 16) + 1), [key.public.read_bytes()])


@GPG
def test_the_users_own_keys_have_no_say(
    key: GpgKey, other: GpgKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(other.home))
    with pytest.raises(PolicyRejected):
        verified_payload(other.sign(payload()), [key.public.read_bytes()])


def test_without_gpg_the_image_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PolicyRejected, match="no gpg"):
        signed_by(keyData="").check("docker", IMAGE, MANIFEST, [b"x"])
