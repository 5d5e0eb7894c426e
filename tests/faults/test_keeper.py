"""The server dies, is replaced, stops: whoever reads goes on reading.  Real processes, one by one.

The keeper's loop in all its states; `test_server_kills` does the same at random, under load.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import layerstore
from lab.fdstore import FdStore
from lab.sleepy import SleepyStore
from lab.smalldisk import SmallDisk
from lab.waiting import until
from layerstore.errors import NoServiceError
from layerstore.fuse import find_mount
from layerstore.service import keepersocket

MakeStore = Callable[..., SleepyStore]
STOPS = 24


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    if not Path("/dev/fuse").exists() or os.geteuid() != 0:
        pytest.skip("needs root and /dev/fuse")
    with contextlib.ExitStack() as stack:

        def make(**options: object) -> SleepyStore:
            return stack.enter_context(SleepyStore(tmp_path / "sleepy", **options))  # type: ignore[arg-type]

        yield make


def children(pid: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except FileNotFoundError:
        return []


def next_one_waits(store: SleepyStore) -> None:
    """Wait until a spare server is ready beside the one that serves."""

    def stages() -> object:
        with keepersocket.connect(store.service.root, 5) as link:
            return keepersocket.ask(link, "word")[0]["stages"]

    until(lambda: stages() == ["serving", "prepared"])


def reload(store: SleepyStore) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "layerstore.cli", "reload", "--root", str(store.service.root)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_read_outlives_its_server(make_store: MakeStore) -> None:
    store = make_store()
    store.look_up()
    keeper = store.service.keeper_pid
    for round_, name in enumerate(store.names[:3], 1):
        reader = store.reader(name)
        killed = store.service.pid
        assert reader.poll() is None
        os.kill(killed, signal.SIGKILL)
        # a verb that comes in the middle waits for the next server
        status = store.status()
        assert status["pid"] != killed
        assert (status["keeper_pid"], status["keeper"]["restarts"]) == (keeper, round_)
        assert status["keeper"]["last_cause"] == "SIGKILL"
        assert store.is_right(name, reader)
    assert store.slowness.hits >= 6  # the bytes were asked for anew each time
    assert store.service.log().count("event=server-died") == 3
    assert store.status()["read_errors"] == 0


def test_a_server_that_hangs_is_replaced(make_store: MakeStore) -> None:
    store = make_store()
    store.configure("silent_seconds = 1.5\n")
    assert reload(store).returncode == 0
    # the keeper, too, is a new one, and goes on asking
    until(lambda: "event=keeper-renewed" in store.service.log())
    store.look_up()
    reader = store.reader(store.names[0])
    hanging = store.service.pid
    time.sleep(3)
    assert store.service.pid == hanging  # slow reads are no reason
    os.kill(hanging, signal.SIGSTOP)
    assert store.is_right(store.names[0], reader)
    assert store.reads(store.names[1])
    keeper = store.status()["keeper"]
    assert keeper["restarts"] == 1
    assert keeper["last_cause"] == "SIGKILL: no sign of life for 1.5 s"
    assert f"event=server-killed pid={hanging} stage=serving" in store.service.log()


def test_a_server_that_hangs_before_it_serves_is_replaced(make_store: MakeStore) -> None:
    store = make_store()
    store.configure("silent_seconds = 2\n")
    assert reload(store).returncode == 0
    until(lambda: "event=keeper-renewed" in store.service.log())
    store.look_up()
    keeper = store.service.keeper_pid

    def spare() -> int:
        serving = store.service.pid
        next_one_waits(store)
        return next(pid for pid in children(keeper) if pid != serving)

    # on its way to the mounts
    hanging, serving = spare(), store.service.pid
    os.kill(hanging, signal.SIGSTOP)
    os.kill(serving, signal.SIGKILL)
    assert store.reads(store.names[0])
    log = store.service.log()
    assert f"event=server-killed pid={hanging} stage=" in log
    assert store.status()["keeper"]["last_cause"] == "SIGKILL: no sign of life for 2 s"
    # and while it waits
    hanging, serving = spare(), store.service.pid
    time.sleep(4)
    assert hanging in children(keeper)  # to wait is no hanging
    os.kill(hanging, signal.SIGSTOP)
    until(lambda: f"event=server-killed pid={hanging} stage=prepared" in store.service.log())
    until(lambda: "event=spare-failed error=no sign of life for 2 s" in store.service.log())
    assert store.service.pid == serving


def test_servers_that_die_at_once_are_started_ever_more_slowly(make_store: MakeStore) -> None:
    store = make_store()
    store.look_up()
    keeper = store.service.keeper_pid
    killed: set[int] = set()
    end = time.monotonic() + 4
    while time.monotonic() < end:
        for pid in children(keeper):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.01)
    assert 3 <= len(killed) <= 9  # 0, 0.1, 0.2, 0.4, 0.8, 1.6 s
    assert "event=restart-delayed seconds=0.4" in store.service.log()
    # it has not given up
    assert store.reads(store.names[0])
    assert store.service.keeper_pid == keeper


def test_new_code_and_configuration_under_a_reader(make_store: MakeStore) -> None:
    store = make_store()
    store.look_up()
    old, keeper = store.service.pid, store.service.keeper_pid
    first = store.reader(store.names[0])
    store.configure('log_level = "debug"\nnonsense = 1\n')
    refused = reload(store)
    assert refused.returncode == 1
    assert "nonsense" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert store.service.pid == old
    store.configure('log_level = "debug"\n')
    done = reload(store)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"a new server serves, pid {store.service.pid}\n"
    assert store.is_right(store.names[0], first)
    assert not Path(f"/proc/{old}").exists()
    # the keeper is new, too, in the same process, and goes on to hold the mount
    until(lambda: "event=keeper-renewed" in store.service.log())
    second = store.reader(store.names[1])
    before = store.service.pid
    os.kill(keeper, signal.SIGHUP)
    until(lambda: store.service.pid != before)
    assert store.is_right(store.names[1], second)
    assert store.service.keeper_pid == keeper
    assert store.status()["keeper"]["restarts"] == 0
    until(lambda: store.service.log().count("event=keeper-renewed") == 2)
    assert store.service.stop() == 0
    assert find_mount(store.service.mountpoint) is None


def test_a_changed_file_means_nothing_before_the_reload(make_store: MakeStore) -> None:
    store = make_store()
    store.look_up()
    good = store.registries_conf.read_text()
    store.registries_conf.write_text("no TOML")
    store.configure('log_level = "debug"\nnonsense = 1\n')
    for name in store.names[:3]:
        next_one_waits(store)
        os.kill(store.service.pid, signal.SIGKILL)
        assert store.reads(name)
    assert "restart-delayed" not in store.service.log()
    assert "spare-failed" not in store.service.log()
    assert reload(store).returncode == 1
    store.configure('log_level = "debug"\n')
    refused = reload(store)
    assert refused.returncode == 1
    assert "registries.conf" in refused.stderr
    assert " DEBUG " not in store.service.log()
    # what a reload found good is in force, also for the keeper that comes with it
    store.registries_conf.write_text(good)
    assert reload(store).returncode == 0
    until(lambda: "event=keeper-renewed" in store.service.log())
    store.configure("nonsense = 1\n")
    for name in store.names[3:6]:
        next_one_waits(store)
        os.kill(store.service.pid, signal.SIGKILL)
        assert store.reads(name)
    assert "spare-failed" not in store.service.log()
    assert " DEBUG " in store.service.log()


def test_why_no_server_serves_is_told(make_store: MakeStore) -> None:
    store = make_store()
    store.look_up()
    database = store.service.root / "state.sqlite"
    next_one_waits(store)
    server = store.service.pid
    for pid in children(store.service.keeper_pid):
        if pid != server:
            os.kill(pid, signal.SIGKILL)
    until(lambda: "event=spare-failed" in store.service.log())
    os.kill(server, signal.SIGSTOP)
    kept = database.with_name("kept")
    database.rename(kept)
    database.mkdir()
    os.kill(server, signal.SIGKILL)
    until(lambda: "event=restart-delayed" in store.service.log())
    began = time.monotonic()
    with pytest.raises(NoServiceError, match=r"none of its servers serves \(.*state.*\)"):
        store.status()
    assert time.monotonic() - began < 20
    database.rmdir()
    kept.rename(database)
    assert store.reads(store.names[0])


def test_a_release_that_does_not_know_the_state_never_replaces_a_server(
    make_store: MakeStore, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    shutil.copytree(Path(layerstore.__file__).parent, code / "layerstore")
    store = make_store(variables={"PYTHONPATH": str(code)})
    store.look_up()
    serving = store.service.pid
    next_one_waits(store)
    schema = code / "layerstore/provider/schema.py"
    text = schema.read_text()
    assert text.count("VERSION: Final = 3") == 1
    schema.write_text(text.replace("VERSION: Final = 3", "VERSION: Final = 4"))
    for _ in range(2):
        refused = reload(store)
        assert refused.returncode == 1
        assert "state database has version 3, this program knows 4" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert store.service.pid == serving
    # the one that waits is of the old release, and nothing else comes after it
    os.kill(serving, signal.SIGKILL)
    assert store.reads(store.names[0])
    until(lambda: "event=spare-failed" in store.service.log())
    assert reload(store).returncode == 1
    assert store.reads(store.names[1])
    schema.write_text(text)
    assert reload(store).returncode == 0
    assert store.reads(store.names[2])


def test_no_server_makes_way_on_a_disk_that_became_read_only(
    make_store: MakeStore, tmp_path: Path
) -> None:
    if not Path("/dev/loop-control").exists():
        pytest.skip("needs loop devices")
    with SmallDisk(tmp_path / "sleepy/state", "ext4", 64 << 20) as disk:
        store = make_store()
        store.look_up()
        assert store.reads(store.names[0])
        serving = store.service.pid
        disk.fail()
        refused = reload(store)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "Read-only file system" in refused.stderr
        assert store.service.pid == serving
        assert store.reads(store.names[1])
        assert store.service.stop() == 0
        # a start says so, too
        store.service.launch()
        until(lambda: "see to the disk" in store.service.log())
        assert "Traceback" not in store.service.log()


def test_a_stop_leaves_a_plain_directory_and_serves_who_reads(make_store: MakeStore) -> None:
    store = make_store()
    store.look_up()
    inside = os.open(store.layer, os.O_PATH)
    there = f"/proc/{os.getpid()}/fd/{inside}"
    reader = store.reader(store.names[0])
    keeper = store.service.leave()
    keeper.send_signal(signal.SIGTERM)
    until(lambda: find_mount(store.service.mountpoint) is None)
    assert list(store.service.mountpoint.iterdir()) == []
    # its server may even die
    os.kill(store.service.pid, signal.SIGKILL)
    assert store.is_right(store.names[0], reader)
    assert store.status()["keeper"]["draining"] is True
    # the next service on the root directory serves both, from one server
    reader = store.reader(store.names[2], there)
    store.service.start()
    assert keeper.wait(10) == 0
    assert store.is_right(store.names[2], reader)
    assert store.reads(store.names[3])
    assert "event=handed-over" in store.service.log()
    # the old mount ends with its last user, the new one stays
    os.close(inside)
    os.kill(store.service.pid, signal.SIGKILL)
    until(lambda: "mounts=1" in store.service.log().splitlines()[-1])
    assert store.reads(store.names[4])


def test_a_stop_at_any_moment_of_the_start_leaves_a_plain_directory(make_store: MakeStore) -> None:
    service = make_store().service
    assert service.stop() == 0
    began = time.monotonic()
    service.start()
    whole = time.monotonic() - began
    service.stop()
    for moment in range(STOPS):
        service.launch()
        time.sleep(whole * 1.2 * moment / STOPS)
        # before it hears signals, nothing is mounted
        assert service.stop() in {0, -signal.SIGTERM}
        assert find_mount(service.mountpoint) is None
    assert "Traceback" not in service.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_systemd_keeps_the_mount_while_no_process_of_ours_lives(
    make_store: MakeStore, tmp_path: Path, number: signal.Signals
) -> None:
    with FdStore(tmp_path) as systemd:
        store = make_store(fd_store=systemd)
        assert systemd.wait_for("READY")["MAINPID"] == str(store.service.keeper_pid)
        store.look_up()
        servers = children(store.service.keeper_pid)
        reader = store.reader(store.names[0])
        assert store.service.stop(number) == (0 if number == signal.SIGTERM else -number)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in servers))
        assert find_mount(store.service.mountpoint) is not None
        assert reader.poll() is None
        store.service.start()
        assert store.is_right(store.names[0], reader)
        assert "event=mount-kept" in store.service.log()
        assert store.reads(store.names[1])
        # an unmount ends it, and systemd need not keep anything then
        subprocess.run(["umount", store.service.mountpoint], check=True)
        until(lambda: systemd.names() == [])


def test_without_resend_open_requests_fail_and_later_ones_work(make_store: MakeStore) -> None:
    store = make_store(variables={"LAYERSTORE_NO_RESEND": "1"})
    store.look_up()
    cached = store.reader(store.names[0])
    os.kill(store.service.pid, signal.SIGKILL)
    # reading ahead may fail: the kernel asks once more for what is needed
    assert store.is_right(store.names[0], cached)
    direct = store.reader(store.names[1], direct=True)
    os.kill(store.service.pid, signal.SIGKILL)
    assert "Input/output error" in store.error_of(direct)
    assert store.reads(store.names[1])
    assert "event=no-resend" in store.service.log()
    assert "event=requests-failed count=1 " in store.service.log()
    # a planned change of servers is the same to such a kernel
    direct = store.reader(store.names[2], direct=True)
    assert reload(store).returncode == 0
    assert "Input/output error" in store.error_of(direct)
    assert store.reads(store.names[2])


def test_a_dead_keeper_takes_its_server_along(make_store: MakeStore) -> None:
    store = make_store()
    store.look_up()
    servers = children(store.service.keeper_pid)
    reader = store.reader(store.names[0])
    assert store.service.stop(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in servers))
    assert store.error_of(reader) != ""
    store.service.start()
    assert store.reads(store.names[0])


def test_a_fetch_goes_on_with_the_next_server(make_store: MakeStore) -> None:
    store = make_store()
    store.look_up()
    fetch = store.fetch()
    os.kill(store.service.pid, signal.SIGKILL)
    _, said = fetch.communicate(timeout=60)
    assert (fetch.returncode, said) == (0, "")
    assert all(layer["complete"] for layer in store.status()["layers"])


def test_in_a_user_namespace_of_ones_own(tmp_path: Path) -> None:
    """As inside `podman unshare`: the mount is seen in the namespace only, so all happens there."""
    script = f"""
set -e
{sys.executable} -m layerstore.cli serve {tmp_path}/store --root {tmp_path} 2>{tmp_path}/log &
keeper=$!
until grep -qs event=serving {tmp_path}/log; do sleep 0.1; done
kill -9 $(cut -d' ' -f1 /proc/$keeper/task/$keeper/children)
stat --file-system {tmp_path}/store >/dev/null  # waits for the next server
exec 9<{tmp_path}/store
{sys.executable} -m layerstore.cli reload --root {tmp_path} --quiet
kill $keeper
until grep -qs event=draining {tmp_path}/log; do sleep 0.1; done
mountpoint -q {tmp_path}/store && exit 1
stat --file-system /proc/self/fd/9/ >/dev/null
exec 9<&-
wait $keeper
"""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    log = (tmp_path / "log").read_text()
    assert (done.returncode, done.stderr) == (0, ""), log
    assert log.count("event=server-died") == 1
    assert log.rstrip().endswith(f"event=stopped mountpoint={tmp_path}/store")
