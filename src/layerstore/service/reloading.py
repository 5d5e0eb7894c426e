"""``layerstore reload``: a new server in place of the one that serves, or the reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerstore import limits
from layerstore.service import keepersocket


def reload(root: Path) -> dict[str, Any]:
    """Have the keeper of ``root`` start new code and configuration, and wait until they serve.

    What it says then: ``pid`` of the new server.  Raises NoServiceError, and ServiceError with
    what is wrong, where the old server goes on.
    """
    seconds = limits.SERVER_PREPARE_SECONDS + limits.SERVER_STOP_SECONDS + limits.HANDOVER_SECONDS
    with keepersocket.connect(root, seconds) as link:
        answer, _ = keepersocket.ask(link, "reload")
    return answer
