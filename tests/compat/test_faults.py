"""A registry that fails the store: right contents or an error, never wrong bytes, never a hang.

Podman has a sound registry throughout; the store's is a simulator that fails on demand.
"""

import collections
import hashlib
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import oci
from lab import rig as lab
from lab.oci import StoredImage
from lab.podman import Flavour
from lab.registry import DebianRegistry
from lab.rig import MakeRig, PlainTree, Push, Pushed, Rig
from lab.simregistry import SimRegistry
from layerstore import limits
from layerstore.formats import FOOTER_BYTES, parse_footer, read_toc
from layerstore.image import annotations as keys

HELLO = "hello from small amd64: 199 files\n"
NO_BACKGROUND = 'background_fetch = false\noutage.policy = "fail"\n'
BIG = 1  # the layer that holds /data/big.bin
MIDDLE = 6_000_000  # inside big.bin's second chunk, in the blob

RigOn = Callable[[Flavour], Rig]


@pytest.fixture
def sim(small: Pushed) -> Iterator[SimRegistry]:
    """A simulator that holds the small image."""
    with SimRegistry() as registry:
        load(registry, small)
        yield registry


def load(registry: SimRegistry, pushed: Pushed) -> None:
    """Put an image into a simulator."""
    repository, _, tag = pushed.name.partition(":")
    image = pushed.image
    raw = image.blob(image.digest).read_bytes()
    for name in (json.loads(raw)["config"]["digest"], *lab.sizes(image)):
        registry.add_blob(repository, image.blob(name).read_bytes())
    registry.add_manifest(repository, raw, tag)


def refusals(rig: Rig) -> collections.Counter[str]:
    """Logged reasons of refused lookups."""
    return collections.Counter(re.findall(r"event=lookup-refused reason=(\S+)", rig.service.log()))


def failed_reads(rig: Rig) -> list[tuple[str, str]]:
    """Logged reason and file of failed reads."""
    return re.findall(r"event=read-failed reason=(\S+) .*file=(\S+)", rig.service.log())


def is_well(rig: Rig) -> bool:
    """Whether the service lives and nothing unforeseen happened."""
    status = rig.service.status()
    return status["fuse"]["events"]["handler_errors"] == 0 and "Traceback" not in rig.service.log()


# -- at the lookup -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "kind", "match", "options", "reason"),
    [
        ("debian12", "status", "/blobs/", {"status": 404}, "not-found"),
        ("debian13", "status", "/blobs/", {"status": 404}, "not-found"),
        ("debian13", "status", "/blobs/", {"status": 401}, "authentication"),
        ("debian12", "status", "/blobs/", {"status": 403}, "authentication"),
        ("debian13", "status", "/blobs/", {"status": 429}, "rate-limited"),
        ("debian12", "status", "/blobs/", {"status": 500}, "registry"),
        ("debian13", "status", "/manifests/", {"status": 404}, "not-found"),
        ("debian12", "status", "/manifests/", {"status": 503}, "registry"),
        ("debian13", "reset", "/blobs/", {}, "network"),
        ("debian12", "short", "/blobs/", {"after": 100}, "network"),
        ("debian13", "other", "/manifests/", {"data": b"{}"}, "invalid-manifest"),
        ("debian12", "other", "/blobs/", {"data": b"wrong bytes "}, "invalid-layer|verification"),
        ("debian13", "flip", "/blobs/", {"after": -2000}, "invalid-layer|verification"),
        ("debian12", "range", "/blobs/", {"value": "bytes 0-9/10"}, "registry|no-ranges|network"),
    ],
)
def test_a_refused_lookup_becomes_a_plain_pull(
    flavour: Flavour,
    make_rig: MakeRig,
    sim: SimRegistry,
    small: Pushed,
    plain_tree: PlainTree,
    kind: Any,
    match: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    rig = make_rig(flavour, provider_upstream=sim.host)
    image = rig.image(small.name)
    sim.fault(kind, match, **options)
    began = time.monotonic()
    rig.env.podman("pull", image)
    assert time.monotonic() - began < limits.RESOLVE_ANSWER_SECONDS * len(small.image.layers)
    assert len(lab.extracted_layers(rig.env)) == len(small.image.layers)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image)) == []
    logged = refusals(rig)
    assert all(re.fullmatch(reason, said) for said in logged)
    # each lookup is counted and logged, also where the registry is not asked anew
    counted = rig.service.status()["lookups"]
    assert sum(counted[said] for said in logged) == len(small.image.layers)
    assert logged.total() == len(small.image.layers)
    assert is_well(rig)


