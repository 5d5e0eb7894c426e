"""TLS for one registry host: system roots plus certs.d.

containers-certs.d(5): the first directory that exists for the host is used;
``*.crt`` are additional authorities, ``X.cert`` with ``X.key`` a client's own
certificate.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from layerstore.errors import ConfigError

_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")


def cert_directories(
    env: Mapping[str, str], home: Path | None, etc: Path = Path("/etc")
) -> tuple[Path, ...]:
    """The certs.d directories in the order of looking."""
    user: list[Path] = []
    if config := env.get("XDG_CONFIG_HOME"):
        user.append(Path(config) / "containers/certs.d")
    elif home is not None:
        user.append(home / ".config/containers/certs.d")
    return (*user, etc / "containers/certs.d", etc / "docker/certs.d")


def make_context(
    host: str,
    directories: tuple[Path, ...],
    *,
    explicit: Path | None = None,
    insecure: bool = False,
) -> ssl.SSLContext:
    """A client context for ``host`` (with its port, if the reference has one).

    ``explicit`` is one directory to use for every host instead of the
    ``directories``.  ``insecure`` turns verification off.  Raises ``ConfigError`` for a
    certificate that cannot be loaded.
    """
    if insecure:
        # the certificates of all authorities, which take a tenth of a short pull, are not needed
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context()
    places = [directory / host for directory in directories] if explicit is None else [explicit]
    for place in places:
        if place.is_dir():
            _load(context, place)
            break
    return context


def _load(context: ssl.SSLContext, place: Path) -> None:
    try:
        files = sorted(place.iterdir())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", subject=str(place)) from error
    for file in files:
        try:
            if file.suffix == ".crt":
                context.load_verify_locations(cafile=file)
            elif file.suffix == ".cert":
                key = file.with_suffix(".key")
                if not key.exists():
                    raise ConfigError(f"key {key.name} is missing", subject=str(file))
                # Without a password function OpenSSL would ask on the terminal.
                context.load_cert_chain(file, key, password=lambda: "")
            elif file.suffix == ".key" and not file.with_suffix(".cert").exists():
                raise ConfigError("its .cert file is missing", subject=str(file))
        except OSError as error:  # ssl.SSLError included
            raise ConfigError(f"cannot be loaded: {error}", subject=str(file)) from error


def advice(error: BaseException) -> str | None:
    """What to do about a TLS failure that will not pass; None for any other failure."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None:
        chain += [seen, *(part for part in seen.args if isinstance(part, ssl.SSLError))]
        seen = seen.__cause__ or seen.__context__
    for part in chain:
        if isinstance(part, ssl.SSLCertVerificationError):
            return "put the registry's authority into certs.d, or set insecure = true"
        if isinstance(part, ssl.SSLError) and part.reason in _NO_TLS:
            return (
                "it seems to speak plain HTTP; set insecure = true in registries.conf to allow it"
            )
    return None
