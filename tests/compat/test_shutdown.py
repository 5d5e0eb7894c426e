"""The end of the store: politely, with nothing left in the way, and never two at once."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import layerstore
from lab import processes
from lab.podman import CommandError
from lab.rig import Pushed, Rig


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def ours(directory: Path) -> list[int]:
    """Our processes whose command line names something below the directory."""
    named = processes.naming(directory).items()
    return [pid for pid, line in named if "layerstore." in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_plain_directory_that_podman_can_live_with(
    rig: Rig, small: Pushed, number: signal.Signals
) -> None:
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    assert str(rig.store) in mounts()
    assert {rig.service.keeper_pid, rig.service.pid} <= {*ours(rig.service.directory)}
    began = time.monotonic()
    assert rig.service.stop(number) == 0
    assert time.monotonic() - began < 15
    assert str(rig.store) not in mounts()
    left = {path.name for path in rig.store.rglob("*") if not path.is_dir()}
    # Podman 5 adds up the files of layers that are known by their TOC only, each time anew
    assert left == (set() if rig.flavour == "debian12" else {"diff"})
    assert ours(rig.service.directory) == []
    assert "event=stopped" in rig.service.log()
    assert "Traceback" not in rig.service.log()
    assert rig.env.podman("image", "exists", image, check=False).returncode == 0
    assert image in rig.env.podman("images", "--format", "{{.Repository}}:{{.Tag}}").stdout
    rig.env.podman("system", "df")
    assert image in rig.env.podman("inspect", image).stdout
    # its layers are away with the store: that is an error, not a hang
    with pytest.raises(CommandError):
        rig.env.podman("run", "--rm", image, timeout=30)
    rig.env.podman("rmi", image)
    rig.env.podman("pull", image)
    assert rig.env.podman("run", "--rm", image).stdout.startswith("hello from small")
    rig.service.start()
    rig.service.stop()
    # what stands for the layers is there again, whatever has become of the images
    assert left == {path.name for path in rig.store.rglob("*") if not path.is_dir()}


def test_a_mount_whose_processes_were_killed_is_cleared_away(rig: Rig, small: Pushed) -> None:
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    keeper = rig.service.leave()
    keeper.kill()
    keeper.wait(10)
    with pytest.raises(CommandError):
        rig.env.podman("run", "--rm", image, timeout=30)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "layerstore.cli", "unmount", str(rig.store)),
            *("--root", str(rig.service.root), "--json"),
        ],
        env={**rig.env.environment(), "PYTHONPATH": str(Path(layerstore.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"mountpoint": str(rig.store), "unmounted": True}
    assert image in rig.env.podman("images", "--format", "{{.Repository}}:{{.Tag}}").stdout
    rig.env.podman("rmi", image)


def test_running_containers_keep_their_layers_after_a_stop(rig: Rig, small: Pushed) -> None:
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    container = rig.env.podman("run", "-d", image, "sleep", "600").stdout.strip()
    keeper = rig.service.leave()
    keeper.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while str(rig.store) in mounts() and time.monotonic() < deadline:
        time.sleep(0.02)
    # what was never read before comes from the registry still
    rig.provider.clear()
    read = rig.env.podman("exec", container, "sh", "-c", "cat /data/big.bin | wc -c").stdout
    assert int(read) > 5_000_000
    assert rig.provider.requests() != []
    assert "event=draining" in rig.service.log()
    assert rig.service.status()["keeper"]["draining"] is True
    # all else is as without a store
    assert rig.env.podman("ps", "-q").stdout.strip() == container[:12]
    assert image in rig.env.podman("images", "--format", "{{.Repository}}:{{.Tag}}").stdout
    rig.env.podman("rm", "-f", "--time=0", container)
    assert keeper.wait(10) == 0
    assert ours(rig.service.directory) == []


def test_a_second_signal_ends_it_under_a_running_container(rig: Rig, small: Pushed) -> None:
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    container = rig.env.podman("run", "-d", image, "sleep", "600").stdout.strip()
    began = time.monotonic()
    assert rig.service.stop() == 0  # sends the second one
    assert time.monotonic() - began < 15
    assert "event=draining" in rig.service.log()
    assert str(rig.store) not in mounts()
    # what it has not read yet is gone for it; Podman still gets rid of it
    rig.env.podman("rm", "-f", "--time=0", container)
    assert rig.env.podman("ps", "-aq").stdout == ""


def serve(rig: Rig, mountpoint: Path, root: Path) -> subprocess.CompletedProcess[str]:
    """A further service, which ought to refuse at once."""
    return subprocess.run(
        [sys.executable, "-m", "layerstore.cli", "serve", str(mountpoint), "--root", str(root)],
        env={
            **rig.env.environment(),
            "PYTHONPATH": str(Path(layerstore.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_a_second_service_refuses_the_same_state_and_the_same_mount(
    rig: Rig, small: Pushed
) -> None:
    rig.env.podman("pull", rig.image(small.name))
    elsewhere = rig.service.directory / "elsewhere"
    refused = serve(rig, elsewhere, rig.service.root)
    assert refused.returncode == 1
    assert "another layerstore service uses this root directory" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert str(elsewhere) not in mounts()
    refused = serve(rig, rig.store, rig.service.directory / "other-state")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert mounts().count(f" {rig.store} ") == 1
    assert rig.env.podman("run", "--rm", rig.image(small.name)).stdout.startswith("hello")