def test_it_is_lazy_again_when_the_registry_recovers(
    rig_on: RigOn, sim: SimRegistry, small: Pushed
) -> None:
    rig = rig_on("debian13")
    image = rig.image(small.name)
    fault = sim.fault("status", "/blobs/", status=500)
    rig.env.podman("pull", image)
    assert lab.extracted_layers(rig.env)
    rig.env.podman("rmi", image)
    fault.times = 0
    time.sleep(limits.FAILURE_SECONDS)
    rig.env.podman("pull", image)
    assert len(lab.store_layers(rig.env, rig.store)) == len(small.image.layers)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO


@pytest.fixture
def rig_on(make_rig: MakeRig, sim: SimRegistry) -> RigOn:
    """``rig_on(flavour)``: a store that asks the simulator and fetches nothing by itself."""
    return lambda flavour: make_rig(flavour, provider_upstream=sim.host, config=NO_BACKGROUND)


@pytest.fixture(scope="session")
def mislabelled(push: Push, small: Pushed, workspace: Path) -> Pushed:
    """The small image whose middle layer announces another TOC than it has."""

    def change(manifest: lab.Document, config: lab.Document) -> None:
        manifest["layers"][BIG]["annotations"][keys.ESTARGZ_TOC_DIGEST] = f"sha256:{'5' * 64}"

    layout = lab.edited(small.image, workspace / "mislabelled", change)
    return push(oci.read_image(layout, "latest"), "mislabelled/small:1")


def test_a_layer_that_announces_another_toc_is_pulled_plainly(
    rig: Rig, mislabelled: Pushed, plain_tree: PlainTree, small: Pushed
) -> None:
    image = rig.image(mislabelled.name)
    rig.env.podman("pull", image)
    assert refusals(rig) == {"verification": 1}
    assert len(lab.extracted_layers(rig.env)) == 1
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image)) == []
    assert is_well(rig)


def test_where_ranges_are_ignored_small_layers_are_taken_whole(
    flavour: Flavour, rig_on: RigOn, sim: SimRegistry, small: Pushed, plain_tree: PlainTree
) -> None:
    rig = rig_on(flavour)
    image = rig.image(small.name)
    sim.fault("ignore-range", "/blobs/")
    rig.env.podman("pull", image)
    assert refusals(rig) == {"no-ranges": 1}
    assert len(lab.extracted_layers(rig.env)) == 1
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image)) == []
    assert is_well(rig)


# -- at a read -----------------------------------------------------------------------


@pytest.fixture
def lazy(rig_on: RigOn, small: Pushed) -> tuple[Rig, str]:
    """The small image, pulled lazily while all was well; nothing is read yet.

    By Podman 5: reads look the same to both.
    """
    rig = rig_on("debian13")
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    assert len(lab.store_layers(rig.env, rig.store)) == len(small.image.layers)
    return rig, image


def cat(rig: Rig, image: str, path: str = "/data/big.bin") -> tuple[str, str]:
    """Digest of a file as a container reads it (or nothing), and what it complains of."""
    command = ("sh", "-c", f"set -o pipefail; sha256sum {path}")
    done = rig.env.podman("run", "--rm", image, *command, check=False)
    return done.stdout.partition(" ")[0], done.stderr


def content(plain_tree: PlainTree, small: Pushed, path: str = "/data/big.bin") -> str:
    return plain_tree(small)[path[1:].encode()].digest


def damaged(blob: bytes) -> bytes:
    """The big layer's blob with a byte of big.bin changed."""
    wrong = bytearray(blob)
    wrong[MIDDLE] ^= 0x10
    return bytes(wrong)


def forged(blob: bytes) -> bytes:
    """The same with a checksum that fits: only the digest in the table of contents tells."""
    footer = parse_footer(blob[-FOOTER_BYTES:], len(blob))
    entries = json.loads(read_toc(blob[footer.toc_offset :][: footer.toc_size]))["entries"]
    offsets = sorted({entry["offset"] for entry in entries if "offset" in entry})
    start = max(offset for offset in offsets if offset < MIDDLE)
    end = min(offset for offset in offsets if offset > MIDDLE)
    right = zlib.decompress(blob[start:end], wbits=31)
    for place in range(MIDDLE, end):
        deflated = bytearray(blob[start + 10 : end - 8])
        deflated[place - start - 10] ^= 0x10
        try:
            wrong = zlib.decompress(deflated, wbits=-15)
        except zlib.error:
            continue
        if len(wrong) == len(right) and wrong != right:
            trailer = struct.pack("<II", zlib.crc32(wrong), len(wrong))
            return blob[: start + 10] + deflated + trailer + blob[end:]
    raise AssertionError("no byte of the member can be changed alone")


