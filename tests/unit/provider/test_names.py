from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import InvalidDigest, InvalidReference
from layerstore.provider import names
from layerstore.provider.names import Control

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    "reference",
    [
        "docker.io/library/alpine:latest",
        "127.0.0.1:5055/test/img:latest",
        f"quay.io/a/b@{DIGEST}",
        "host.example/x:1",
    ],
)
def test_a_reference_element_is_padded_standard_base64(reference):
    element = base64.b64encode(reference.encode())
    assert names.reference_of(element) == reference
    assert names.element_of(reference) == element


@pytest.mark.parametrize(
    "element",
    [
        b"",
        b"pool",
        b"!!!!",
        base64.b64encode(b"docker.io/library/alpine:latest").rstrip(b"=") + b"\n",
        base64.b64encode(b"alpine"),  # not fully qualified: no client writes that
        base64.b64encode(b"docker.io/library/alpine"),
        base64.b64encode(b"\xff\xfe"),
        base64.b64encode(b"a/../b:1"),
        b"ZG9ja2VyLmlvL2xpYnJhcnkvYWxwaW5lOmxhdGVzdC==",
    ],
)
def test_anything_else_is_refused(element):
    with pytest.raises(InvalidReference):
        names.reference_of(element)


@given(st.binary(max_size=80))
def test_no_other_error_escapes(element):
    with contextlib.suppress(InvalidReference):
        assert names.element_of(names.reference_of(element)) == element


def test_a_digest_element_carries_its_algorithm():
    assert names.digest_of(DIGEST.encode()) == DIGEST
    for bad in (b"ab" * 32, b"sha512:" + b"ab" * 32, b"sha256:xyz", b"sha256:\xff"):
        with pytest.raises(InvalidDigest):
            names.digest_of(bad)


@given(
    st.integers(1, names.SLOTS - 1),
    st.integers(0, (1 << 24) - 1),
    st.integers(0, names.VIEWS - 1),
)
def test_layer_nodes_round_trip_and_never_meet_others(slot, entry, view):
    node = names.layer_node(slot, entry, view)
    assert names.layer_of(node) == (slot, entry, view)
    assert node != names.ROOT_NODE
    assert not names.is_control(node)
    assert 0 < node < 1 << 63


@given(st.sampled_from(Control), st.text(max_size=40), st.text(max_size=40))
def test_control_nodes_round_trip(kind, reference, name):
    key = names.name_hash(reference, name)
    node = names.control_node(kind, key)
    assert names.is_control(node)
    assert names.control_of(node) == (kind, key)
    assert 0 < node < 1 << 63


def test_name_hashes_are_stable_across_releases():
    # a client's mount may outlive the process: the numbers must never change
    assert names.name_hash("docker.io/library/alpine:latest") == 0x892A515CFD3117
