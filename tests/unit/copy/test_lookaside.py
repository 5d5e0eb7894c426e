"""Where signatures lie, and fetching them."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.copy.lookaside import Lookaside
from layerstore.copy.registriesd import RegistriesD, mapping
from layerstore.errors import ConfigError, NetworkError, RegistryError
from layerstore.image import Digest, Reference
from layerstore.registry import RegistrySettings

DIGEST = Digest.of(b"manifest")
IMAGE = Reference.parse("h.example:5000/a/b:1")


def load(directory: Path, **files: str) -> RegistriesD:
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text)
    return RegistriesD.load(directory)


def test_the_most_specific_scope_with_an_address_decides(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        a="# where\ndefault-docker:\n  lookaside: file:///default # note\n",
        b="docker:\n"
        "  h.example:5000:\n    lookaside-staging: file:///w\n    lookaside: https://host/x#y\n"
        '  "*.example":\n    sigstore: "file:///wild"\n'
        "  h.example:5000/a/b:\n    use-sigstore-attachments: true\n"
        "  h.example:5000/c:\n    sigstore: file:///old\n    lookaside: 'file:///new'\n",
    )
    assert found.lookaside(IMAGE) == "https://host/x#y"
    assert found.lookaside(Reference.parse("h.example:5000/c/d")) == "file:///new"
    assert found.lookaside(Reference.parse("x.example/d")) == "file:///wild"
    assert found.lookaside(Reference.parse("alpine")) == "file:///default"


def test_the_users_directory_replaces_the_machines(tmp_path: Path) -> None:
    machine = tmp_path / "etc/containers/registries.d"
    machine.mkdir(parents=True)
    (machine / "x.yaml").write_text("default-docker:\n  lookaside: file:///machine\n")
    etc, home = tmp_path / "etc", tmp_path / "home"
    assert RegistriesD.from_system(home, etc).default == "file:///machine"
    (home / ".config/containers/registries.d").mkdir(parents=True)
    assert RegistriesD.from_system(home, etc).default == ""
    assert RegistriesD.from_system(tmp_path / "other", tmp_path / "none") == RegistriesD()


@pytest.mark.parametrize(
    "text",
    [
        "docker: [a]\n",
        "docker: {a: b}\n",
        "docker:\n  - a\n",
        "docker:\n  h:\n    lookaside: |\n      x\n",
        "docker:\n  h:\n    lookaside: &a x\n",
        "docker:\n  *h:\n    lookaside: x\n",
        "docker:\n  h:\n    lookaside: x: y\n",
        "docker:\n  h:\n    lookaside: 'x\n",
        "docker:\n  h:\n    lookaside: x\n     y\n",
        "docker:\n  h:\n   lookaside: x\n  i:\n    lookaside: y\n   sigstore: z\n",
        "docker:\n  h:\n    lookaside: x\n  h:\n    lookaside: y\n",
        "docker:\n\th:\n",
        "docker:\n  h:\n    looksaside: x\n",
        "docker:\n  h: x\n",
        "docker: x\n",
        "other:\n",
        "? docker\n",
        "plain\n",
        "a: 'b' c\n",
        'a: "\\x41"\n',
    ],
)
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, a=text)


def test_nothing_may_stand_in_two_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="earlier"):
        load(tmp_path, a="default-docker:\n  sigstore: x\n", b="default-docker:\n")
    with pytest.raises(ConfigError, match="earlier"):
        load(tmp_path, a="docker:\n  h:\n", b="docker:\n  h:\n")


def test_simple_yaml() -> None:
    text = "---\n# c\na:\n  'b''c': \"d\\te\"  # f\n  g#h: i#j\n  k: http://l:1/m  \n\nn: {}\no: ~\np:\n"
    assert mapping(text) == {
        "a": {"b'c": "d\te", "g#h": "i#j", "k": "http://l:1/m"},
        "n": None,
        "o": None,
        "p": None,
    }


@given(st.text(alphabet="ab:#' \"\n-{}[]*", max_size=60))
def test_no_text_does_worse_than_a_config_error(text: str) -> None:
    try:
        mapping(text)
    except ConfigError:
        return


# -- fetching ------------------------------------------------------------------------


def place(root: Path, *signatures: bytes) -> None:
    directory = root / f"a/b@sha256={DIGEST.hex}"
    directory.mkdir(parents=True)
    for number, signature in enumerate(signatures, 1):
        (directory / f"signature-{number}").write_bytes(signature)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    root = tmp_path / "served"
    root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def at(address: str, **options: Any) -> Lookaside:
    return Lookaside(RegistriesD({"h.example:5000": address}), Path("/nowhere"), **options)


def test_signatures_of_this_machine(tmp_path: Path) -> None:
    root = tmp_path / "with space"
    place(root, b"one", b"two")
    (root / f"a/b@sha256={DIGEST.hex}/signature-4").write_bytes(b"beyond a gap")
    assert at(root.as_uri()).signatures(IMAGE, DIGEST) == (b"one", b"two")
    assert at(root.as_uri() + "/").signatures(IMAGE, Digest.of(b"")) == ()
    assert Lookaside(directory=root).signatures(IMAGE, DIGEST) == (b"one", b"two")


def test_signatures_over_http(served: str, tmp_path: Path) -> None:
    place(tmp_path / "served/sub", b"one", b"two")
    assert at(f"{served}/sub").signatures(IMAGE, DIGEST) == (b"one", b"two")
    assert at(f"{served}/sub").signatures(IMAGE, Digest.of(b"")) == ()


def test_what_cannot_be_fetched_is_an_error(served: str, tmp_path: Path) -> None:
    settings = RegistrySettings(attempts=1, connect_seconds=0.5)
    with pytest.raises(NetworkError):
        at("http://127.0.0.1:1", settings=settings).signatures(IMAGE, DIGEST)
    with pytest.raises(ConfigError, match="addresses"):
        at("ftp://host/").signatures(IMAGE, DIGEST)
    with pytest.raises(ConfigError, match="another host"):
        at("file://host/").signatures(IMAGE, DIGEST)


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path, b"one", b"two")
    monkeypatch.setattr(limits, "SIGNATURES", 1)
    with pytest.raises(RegistryError, match="more than 1"):
        at(tmp_path.as_uri()).signatures(IMAGE, DIGEST)
    monkeypatch.setattr(limits, "SIGNATURE_BYTES", 2)
    with pytest.raises(RegistryError, match="too large"):
        at(tmp_path.as_uri()).signatures(IMAGE, DIGEST)


def test_the_system_default_depends_on_the_user(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    assert Lookaside.from_system(env=env, uid=0, etc=tmp_path).directory == Path(
        "/var/lib/containers/sigstore"
    )
    user = Lookaside.from_system(env=env, uid=7, etc=tmp_path).directory
    assert user == tmp_path / ".local/share/containers/sigstore"
    # inside a namespace that Podman made for a user, he looks like root
    inside = {**env, "_CONTAINERS_ROOTLESS_UID": "7"}
    assert Lookaside.from_system(env=inside, etc=tmp_path).directory == user