def corrupt(
    sim: SimRegistry, image: StoredImage, change: Callable[[bytes], bytes] = damaged
) -> Callable[[], None]:
    """Change the big layer's blob; call what is returned to heal it."""
    digest = image.layers[BIG].digest
    right = sim.blobs[digest]
    sim.blobs[digest] = change(right)

    def heal() -> None:
        sim.blobs[digest] = right

    return heal


@pytest.mark.parametrize("change", [damaged, forged])
def test_a_corrupted_chunk_is_an_error_and_heals(
    lazy: tuple[Rig, str],
    sim: SimRegistry,
    small: Pushed,
    plain_tree: PlainTree,
    change: Callable[[bytes], bytes],
) -> None:
    rig, image = lazy
    heal = corrupt(sim, small.image, change)
    digest, said = cat(rig, image)
    assert digest == ""
    assert "I/O error" in said or "Input/output error" in said
    ((reason, file),) = failed_reads(rig)
    assert reason == ("verification" if change is forged else "invalid-layer")
    assert file == "data/big.bin"
    assert rig.service.status()["read_errors"] >= 1
    # the other files, and the sound part of this one, are there
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    first = rig.env.podman(
        "run", "--rm", image, "sh", "-c", "head -c 1000000 /data/big.bin | wc -c"
    )
    assert first.stdout == "1000000\n"
    asked = sim.count("GET", "/blobs/")
    assert asked < 40
    heal()
    time.sleep(limits.FAILURE_SECONDS)
    assert cat(rig, image)[0] == content(plain_tree, small)
    assert is_well(rig)


def test_a_corrupted_blob_in_the_background_is_no_storm(
    make_rig: MakeRig,
    sim: SimRegistry,
    small: Pushed,
    plain_tree: PlainTree,
) -> None:
    rig = make_rig("debian12", provider_upstream=sim.host)
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    heal = corrupt(sim, small.image)
    time.sleep(6)
    assert sim.count("GET", "/blobs/") < 40
    assert rig.service.cpu_seconds() < 6
    assert cat(rig, image)[0] == ""
    saved = rig.env.tmp / "saved.tar"
    assert rig.env.podman("save", "-o", saved, image, check=False).returncode
    assert is_well(rig)
    heal()
    deadline = time.monotonic() + 60
    while cat(rig, image)[0] != content(plain_tree, small):
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("status", {"status": 404}, "not-found"),
        ("status", {"status": 401}, "authentication"),
        ("status", {"status": 429}, "outage"),
        ("status", {"status": 500}, "outage"),
        ("reset", {}, "outage"),
        ("short", {"after": 100_000}, "outage"),
        ("range", {"value": ""}, "registry|no-ranges|network"),
    ],
)
def test_a_read_that_cannot_be_served_is_an_error_and_heals(
    lazy: tuple[Rig, str],
    sim: SimRegistry,
    small: Pushed,
    plain_tree: PlainTree,
    kind: Any,
    options: dict[str, Any],
    reason: str,
) -> None:
    rig, image = lazy
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    fault = sim.fault(kind, f"blobs/{small.image.layers[BIG].digest}", **options)
    began = time.monotonic()
    digest, said = cat(rig, image)
    assert digest == ""
    assert "I/O error" in said or "Input/output error" in said
    seconds = time.monotonic() - began
    assert seconds < limits.READ_ANSWER_SECONDS
    # one line for a file in a time; the kernel asks again for less when it had asked ahead
    failed = failed_reads(rig)
    assert 1 <= len(failed) <= 1 + seconds / limits.READ_ERROR_LOG_SECONDS
    assert all(re.fullmatch(reason, logged) for logged, _ in failed)
    assert {file for _, file in failed} == {"data/big.bin"}
    fault.times = 0
    time.sleep(limits.FAILURE_SECONDS)
    assert cat(rig, image)[0] == content(plain_tree, small)
    assert is_well(rig)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ignore-range", {}),
        ("reset", {"times": 1}),
        ("short", {"after": 2_000_000, "times": 3}),
        ("status", {"status": 503, "times": 2}),
        ("status", {"status": 429, "times": 1, "headers": {"Retry-After": "1"}}),
        ("chunked", {}),
        ("flip", {"after": 700_000, "times": 1}),
    ],
)
def test_a_passing_fault_is_not_even_noticed(
    lazy: tuple[Rig, str],
    sim: SimRegistry,
    small: Pushed,
    plain_tree: PlainTree,
    kind: Any,
    options: dict[str, Any],
) -> None:
    rig, image = lazy
    fault = sim.fault(kind, f"blobs/{small.image.layers[BIG].digest}", **options)
    assert cat(rig, image)[0] == content(plain_tree, small)
    assert fault.hits
    assert failed_reads(rig) == []
    assert is_well(rig)


