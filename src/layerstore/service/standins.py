"""What a stopped store leaves in its plain directory: a file where a layer's root directory was.

Podman 5 adds up the files of layers that are known by their TOC only whenever it lists images
(als-protocol, section 4; Podman 5.4.2): with nothing there, ``podman images`` fails for the whole
storage.  A regular file has a size, and cannot be mounted as a layer; without ``info`` and ``blob``
beside it no client takes it for a layer that the store has.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from layerstore import fuse
from layerstore.service.places import STAND_INS

_log = logging.getLogger(__name__)

_TEXT: Final = b"The layer store is stopped: this stands for a layer that it serves.\n"
_NAME: Final = "diff"


def leave(mountpoint: Path, root: Path, directories: Iterable[str]) -> int:
    """Make stand-ins in these directories below ``mountpoint``, instead of those of the last time;
    how many there are.

    They stay below the next mount, and are there whatever ends it.  Nothing is done where
    something is mounted.  What fails is logged.
    """
    wanted = sorted(directories)
    if fuse.find_mount(mountpoint) is not None:
        return 0
    clear(root)
    if not wanted:
        return 0
    try:
        (root / STAND_INS).write_text(json.dumps([str(mountpoint), wanted]))
        for directory in wanted:
            place = mountpoint / directory
            place.mkdir(parents=True, exist_ok=True)
            (place / _NAME).write_bytes(_TEXT)
    except OSError as error:
        _log.warning("event=stand-ins-failed error=%s", error)
        return 0
    return len(wanted)


def clear(root: Path) -> None:
    """Remove what `leave` made, and nothing else."""
    try:
        mountpoint, directories = json.loads((root / STAND_INS).read_text())
        for directory in directories:
            _remove(Path(mountpoint), directory)
        (root / STAND_INS).unlink()
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        _log.warning("event=stand-ins-failed error=%s", error)


def _remove(mountpoint: Path, directory: str) -> None:
    place = mountpoint / directory
    with contextlib.suppress(FileNotFoundError):
        if (place / _NAME).read_bytes() != _TEXT:
            return
        (place / _NAME).unlink()
    while place != mountpoint:
        try:
            os.rmdir(place)
        except FileNotFoundError:
            pass
        except OSError:
            return  # something else is in it
        place = place.parent
