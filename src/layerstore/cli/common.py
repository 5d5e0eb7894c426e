"""What the verbs share: flags, and the words and numbers of Podman's output.

The modules of a verb are loaded only when it is used, so nothing here imports the
storage or the registry before a flag object is asked to open them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from layerstore.errors import LayerstoreError, UsageError, exit_status

if TYPE_CHECKING:
    from layerstore.graphroot.storageconf import StorageConfig
    from layerstore.graphroot.store import Store
    from layerstore.registry import RegistrySettings


def switch(help: str, *names: str) -> Parameter:  # noqa: A002
    """A flag that is either there or not, under ``names`` (default: that of the argument)."""
    return Parameter(name=names or None, negative="", show_default=False, help=help)


def option(help: str, *names: str) -> Parameter:  # noqa: A002
    """A flag with a value; one that may be repeated adds up."""
    return Parameter(name=names or None, negative="", show_default=False, help=help)


Json = Annotated[bool, switch("Print JSON.")]
Quiet = Annotated[bool, switch("Print nothing but errors.", "--quiet", "-q")]
NoTrunc = Annotated[bool, switch("Do not truncate the output.")]
NoHeading = Annotated[bool, switch("Do not print column headings.", "--noheading", "-n")]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class StorageFlags:
    """Which storage: what storage.conf says, unless a flag says otherwise."""

    root: Annotated[Path | None, Parameter(help="Graph root [storage.conf].")] = None
    runroot: Annotated[Path | None, Parameter(help="Run root [storage.conf].")] = None
    storage_driver: Annotated[str | None, Parameter(help="Storage driver [storage.conf].")] = None
    storage_opt: Annotated[tuple[str, ...], option("Storage option; may be repeated.")] = ()

    store: Annotated[
        Path | None,
        Parameter(help="An image store of its own, published to Podman as additionalimagestores."),
    ] = None

    def config(self) -> StorageConfig:
        """Raises ``ConfigError``, ``UsageError``."""
        from layerstore.graphroot.published import store_config  # noqa: PLC0415
        from layerstore.graphroot.storageconf import StorageConfig  # noqa: PLC0415

        if self.store is not None:
            if self.root is not None or self.runroot is not None or self.storage_driver is not None:
                raise UsageError("--store names the storage: --root and the like are of another")
            return store_config(self.store.absolute(), self.storage_opt)
        return StorageConfig.from_system(
            root=None if self.root is None else self.root.absolute(),
            run_root=None if self.runroot is None else self.runroot.absolute(),
            driver=self.storage_driver,
            options=self.storage_opt,
        )

    def open(self, *, read_only: bool = False) -> Store:
        """Raises ``ConfigError``, ``StorageError``."""
        from layerstore.graphroot.published import Published  # noqa: PLC0415
        from layerstore.graphroot.store import Store  # noqa: PLC0415

        config = self.config()
        if self.store is not None and Published.of(self.store.absolute()) is None:
            raise UsageError(
                "no published image store",
                subject=str(self.store),
                advice="layerstore pull makes one",
            )
        return Store.open(config, read_only=read_only)


STORAGE = StorageFlags()
"""The default of a verb's ``storage``."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryFlags:
    """How to reach registries: what the machine's configuration says, unless a flag differs."""

    authfile: Annotated[
        Path | None, Parameter(help="Credentials, instead of the usual places.")
    ] = None
    creds: Annotated[
        str | None, Parameter(help="USERNAME[:PASSWORD] for the registry of the image.")
    ] = None
    tls_verify: Annotated[
        bool | None, Parameter(help="Demand valid TLS certificates, or allow plain HTTP.")
    ] = None
    cert_dir: Annotated[
        Path | None, Parameter(help="Certificates (*.crt, *.cert, *.key), instead of certs.d.")
    ] = None

    def settings(self, *, host: str | None = None) -> RegistrySettings:
        """Raises ``ConfigError``.  ``creds`` are shown to ``host`` only, if that is given."""
        from layerstore.registry import RegistrySettings  # noqa: PLC0415

        return RegistrySettings.from_system(
            auth_file=named_auth_file(self.authfile),
            cert_directory=self.cert_dir,
            tls_verify=self.tls_verify,
            credential_sources=() if self.creds is None else (_explicit(self.creds, host),),
        )


REGISTRY = RegistryFlags()
"""The default of a verb's ``registry``."""


