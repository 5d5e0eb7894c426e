"""References are normalised as Docker and containers/image do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.errors import InvalidReference
from layerstore.image import Digest, Reference

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3", "docker.io/library/alpine:3"),
        ("user/x", "docker.io/user/x:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/user/x:1", "docker.io/user/x:1"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("127.0.0.1:5055/test/img", "127.0.0.1:5055/test/img:latest"),
        ("h.example/a/b/c", "h.example/a/b/c:latest"),
        ("UPPER/x", "UPPER/x:latest"),  # a capital letter can only be a host
        (f"alpine@sha256:{HEX}", f"docker.io/library/alpine@sha256:{HEX}"),
        (f"h.example/x:1@sha256:{HEX}", f"h.example/x:1@sha256:{HEX}"),
        ("h.example/a__b/c.d/e--f:A_b.c-D", "h.example/a__b/c.d/e--f:A_b.c-D"),
        ("x:latest", "docker.io/library/x:latest"),
    ],
)
def test_normalisation(text: str, canonical: str) -> None:
    reference = Reference.parse(text)
    assert str(reference) == canonical
    assert Reference.parse(canonical) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        ":",
        "@",
        "Alpine",
        "a/B",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:-x",
        "a:x y",
        "a\n",
        "a:1\n",
        "docker://a",
        "https://h.example/a",
        "-a/b",
        "h.example:port/a",
        "h_.example/a",
        "[::1]:5000/a:1",  # Podman 4 and 5 cannot parse it
        "[fe80::1]/a",
        "a..b/c",
        "h.example/.a",
        "h.example/a___b",
        HEX,
        f"a@{HEX}",
        "a@sha256:abc",
        f"a@sha256:{HEX.upper()}",
        f"a@sha256:{HEX}@sha256:{HEX}",
        f"a@sha256:{HEX}:1",
        "a:" + "t" * 129,
        "h.example/" + "a" * 256,
        "x" * (limits.REFERENCE_CHARS + 1),
        "größe",
        "h.example/\uff41",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        Reference.parse(text)


def test_an_ipv6_address_wants_a_host_name() -> None:
    with pytest.raises(InvalidReference, match="/etc/hosts"):
        Reference.parse("[::1]:5000/a:1")


def test_parts_and_changes() -> None:
    digest = Digest.of(b"")
    reference = Reference.parse("h.example:1/a/b:t")
    assert (reference.domain, reference.path, reference.tag, reference.digest) == (
        "h.example:1",
        "a/b",
        "t",
        None,
    )
    assert reference.name == "h.example:1/a/b"
    pinned = reference.with_digest(digest)
    assert str(pinned) == f"h.example:1/a/b@{digest}"
    assert str(pinned.with_tag("u")) == "h.example:1/a/b:u"
    with pytest.raises(InvalidReference):
        reference.with_tag("a/b")


@given(st.text(max_size=60))
def test_any_text_is_refused_or_canonical(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidReference:
        return
    assert Reference.parse(str(reference)) == reference


_DOMAINS = st.from_regex(r"[a-z0-9]{1,8}\.[a-zA-Z0-9]{1,8}(:[0-9]{1,5})?", fullmatch=True)
_PATHS = st.from_regex(r"[a-z0-9]{1,5}((\.|_|__|-{1,3}|/)[a-z0-9]{1,5}){0,4}", fullmatch=True)
_TAGS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,20}", fullmatch=True)
_DIGESTS = st.binary(max_size=4).map(Digest.of)


@given(_DOMAINS, _PATHS, st.none() | _TAGS, st.none() | _DIGESTS)
def test_written_references_are_read_back(
    domain: str, path: str, tag: str | None, digest: Digest | None
) -> None:
    written = Reference(domain, path, tag, digest)
    expected = written if tag is not None or digest is not None else written.with_tag("latest")
    assert Reference.parse(str(written)) == expected
