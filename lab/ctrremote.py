"""Conversion to lazy formats with Debian's own tools: `ctr-remote` of stargz-snapshotter.

It works inside containerd, so a private containerd runs for the time of one conversion: all its
files lie below a temporary directory, no snapshotter and no runtime is used, and it is ended by
its process id.  What comes out is read back into an OCI layout, byte for byte.
"""

import contextlib
import json
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from lab import debian, oci
from lab.oci import StoredImage

Form = Literal["estargz", "zstdchunked"]
"""eStargz, or the first form of zstd:chunked that stargz-snapshotter writes."""

_SOURCE: Final = "lab.local/source"
_CONVERTED: Final = "lab.local/converted:latest"
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 15.0
_CONVERT_SECONDS: Final = 900.0
# Only the stores for content, metadata and leases are needed.
_DISABLED: Final = (
    *("io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"),
    *("io.containerd.internal.v1.restart", "io.containerd.internal.v1.tracing"),
    *("io.containerd.monitor.v1.cgroups", "io.containerd.runtime.v1.linux"),
    *("io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs"),
    *("io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"),
    "io.containerd.tracing.processor.v1.otlp",
)


class ConversionError(RuntimeError):
    """A tool failed; the message carries its output."""


def converted(image: StoredImage, form: Form = "estargz", *options: str) -> StoredImage:
    """`image` in a lazy form, in a layout beside the image's own and kept there.

    `options` go to `ctr-remote image convert`, for example `--estargz-chunk-size=65536`.
    Raises ConversionError.
    """
    suffix = "".join(option.replace("--", "-").replace("=", "-") for option in options)
    layout = image.layout.with_name(f"{image.layout.name}-{form}{suffix}")
    with debian.lock(image.layout.parent / "convert.lock"):
        if not layout.exists():
            scratch_root = tempfile.TemporaryDirectory(
                dir=image.layout.parent, prefix=".convert-", ignore_cleanup_errors=True
            )
            with scratch_root as scratch:
                fresh = Path(scratch) / "layout"
                _convert(image, form, options, Path(scratch), fresh)
                fresh.rename(layout)
    return oci.read_image(layout, "latest")


def _convert(
    image: StoredImage, form: Form, options: tuple[str, ...], scratch: Path, layout: Path
) -> None:
    source, exported = scratch / "source.tar", scratch / "converted.tar"
    with tarfile.open(source, "w") as archive:
        archive.add(image.layout, arcname=".")
    flags = (f"--{form}", "--oci", *options)
    with containerd(scratch) as daemon:
        daemon.run("ctr", "image", "import", "--no-unpack", "--base-name", _SOURCE, str(source))
        source.unlink()
        reference = f"{_SOURCE}:{image.tag}"
        daemon.run("ctr-remote", "image", "convert", *flags, reference, _CONVERTED)
        daemon.run("ctr", "image", "export", str(exported), _CONVERTED)
    with tarfile.open(exported) as archive:
        archive.extractall(layout, filter="data")
    exported.unlink()
    (layout / "manifest.json").unlink(missing_ok=True)
    _name(layout)


def _name(layout: Path) -> None:
    """Give the one image of an exported layout the tag `latest`."""
    path = layout / "index.json"
    index = json.loads(path.read_bytes())
    (only,) = index["manifests"]
    only["annotations"] = {oci.REF_NAME: "latest"}
    path.write_text(json.dumps(index))


@dataclass(frozen=True, slots=True)
class Containerd:
    """A running containerd."""

    socket: Path
    pid: int = 0

    def run(self, tool: str, *arguments: str) -> None:
        """Run a client against the daemon."""
        command = [tool, "--address", str(self.socket), "--namespace", "lab", *arguments]
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CONVERT_SECONDS,
            check=False,
        )
        if result.returncode:
            shown = " ".join(command)
            raise ConversionError(f"{shown}\n{result.stderr[-3000:]}{result.stdout[-1000:]}")


@contextlib.contextmanager
def containerd(scratch: Path) -> Iterator[Containerd]:
    """A private containerd with its contents below ``scratch``, for the time of a block."""
    # A socket's path must be short, and the image cache may lie deep.
    with tempfile.TemporaryDirectory(prefix="lab-ctr-") as short:
        socket = Path(short) / "c.sock"
        config = scratch / "containerd.toml"
        config.write_text(
            f"""\
version = 2
root = "{scratch / "content"}"
state = "{short}/state"
disabled_plugins = {json.dumps(list(_DISABLED))}
[grpc]
address = "{socket}"
[ttrpc]
address = "{short}/t.sock"
"""
        )
        log = scratch / "containerd.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["containerd", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        daemon = Containerd(socket, process.pid)
        try:
            _await(daemon, process, log)
            yield daemon
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(daemon: Containerd, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            daemon.run("ctr", "--connect-timeout", "1s", "image", "list")
        except ConversionError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-3000:]
                raise ConversionError(f"containerd does not answer: {said}") from error
            time.sleep(0.1)
        else:
            return
