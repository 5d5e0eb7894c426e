"""Credentials for registries, from the files and programs that Podman uses.

containers-auth.json(5).  Sources in order: those given by the program, then the
``credential-helpers`` of registries.conf, of which ``containers-auth.json`` (and
nothing else unless configured) means the files: ``auth.json`` in its usual places,
or only the one named explicitly.  In each file a helper program for the host comes
first and is final for the files, then ``auths`` from the most to the least specific
key, then the file's ``credsStore``.  Helper programs follow the
docker-credential-helpers protocol.
"""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from layerstore import limits
from layerstore.errors import ConfigError
from layerstore.registry.registriesconf import AUTH_FILES_HELPER

_log = logging.getLogger(__name__)
_HUB: Final = "docker.io"
_HUB_NAMES: Final = frozenset(("docker.io", "index.docker.io", "registry-1.docker.io"))
_TOKEN_USER: Final = "<token>"  # noqa: S105 - the helper protocol's word, no secret
_NOT_FOUND: Final = "credentials not found"


@dataclass(frozen=True, slots=True)
class Credential:
    """A user with a password, or an OAuth2 refresh token (``identity_token``)."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an ``Authorization: Basic`` header."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode('ascii')}"


# Takes "host/namespace/repository"; called again when a registry refuses.
CredentialSource = Callable[[str], Credential | None]


class AuthFile(msgspec.Struct, frozen=True):
    """Where an auth file may be; ``legacy`` is the flat form of ``~/.dockercfg``."""

    path: Path
    legacy: bool = False
    required: bool = False


class _Entry(msgspec.Struct):
    auth: str | None = None
    identitytoken: str | None = None


class _File(msgspec.Struct, rename={"creds_store": "credsStore", "cred_helpers": "credHelpers"}):
    auths: dict[str, _Entry | None] | None = None
    creds_store: str | None = None
    cred_helpers: dict[str, str] | None = None


def user_id(env: Mapping[str, str]) -> int:
    """Whose files are meant: the user who made the namespace in which he looks like root."""
    text = env.get("_CONTAINERS_ROOTLESS_UID", "")  # set by Podman and Buildah ("unshare")
    return int(text) if text.isdecimal() else os.geteuid()


def auth_files(env: Mapping[str, str], home: Path | None, uid: int) -> tuple[AuthFile, ...]:
    """The places of auth files for this environment, in the order of looking."""
    if explicit := env.get("REGISTRY_AUTH_FILE"):
        return (AuthFile(Path(explicit), required=True),)
    files: list[AuthFile] = []
    runtime = env.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "containers" if runtime else Path(f"/run/containers/{uid}")
    files.append(AuthFile(base / "auth.json"))
    if config := env.get("XDG_CONFIG_HOME"):
        files.append(AuthFile(Path(config) / "containers/auth.json"))
    elif home is not None:
        files.append(AuthFile(home / ".config/containers/auth.json"))
    if docker := env.get("DOCKER_CONFIG"):
        files.append(AuthFile(Path(docker) / "config.json"))
    elif home is not None:
        files.append(AuthFile(home / ".docker/config.json"))
    if home is not None:
        files.append(AuthFile(home / ".dockercfg", legacy=True))
    return tuple(files)


class CredentialStore:
    """Looks credentials up and remembers the answers until asked to ``refresh``."""

    def __init__(
        self,
        files: tuple[AuthFile, ...] = (),
        sources: tuple[CredentialSource, ...] = (),
        env: Mapping[str, str] | None = None,
        helpers: tuple[str, ...] = (AUTH_FILES_HELPER,),
    ) -> None:
        """``helpers`` are the ``credential-helpers`` of registries.conf."""
        self._helpers = helpers
        self._files = files
        self._sources = sources
        self._env = None if env is None else dict(env)
        self._lock = threading.Lock()
        self._known: dict[str, Credential | None] = {}
        self._reads: dict[str, int] = {}  # begun so far
        self._reading: dict[str, threading.Lock] = {}

    def lookup(self, repository: str, *, refresh: bool = False) -> Credential | None:
        """The credential for ``host/namespace/name``, None for anonymous access.

        ``refresh`` reads files and asks programs again, once for all who wait for it.
        What was known stays where that fails.  Raises ``ConfigError`` when nothing was
        found or known and a file or program was broken.
        """
        with self._lock:
            if not refresh and repository in self._known:
                return self._known[repository]
            reads = self._reads.get(repository, 0)
            reading = self._reading.setdefault(repository, threading.Lock())
        with reading:
            with self._lock:
                # one that began later than this call is as good as one of our own
                if self._reads.get(repository, 0) > reads and repository in self._known:
                    return self._known[repository]
                self._reads[repository] = self._reads.get(repository, 0) + 1
            return self._read(repository)

    def _read(self, repository: str) -> Credential | None:
        try:
            found = self._find(repository)
        except ConfigError as error:
            with self._lock:
                if repository not in self._known:
                    raise
                found = self._known[repository]
            _log.warning("credentials of %s could not be read again: %s", repository, error)
        with self._lock:
            if len(self._known) >= limits.TOKENS:
                self._known.clear()
                self._reads.clear()
                self._reading.clear()
            self._known[repository] = found
        return found

    def _find(self, repository: str) -> Credential | None:
        for source in self._sources:
            if credential := source(repository):
                return credential
        failures: list[ConfigError] = []
        for helper in self._helpers:
            if helper == AUTH_FILES_HELPER:
                credential = self._from_files(repository, failures)
            else:
                credential = self._from_helper(helper, repository, failures)
            if credential is not None:
                return credential
        if failures:
            raise failures[0]
        return None

    def _from_files(self, repository: str, failures: list[ConfigError]) -> Credential | None:
        for file in self._files:
            try:
                credential, final = self._from_file(file, repository)
            except ConfigError as error:
                failures.append(error)
                continue
            if credential is not None or final:
                return credential
        return None

    def _from_helper(
        self, program: str, repository: str, failures: list[ConfigError]
    ) -> Credential | None:
        try:
            for name in _store_names(repository.partition("/")[0]):
                if credential := run_helper(program, name, self._env):
                    return credential
        except ConfigError as error:
            failures.append(error)
        return None

    def _from_file(self, file: AuthFile, repository: str) -> tuple[Credential | None, bool]:
        content = _load(file)
        if content is None:
            return None, False
        host = repository.partition("/")[0]
        for name in _host_names(host):
            if program := (content.cred_helpers or {}).get(name):
                return run_helper(program, name, self._env), True
        auths = content.auths or {}
        for key in keys(repository):
            if credential := _entry(auths.get(key), file.path):
                return credential, True
        wanted = _HUB if host in _HUB_NAMES else host
        for key, entry in auths.items():
            if _key_host(key, legacy=file.legacy) == wanted and (
                credential := _entry(entry, file.path)
            ):
                return credential, True
        if content.creds_store:
            for name in _store_names(host):
                if credential := run_helper(content.creds_store, name, self._env):
                    return credential, True
        return None, False


def keys(repository: str) -> Iterator[str]:
    """The keys of ``auths`` that apply to a repository, most specific first."""
    key = repository
    while True:
        yield key
        key, slash, _ = key.rpartition("/")
        if not slash:
            return


def run_helper(program: str, host: str, env: Mapping[str, str] | None = None) -> Credential | None:
    """Ask ``docker-credential-<program>`` for ``host``.

    None if the program has nothing; raises ``ConfigError`` if it cannot be run,
    takes longer than ``limits.HELPER_SECONDS`` or answers nonsense.
    """
    name = f"docker-credential-{program}"
    if "/" in program or not program:
        raise ConfigError("a credential helper is a plain word", subject=program)
    try:
        done = subprocess.run(
            [name, "get"],
            input=host.encode(),
            capture_output=True,
            timeout=limits.HELPER_SECONDS,
            check=False,
            env=None if env is None else dict(env),
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"no answer within {limits.HELPER_SECONDS:g} seconds", subject=name
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot be run: {error.strerror}", subject=name) from error
    if done.returncode != 0:
        text = (done.stdout + b" " + done.stderr).decode("utf-8", "replace").strip()
        if _NOT_FOUND in text:
            return None
        raise ConfigError(f"failed with status {done.returncode}: {text[:200]}", subject=name)
    try:
        answer = msgspec.json.decode(done.stdout, type=dict[str, str | None])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError("answered with something that is not its protocol", subject=name) from (
            error
        )
    username, secret = answer.get("Username") or "", answer.get("Secret") or ""
    if not username and not secret:
        return None
    if username == _TOKEN_USER:
        return Credential(identity_token=secret)
    return Credential(username, secret)


def _load(file: AuthFile) -> _File | None:
    try:
        with file.path.open("rb") as stream:
            raw = stream.read(limits.CONFIG_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        if file.required:
            _log.warning("auth file %s does not exist", file.path)
        return None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", subject=str(file.path)) from error
    if len(raw) > limits.CONFIG_FILE_BYTES:
        raise ConfigError("too large for an auth file", subject=str(file.path))
    if not raw.strip():
        return None
    try:
        if file.legacy:
            return _File(auths=msgspec.json.decode(raw, type=dict[str, _Entry | None]))
        return msgspec.json.decode(raw, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not an auth file: {error}", subject=str(file.path)) from error


def _entry(entry: _Entry | None, path: Path) -> Credential | None:
    if entry is None:
        return None
    username = password = ""
    if entry.auth:
        try:
            decoded = base64.b64decode(entry.auth, validate=True).decode("utf-8")
        except ValueError as error:
            raise ConfigError("an auth value is not base64", subject=str(path)) from error
        username, colon, password = decoded.partition(":")
        if not colon:
            raise ConfigError("an auth value holds no user:password", subject=str(path))
        password = password.strip("\0")
    if not username and not entry.identitytoken:
        return None  # `{}`, the placeholder of a credential store
    return Credential(username, password, entry.identitytoken or "")


def _key_host(key: str, *, legacy: bool) -> str:
    """The host an old kind of key stands for: an address, or anything in a legacy file."""
    host = key.removeprefix("http://").removeprefix("https://")
    if legacy or host != key:
        host = host.partition("/")[0]
    return _HUB if host in _HUB_NAMES else host


def _host_names(host: str) -> tuple[str, ...]:
    return (_HUB, "index.docker.io") if host in _HUB_NAMES else (host,)


def _store_names(host: str) -> tuple[str, ...]:
    # Docker stores the hub's credential under its historical address.
    return (_HUB, "https://index.docker.io/v1/") if host in _HUB_NAMES else (host,)
