"""Verbs of a user who is not root: storage belongs to the user's namespace, as Podman makes it.

Owners of files in a rootless graph root are ids of the user's range in /etc/subuid.  Only inside the
user namespace that maps them can layers be made and read, and mounts be shared with Podman's, so
the program starts itself anew through ``podman unshare``, which joins the namespace of the
user's Podman or makes it.  Mount points would end with that program: mounting is for a shell that
is in there already, as it is with Podman.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Final

from layerstore.errors import UsageError

_STORAGE: Final = frozenset(
    ("pull", "push", "save", "load", "images", "inspect", "history", "tag", "untag", "rmi")
) | {"diff", "prune", "check", "materialize"}
_MOUNTING: Final = frozenset(("mount", "umount"))


def enter_namespace(arguments: Sequence[str]) -> None:
    """Start anew inside the user namespace if the verb needs it; raises ``UsageError``."""
    if os.geteuid() == 0 or not arguments or not {"--help", "-h"}.isdisjoint(arguments):
        return
    verb = next((one for one in arguments if not one.startswith("-")), "")
    if verb in _MOUNTING:
        raise UsageError(
            f"{verb} of a user who is not root works inside the user's namespace only",
            advice=f"podman unshare layerstore {verb}, or a shell from podman unshare",
        )
    if verb not in _STORAGE and not (verb == "copy" and _names_storage(arguments)):
        return
    podman = shutil.which("podman")
    if podman is None:
        raise UsageError(
            "storage of a user who is not root needs a user namespace, and there is no podman"
            " to make it",
            advice="install podman, or run it where root is mapped to the user",
        )
    program = [podman, "--log-level=error", "unshare", sys.executable, "-m", "layerstore.cli"]
    os.execv(podman, [*program, *arguments])  # noqa: S606 - no shell is wanted


def _names_storage(arguments: Sequence[str]) -> bool:
    return any(one.startswith("containers-storage:") for one in arguments)
