"""Debian's docker-registry (distribution 2.8) as a private process on a loopback port."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import re
import secrets
import socket
import ssl
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lab.recording import Request

_PROGRAM: Final = "/usr/bin/docker-registry"
_START_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 10.0
_MARK_SECONDS: Final = 2.0
# The combined log format of gorilla/handlers, which distribution writes to standard output.
_LOG_LINE: Final = re.compile(
    r'^\S+ \S+ \S+ \[[^]]*\] "(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[0-9.]+" '
    r"(?P<status>\d+) (?P<bytes>\d+)"
)


class RegistryStartError(RuntimeError):
    """docker-registry did not come up; the message carries its log."""


class DebianRegistry:
    """A registry with its blobs below ``directory``, deletion enabled, started on entry.

    A context manager.  The port stays the same over ``stop`` and ``start``, so that tests can take
    the registry away and bring it back.  ``auth`` is (user, password) for basic authentication;
    ``tls`` is (certificate file, key file).
    """

    def __init__(
        self,
        directory: Path,
        *,
        auth: tuple[str, str] | None = None,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        self.directory: Final = directory.absolute()
        self.port: Final = _free_port()
        self._auth = auth
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self._seen_lines = 0

    @property
    def host(self) -> str:
        """ "127.0.0.1:PORT", as it stands in an image reference."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.host}"

    @property
    def storage(self) -> Path:
        """Where distribution keeps ``docker/registry/v2/{blobs,repositories}``."""
        return self.directory / "storage"

    @property
    def access_log(self) -> Path:
        return self.directory / "access.log"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it and wait until it answers.  Raises RegistryStartError."""
        if self._process is not None:
            return
        self.storage.mkdir(parents=True, exist_ok=True)
        config = self.directory / "config.yml"
        config.write_text(json.dumps(self._config(), indent=1))  # JSON is YAML
        log = self.directory / "registry.log"
        with self.access_log.open("ab") as out, log.open("ab") as err:
            self._process = subprocess.Popen(
                [_PROGRAM, "serve", str(config)],
                # it would take REGISTRY_AUTH_FILE, which is Podman's, for a setting of its own
                env={k: v for k, v in os.environ.items() if not k.startswith("REGISTRY_")},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        end = time.monotonic() + _START_SECONDS
        while self._get("/v2/") is None:
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RegistryStartError(
                    f"docker-registry did not start: {log.read_text()[-2000:]}"
                )
            time.sleep(0.02)
        self.clear()

    def stop(self) -> None:
        """End the process and wait for it; what it stores stays."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def requests(self) -> list[Request]:
        """What the access log holds since the start or the last ``clear``; Range is not in it."""
        self._settle()
        found = []
        for line in self._lines()[self._seen_lines :]:
            match = _LOG_LINE.match(line)
            if match and not match["path"].startswith("/v2/?mark="):
                found.append(
                    Request(
                        match["method"], match["path"], int(match["status"]), int(match["bytes"])
                    )
                )
        return found

    def clear(self) -> None:
        """Forget the requests so far."""
        self._settle()
        self._seen_lines = len(self._lines())

    def blob_path(self, digest: str) -> Path:
        """The file that holds the blob ``sha256:<hex>``: tests corrupt or remove it."""
        algorithm, _, hex_ = digest.partition(":")
        blobs = self.storage / "docker/registry/v2/blobs"
        return blobs / algorithm / hex_[:2] / hex_ / "data"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _lines(self) -> list[str]:
        return self.access_log.read_text(errors="replace").splitlines()

    def _settle(self) -> None:
        """Wait until the log holds a request of ours: lines are written after the response."""
        if self._process is None:
            return
        mark = f"/v2/?mark={secrets.token_hex(8)}"
        if self._get(mark) is None:
            return
        end = time.monotonic() + _MARK_SECONDS
        while time.monotonic() < end:
            if mark in self.access_log.read_text(errors="replace"):
                return
            time.sleep(0.01)

    def _get(self, path: str) -> int | None:
        """The status of a GET, or None where nothing answers."""
        connection: http.client.HTTPConnection
        if self._tls:
            trusting = ssl.create_default_context()
            trusting.check_hostname = False
            trusting.verify_mode = ssl.CERT_NONE
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=5, context=trusting
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _config(self) -> dict[str, object]:
        http_: dict[str, object] = {
            "addr": self.host,
            "secret": "loopback-only",
            "relativeurls": True,
        }
        if self._tls:
            http_["tls"] = {"certificate": str(self._tls[0]), "key": str(self._tls[1])}
        config: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": False}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.storage)},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": http_,
        }
        if self._auth:
            passwords = self.directory / "htpasswd"
            passwords.write_text(f"{self._auth[0]}:{_bcrypt(self._auth[1])}\n")
            config["auth"] = {"htpasswd": {"realm": "lab", "path": str(passwords)}}
        return config


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _bcrypt(password: str) -> str:
    """The only kind of hash that distribution's htpasswd takes, made by the C library's crypt."""
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    library.crypt.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    salt = b"$2b$04$" + b"layerstorelabsalt00000"
    hashed: bytes | None = library.crypt(password.encode(), salt)
    if hashed is None or not hashed.startswith(b"$2b$"):
        raise RegistryStartError("this machine's libcrypt makes no bcrypt hash")
    return hashed.decode()