class Stalled:
    """An image mounted through a store whose registry stalls, and two readers of it.

    They run beside the module's other tests: giving up takes READ_ANSWER_SECONDS.
    """

    def __init__(
        self,
        rig: Rig,
        sim: SimRegistry,
        small: Pushed,
        root: Path,
        names: tuple[str, ...] = ("data/big.bin", "bin/busybox"),
    ) -> None:
        self.rig = rig
        self.root = root
        self.results: dict[str, tuple[str, float]] = {}
        big, base = small.image.layers[BIG].digest, small.image.layers[0].digest
        self.once = sim.fault(
            "stall", f"blobs/{big}", after=1000, seconds=3600, times=len(names) - 1
        )
        self.always = sim.fault("stall", f"blobs/{base}", after=1000, seconds=3600)
        self.threads = [threading.Thread(target=self._read, args=(name,)) for name in names]
        for thread in self.threads:
            thread.start()

    def _read(self, name: str) -> None:
        began = time.monotonic()
        try:
            answer = hashlib.sha256((self.root / name).read_bytes()).hexdigest()
        except OSError as error:
            answer = error.strerror or ""
        self.results[name] = answer, time.monotonic() - began


@pytest.fixture(scope="module", autouse=True)
def stalled(
    workspace: Path, registry: DebianRegistry, trixie: object, small: Pushed
) -> Iterator[Stalled]:
    with (
        SimRegistry() as sim,
        Rig(
            workspace / "stalled",
            "debian13",
            registry.host,
            provider_upstream=sim.host,
            config=NO_BACKGROUND,
        ) as rig,
    ):
        load(sim, small)
        rig.env.podman("pull", rig.image(small.name))
        with lab.mounted(rig.env, rig.image(small.name)) as root:
            reading = Stalled(rig, sim, small, root)
            yield reading
            sim.close()  # whatever still waits does not any more
            for thread in reading.threads:
                thread.join()


def test_nobody_else_notices_a_stall(
    lazy: tuple[Rig, str], sim: SimRegistry, small: Pushed
) -> None:
    rig, image = lazy
    with lab.mounted(rig.env, image) as root:
        reading = Stalled(rig, sim, small, root, names=("bin/busybox",))
        time.sleep(0.5)
        for _ in range(3):
            began = time.monotonic()
            assert rig.env.podman("images", "-q").stdout
            assert (root / "etc/marker").read_text() == "amd64\n"
            assert len(list((root / "bin").iterdir())) > 30
            assert (root / "data/small/007.txt").read_text() == "file 7\n" * 8
            assert rig.service.status()["read_errors"] == 0
            assert time.monotonic() - began < 3
        assert reading.threads[0].is_alive()
        sim.close()
        reading.threads[0].join(limits.READ_ANSWER_SECONDS)
        assert reading.results["bin/busybox"][0] == "Input/output error"


def test_a_stall_ends_in_time(stalled: Stalled, small: Pushed, plain_tree: PlainTree) -> None:
    """One connection that hangs is given up for another; if all hang, the read fails."""
    for thread in stalled.threads:
        thread.join(limits.READ_ANSWER_SECONDS + 10)
    assert stalled.once.hits
    assert stalled.always.hits
    answer, seconds = stalled.results["data/big.bin"]
    assert answer == content(plain_tree, small)
    assert seconds < limits.READ_SECONDS + 10
    answer, seconds = stalled.results["bin/busybox"]
    assert answer == "Input/output error"
    assert seconds < limits.READ_ANSWER_SECONDS + 5
    stalled.always.times = 0
    time.sleep(limits.FAILURE_SECONDS)
    image = stalled.rig.image(small.name)
    assert stalled.rig.env.podman("run", "--rm", image).stdout == HELLO
    assert is_well(stalled.rig)