def named_auth_file(path: Path | None) -> Path | None:
    """What ``--authfile`` names, which has to be there; raises ``UsageError``."""
    if path is not None and not path.exists():
        raise UsageError("the file with credentials does not exist", subject=str(path))
    return path


def _explicit(creds: str, host: str | None) -> Any:
    from layerstore.registry import Credential  # noqa: PLC0415

    username, _, password = creds.partition(":")

    def source(repository: str) -> Credential | None:
        if host is not None and repository.partition("/")[0] != host:
            return None
        return Credential(username, password)

    return source


# -- errors ------------------------------------------------------------------------


def finish(errors: Sequence[LayerstoreError]) -> None:
    """Ends the program if a verb with several arguments failed for some: one line for each."""
    if not errors:
        return
    for error in errors:
        print(f"layerstore: {error}", file=sys.stderr)
    sys.exit(max(map(exit_status, errors)))


def confirmed(warning: str) -> bool:
    """Ask on the terminal; raises ``UsageError`` if there is nobody to ask."""
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on", advice="use --force")
    print(warning)
    return input("Are you sure you want to continue? [y/N] ").strip().lower() in ("y", "yes")


# -- output ------------------------------------------------------------------------


def print_json(value: object) -> None:
    """Print ``value`` as Podman prints JSON: indented by four.  Paths and digests become text."""
    import msgspec  # noqa: PLC0415

    encoded = msgspec.json.encode(value, enc_hook=str)
    sys.stdout.buffer.write(msgspec.json.format(encoded, indent=4) + b"\n")
    sys.stdout.buffer.flush()


def printable(text: str) -> str:
    """``text`` in one line, with escapes (``\\n``, ``\\x1b``) for what would command a terminal."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, heading: bool = True
) -> None:
    """Print columns as Podman does: left-aligned, at least 12 wide, 2 apart."""
    lines = [tuple(headings), *map(tuple, rows)] if heading else [*map(tuple, rows)]
    columns = range(len(headings) - 1)
    widths = [max((len(line[column]) + 2 for line in lines), default=0) for column in columns]
    for line in lines:
        cells = [text.ljust(max(12, width)) for text, width in zip(line[:-1], widths, strict=True)]
        print("".join([*cells, line[-1]]))


_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def human_size(size: float, *, space: bool = True, digits: int = 3) -> str:
    """``4.52 MB``: powers of 1000 and ``digits`` significant digits, as Podman writes sizes."""
    step = min(int(math.log10(size) // 3), len(_UNITS) - 1) if size >= 1 else 0
    if size >= 1000 ** (step + 1) and step < len(_UNITS) - 1:
        step += 1
    return f"{size / 1000**step:.{digits}g}{' ' if space else ''}{_UNITS[step]}"


_MINUTE, _HOUR = 60, 3600
_LONGEST = (2**63 - 1) // 10**9  # seconds; Go's durations end after 292 years


def human_age(created: str, *, now: float | None = None) -> str:
    """``3 weeks ago``: the words that Podman has for the time since ``created``.

    What is no time (RFC 3339) was as long ago as Podman can tell.
    """
    from layerstore.graphroot.records import ZERO_TIME, parse_time  # noqa: PLC0415

    then = parse_time(created if parse_time(created) is not None else ZERO_TIME) or 0
    seconds = min(int((time.time() if now is None else now) - then / 10**9), _LONGEST)
    hours = int(seconds / _HOUR + 0.5)
    if seconds < 1:
        said = "Less than a second"
    elif seconds == 1:
        said = "1 second"
    elif seconds < _MINUTE:
        said = f"{seconds} seconds"
    elif seconds < 2 * _MINUTE:
        said = "About a minute"
    elif seconds < _HOUR:
        said = f"{seconds // _MINUTE} minutes"
    elif hours == 1:
        said = "About an hour"
    elif hours < 48:
        said = f"{hours} hours"
    elif hours < 24 * 7 * 2:
        said = f"{hours // 24} days"
    elif hours < 24 * 30 * 2:
        said = f"{hours // 24 // 7} weeks"
    elif hours < 24 * 365 * 2:
        said = f"{hours // 24 // 30} months"
    else:
        said = f"{seconds // _HOUR // 24 // 365} years"
    return f"{said} ago"


def short_id(identity: str) -> str:
    """The first twelve digits, without ``sha256:``."""
    return identity.removeprefix("sha256:")[:12]
