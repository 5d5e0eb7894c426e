"""The lab itself: both Podmans work on this machine, alone and without traces."""

import base64
import io
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import oci, tars
from lab.podman import CommandError, PodmanEnv, run
from lab.recording import RecordingProxy
from lab.registry import DebianRegistry
from lab.trixie import TrixieTools


def _libraries(program: Path) -> set[Path]:
    """The loader and libraries of a program of the machine, as ldd names them."""
    listed = run(["ldd", str(program)]).stdout
    return {Path(word) for word in listed.split() if word.startswith("/")}


def _status(what: str | urllib.request.Request) -> int:
    with urllib.request.urlopen(what) as answer:
        answer.read()
        status: int = answer.status
        return status


@pytest.fixture(scope="session")
def tiny_image(workspace: Path) -> Path:
    """An OCI layout holding ``tiny``: a shell with cat and sleep, and a second layer."""
    programs = {Path(f"/usr/bin/{name}") for name in ("dash", "cat", "sleep")}
    files = programs.union(*map(_libraries, programs))
    parents = {parent for file in files for parent in file.parents[:-1]} | {Path("/etc")}
    members = [tars.directory(str(parent)[1:].encode()) for parent in sorted(parents)]
    members += [
        tars.regular(str(file)[1:].encode(), file.read_bytes(), 0o755) for file in sorted(files)
    ]
    members.append(tars.symlink(b"usr/bin/sh", b"dash"))
    layers = []
    for content in (members, [tars.regular(b"etc/motto", b"hello from the registry\n")]):
        out = io.BytesIO()
        tars.write_tar(out, content)
        layers.append(oci.LayerSource(out.getvalue()))
    layout = workspace / "tiny"
    oci.write_image(layout, "tiny", layers, oci.RunConfig(cmd=("sh",)))
    return layout


def test_podman_pulls_runs_commits_saves_and_leaves_nothing(
    podman_env: PodmanEnv, recorded: RecordingProxy, tiny_image: Path, tmp_path: Path
) -> None:
    env = podman_env
    image = f"{recorded.host}/lab/tiny:{env.flavour}"
    env.skopeo("copy", f"oci:{tiny_image}:tiny", f"docker://{image}")
    recorded.clear()
    env.podman("pull", image)
    assert sum(request.bytes for request in recorded.requests()) > 500_000
    assert env.podman("run", "--rm", image, "cat", "/etc/motto").stdout == (
        "hello from the registry\n"
    )
    container = env.podman("run", "-d", image, "sleep", "600").stdout.strip()
    env.podman("exec", container, "sh", "-c", "echo changed > /etc/motto")
    env.podman("commit", container, "changed:1")
    assert env.podman("run", "--rm", "changed:1", "cat", "/etc/motto").stdout == "changed\n"
    env.podman("save", "-o", tmp_path / "saved.tar", "changed:1")
    assert (tmp_path / "saved.tar").stat().st_size > 500_000
    working = env.buildah("from", image).stdout.strip()
    env.buildah("run", working, "--", "sh", "-c", "echo built > /etc/motto")
    env.buildah("commit", working, "built:1")
    assert env.podman("run", "--rm", "built:1", "cat", "/etc/motto").stdout == "built\n"
    assert len(env.containers_storage("layers").stdout.split()) >= 4
    with pytest.raises(CommandError, match="ended with"):
        env.podman("run", "--rm", image, "/no/such/program")
    env.cleanup()
    assert not env.directory.exists()
    assert str(env.directory) not in Path("/proc/self/mountinfo").read_text()


def test_two_environments_do_not_see_each_other(
    make_podman_env: Callable[..., PodmanEnv], registry: DebianRegistry, tiny_image: Path
) -> None:
    first, second = make_podman_env("debian12"), make_podman_env("debian12")
    image = f"{registry.host}/lab/alone:1"
    first.skopeo("copy", f"oci:{tiny_image}:tiny", f"docker://{image}")
    first.podman("pull", image)
    assert first.podman("images", "-q").stdout
    assert second.podman("images", "-q").stdout == ""


def test_debian_13_tools_are_those_of_dialect_t(trixie: TrixieTools) -> None:
    assert (trixie.root / "usr/share/doc/podman").is_dir()
    assert run([str(trixie.podman), "--version"]).stdout == "podman version 5.4.2\n"
    assert "version 1.18." in run([str(trixie.skopeo), "--version"]).stdout


def test_the_registry_logs_requests_and_survives_a_restart(workspace: Path) -> None:
    with DebianRegistry(workspace / "own") as registry:
        _status(f"{registry.url}/v2/_catalog?n=3")
        assert [(r.method, r.path, r.status) for r in registry.requests()] == [
            ("GET", "/v2/_catalog?n=3", 200)
        ]
        registry.stop()
        with pytest.raises(urllib.error.URLError):
            _status(f"{registry.url}/v2/")
        registry.start()
        assert _status(f"{registry.url}/v2/") == 200
        assert len(registry.requests()) == 1


def test_the_registry_wants_the_password_it_was_given(workspace: Path) -> None:
    with DebianRegistry(workspace / "locked", auth=("user", "secret")) as registry:
        with pytest.raises(urllib.error.HTTPError) as refused:
            _status(f"{registry.url}/v2/")
        assert refused.value.code == 401
        refused.value.close()
        token = base64.b64encode(b"user:secret").decode()
        asked = urllib.request.Request(
            f"{registry.url}/v2/", headers={"Authorization": f"Basic {token}"}
        )
        assert _status(asked) == 200
