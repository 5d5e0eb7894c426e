"""A registry that hangs, dies and comes back a minute later, and one that never comes back.

LAYERSTORE_OUTAGE_SECONDS is how long the first one is away.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import rig as lab
from lab.podman import PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import MakeRig, PlainTree, Pushed, Rig

AWAY = float(os.environ.get("LAYERSTORE_OUTAGE_SECONDS", "60"))
PATIENCE = 12.0  # of the store whose registry is gone for good
HELLO = "hello from small amd64: 199 files\n"
BIG = "data/big.bin"
AT_ONCE = 10.0  # for something that may not wait, on a machine that is busy
AFTER = 60.0  # for what went on when the registry is back

READ = """
import hashlib, sys
with open(sys.argv[1], "rb", buffering=0) as file:
    seen = hashlib.sha256(file.read(65536))
    print("begun", flush=True)
    sys.stdin.readline()
    while data := file.read(65536):
        seen.update(data)
print(seen.hexdigest(), flush=True)
"""


class Reader:
    """A process that reads the beginning of a file, and the rest of it when told to."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READ, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.began = time.monotonic()

    def waits(self) -> bool:
        return self._process.poll() is None

    def result(self, seconds: float) -> tuple[str, str]:
        """What it printed and what it complained of."""
        digest, said = self._process.communicate(timeout=seconds)
        return digest.strip(), said

    def kill(self) -> float:
        """Seconds until it is gone after SIGKILL."""
        begin = time.monotonic()
        self._process.kill()
        self._process.communicate(timeout=AT_ONCE)
        return time.monotonic() - begin


@contextlib.contextmanager
def away(directory: Path, pushed: Pushed) -> Iterator[DebianRegistry]:
    """A registry of its own, with the image."""
    with DebianRegistry(directory) as registry:
        with PodmanEnv(directory / "pusher", registries=(registry.host,)) as env:
            env.skopeo(
                "copy", "--quiet", "--all", "--preserve-digests",
                pushed.image.source, f"docker://{registry.host}/{pushed.name}",
            )  # fmt: skip
        yield registry


def pulled(rig: Rig, image: str) -> None:
    rig.env.podman("pull", "-q", image)
    assert len(lab.store_layers(rig.env, rig.store)) == 3
    assert rig.env.podman("run", "--rm", image).stdout == HELLO


def is_fast(rig: Rig, image: str) -> None:
    """What needs no registry is as fast as ever."""
    begin = time.monotonic()
    assert rig.store.stat().st_ino == 1
    assert rig.env.podman("images", "-q").stdout
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert time.monotonic() - begin < AT_ONCE


def kill(registry: DebianRegistry) -> None:
    assert registry.pid is not None
    os.kill(registry.pid, signal.SIGKILL)
    registry.stop()


@pytest.mark.timeout(300 + AWAY)
def test_reads_outlast_an_outage_and_fail_where_it_does_not_end(
    make_rig: MakeRig, workspace: Path, small: Pushed, plain_tree: PlainTree
) -> None:
    right = plain_tree(small)[BIG.encode()].digest
    with (
        away(workspace / "back", small) as back,
        away(workspace / "gone", small) as gone,
        contextlib.ExitStack() as stack,
    ):
        # away for a while, with the default policy
        rig = make_rig("debian13", provider_upstream=back.host, config="background_fetch = false\n")
        image = rig.image(small.name)
        pulled(rig, image)
        root = stack.enter_context(lab.mounted(rig.env, image))
        # away for good
        poor = make_rig(
            "debian12",
            provider_upstream=gone.host,
            config=f"background_fetch = false\n[outage]\nwait_seconds = {PATIENCE}\n",
        )
        lost = poor.image(small.name)
        pulled(poor, lost)
        lost_root = stack.enter_context(lab.mounted(poor.env, lost))

        readers = [Reader(root / BIG), Reader(root / BIG), Reader(lost_root / BIG)]
        reader, victim, hopeless = readers
        assert back.pid is not None
        os.kill(back.pid, signal.SIGSTOP)  # it takes connections and says nothing
        kill(gone)
        began = time.monotonic()
        for one in readers:
            one.go_on()
        run = ("run", "-d", "--name=waiting", image, "sha256sum", f"/{BIG}")
        rig.env.podman(*run)

        # gone for good: an error with its reason after the time of the policy, and only then
        digest, said = hopeless.result(PATIENCE + AFTER)
        assert digest == ""
        assert "Input/output error" in said
        assert time.monotonic() - hopeless.began >= PATIENCE - 1
        failed = poor.env.podman("run", "--rm", lost, "sha256sum", f"/{BIG}", check=False)
        assert failed.returncode != 0
        assert "I/O error" in failed.stderr or "Input/output error" in failed.stderr
        reasons = set(
            re.findall(r"event=read-failed reason=(\S+) .*file=(\S+)", poor.service.log())
        )
        assert reasons == {("outage", BIG)}
        status = poor.service.status()
        assert status["content"]["failed_reads"].keys() == {"outage"}
        assert status["outages"]["now"][0]["places"] == gone.host
        is_fast(poor, lost)

        # a while: who waits can be killed, and all that is here is served meanwhile
        assert reader.waits()
        assert victim.waits()
        assert victim.kill() < AT_ONCE
        is_fast(rig, image)
        time.sleep(max(0.0, began + AWAY / 2 - time.monotonic()))
        kill(back)
        is_fast(rig, image)
        time.sleep(max(0.0, began + AWAY - time.monotonic()))
        assert reader.waits()
        status = rig.service.status()
        assert status["outages"]["now"][0]["waiting"] >= 1
        assert status["read_errors"] == 0
        back.start()
        assert reader.result(AFTER) == (right, "")
        assert rig.env.podman("wait", "waiting").stdout == "0\n"
        assert rig.env.podman("logs", "waiting").stdout.split()[0] == right
        rig.env.podman("rm", "waiting")
        status = rig.service.status()
        assert status["read_errors"] == 0
        assert status["outages"]["begun"] >= 1
        assert status["outages"]["ended"] == status["outages"]["begun"]
        assert status["outages"]["waited"] >= 1
        assert "event=outage-begun" in rig.service.log()
        assert "event=outage-ended" in rig.service.log()

        # nor has the other store to be restarted
        gone.start()
        deadline = time.monotonic() + AFTER
        while poor.env.podman(
            "run", "--rm", lost, "sha256sum", f"/{BIG}", check=False
        ).stdout.split()[:1] != [right]:
            assert time.monotonic() < deadline
