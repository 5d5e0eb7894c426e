"""A user who is not root: our verbs and Podman's on that user's own storage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerstore
from lab import images
from lab.fresh import fresh
from lab.podman import run, unmount_below

USER = "layerstore-test"
_IDS = "700000-765535"


class Someone:
    """A fresh user with a range of subordinate ids, and a home of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        runtime = home / "run"
        runtime.mkdir(mode=0o700)
        shutil.chown(runtime, USER, USER)
        places = [Path(layerstore.__file__).parents[1], sysconfig.get_path("purelib")]
        self._environment = {
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(runtime),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": ":".join(map(str, places)),
        }
        # the interpreter of the tests may lie where only root can go
        seen = self(sys.executable, "-c", "", check=False).returncode == 0
        self._python = sys.executable if seen else "/usr/bin/python3"

    def __call__(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        person = ["setpriv", "--reuid", USER, "--regid", USER, "--init-groups"]
        inside = ["env", "-C", str(self.home), *command]
        return run([*person, *inside], self._environment, check, 60)

    def layerstore(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self(self._python, "-m", "layerstore.cli", *arguments, check=check)


@pytest.fixture
def someone() -> Iterator[Someone]:
    # a short name: Podman's clean-up fails on a run root of more than 50 characters
    place = fresh("lsu-")
    place.chmod(0o755)
    home = place / "h"
    subprocess.run(["useradd", "--create-home", "--home-dir", home, USER], check=True)
    try:
        ranges = ("--add-subuids", _IDS, "--add-subgids", _IDS)
        subprocess.run(["usermod", *ranges, USER], check=True)
        person = Someone(home)
        yield person
        pause = home / "run/libpod/tmp/pause.pid"
        if pause.exists():
            os.kill(int(pause.read_text()), 9)
        unmount_below(home)
    finally:
        subprocess.run(["userdel", USER], check=True)
        shutil.rmtree(place, ignore_errors=True)


def test_the_storage_of_a_user_is_one_for_both(someone: Someone) -> None:
    archive = someone.home / "small.oci"
    shutil.copytree(images.small_image().layout, archive)
    policy = someone.home / "policy.json"
    policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    judged = ("--signature-policy", str(policy))
    pulled = someone.layerstore("pull", "-q", *judged, f"oci:{archive}:latest").stdout.strip()
    someone.layerstore("tag", pulled, "ours:1")
    options = ("--rm", "--runtime=runc", "--network=host", "--security-opt=seccomp=unconfined")
    # what Podman runs, it finds with the owners that the image says
    shown = someone("podman", "run", *options, "ours:1", "stat", "-c", "%u:%g", "/data/links/first")
    assert shown.stdout == "1000:50\n"

    someone("podman", "tag", "ours:1", "theirs:1")
    (found,) = json.loads(someone.layerstore("images", "--json").stdout)
    assert set(found["Names"]) >= {"localhost/ours:1", "localhost/theirs:1"}
    refused = someone.layerstore("mount", "ours:1", check=False)
    assert refused.returncode == 2
    assert "podman unshare layerstore mount" in refused.stderr
    assert "0 to repair" in someone.layerstore("check", "storage", "--full").stdout
    someone.layerstore("rmi", "-f", pulled)
    assert someone("podman", "images", "-q").stdout == ""
