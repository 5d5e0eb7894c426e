"""The unit that is shipped, under a real systemd."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.privatesystemd import SYSTEMD, NoSystemdError, PrivateSystemd
from lab.rig import layer_path
from lab.simimages import Publisher
from lab.simregistry import SimRegistry
from lab.waiting import until

UNIT = Path(__file__).resolve().parents[2] / "packaging/systemd/layerstore.service"
PLACE = "/var/lib/layerstore"
# larger than what is fetched at once
FILES = {
    f"file{number}": hashlib.shake_256(bytes([number])).digest(1_000_000) for number in range(5)
}
QUIET = "prefetch = false\nbackground_fetch = false\n[repair]\nenabled = false\n"


@pytest.fixture
def registry() -> Iterator[SimRegistry]:
    with SimRegistry() as running:
        yield running


@pytest.fixture
def systemd(tmp_path: Path, registry: SimRegistry) -> Iterator[PrivateSystemd]:
    if not SYSTEMD.exists() or os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("needs systemd, root and /dev/fuse")
    (tmp_path / "config.toml").write_text(f'root = "{tmp_path}"\n{QUIET}')
    (tmp_path / "registries.conf").write_text(
        f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n'
    )
    program = f"{sys.executable} -m layerstore.cli"
    unit = UNIT.read_text()
    for shipped, here in (
        ("/usr/local/bin/layerstore serve", f"{program} serve --config {tmp_path}/config.toml"),
        ("/usr/local/bin/layerstore reload", f"{program} reload --config {tmp_path}/config.toml"),
        ("/usr/local/bin/layerstore unmount", f"{program} unmount --config {tmp_path}/config.toml"),
        (PLACE, str(tmp_path)),
        ("StateDirectory=layerstore\n", ""),
        ("[Unit]\n", "[Unit]\nDefaultDependencies=no\n"),
        (
            "[Service]\n",
            f"[Service]\nEnvironment=CONTAINERS_REGISTRIES_CONF={tmp_path}/registries.conf\n",
        ),
    ):
        assert shipped in unit
        unit = unit.replace(shipped, here)
    try:
        with PrivateSystemd(tmp_path / "lab", {"layerstore.service": unit}) as running:
            yield running
    except NoSystemdError as error:
        # nothing that can be installed: no control groups to give away, no namespaces
        pytest.xfail(f"systemd does not run here: {error}")


def test_the_unit_keeps_the_mount_until_it_is_stopped(
    systemd: PrivateSystemd, registry: SimRegistry, tmp_path: Path
) -> None:
    image = Publisher(registry).push("a/b", "1", [FILES])
    digest = image.manifest["layers"][0]["digest"]
    store = tmp_path / "store"
    layer = layer_path(store, f"{registry.host}/a/b:1", digest) / "diff"
    systemd("systemctl", "start", "layerstore")
    listed = systemd("ls", str(layer)).split()  # READY=1 came after the mount
    assert listed == sorted(FILES)
    names = reversed(listed)  # in order, the next ones would come along
    sleep = registry.fault("latency", match="blobs/")
    # it uses the mount all the time, as a container does
    user = systemd.popen("sh", "-c", f"cd {layer}; read _; cat /dev/null", stdin=subprocess.PIPE)

    def survives(*action: str) -> None:
        """Whether a read that waits for the registry does not notice."""
        name, before = next(names), sleep.hits
        sleep.seconds = 60.0
        reader = systemd.popen("sha256sum", str(layer / name), stdout=subprocess.PIPE)
        until(lambda: sleep.hits > before)
        sleep.seconds = 0.0
        pid = systemd.show("layerstore", "MainPID")
        systemd(*action)
        assert reader.communicate(timeout=60)[0].split()[0] == sha256(FILES[name])
        until(lambda: systemd.show("layerstore", "ActiveState") == "active")
        changed = systemd.show("layerstore", "MainPID") != pid
        assert changed is (action[1] != "reload")

    survives("systemctl", "restart", "layerstore")
    survives("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "layerstore")
    survives("systemctl", "kill", "--signal=KILL", "layerstore")  # keeper and server
    survives("systemctl", "reload", "layerstore")
    assert systemd.show("layerstore", "NFileDescriptorStore") == "2"
    # unmounted by hand, with a user; then mounted anew beside it
    systemd("umount", "--lazy", str(store))
    systemd("systemctl", "restart", "layerstore")
    assert systemd.show("layerstore", "NFileDescriptorStore") == "4"
    (shell,) = systemd("pgrep", "--full", "read _").split()[:1]
    assert systemd("ls", f"/proc/{shell}/cwd/").split() == listed
    assert systemd("ls", str(layer)).split() == listed
    # for good: Podman finds a plain directory
    systemd("systemctl", "stop", "layerstore")
    assert systemd("ls", "-A", str(store)) == ""
    assert systemd("mountpoint", str(store), check=False) == f"{store} is not a mountpoint\n"
    assert systemd.show("layerstore", "NFileDescriptorStore") == "0"
    systemd("systemctl", "start", "layerstore")
    assert systemd("ls", str(layer)).split() == listed
    user.communicate("\n", timeout=20)
    assert "Traceback" not in systemd.log()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
