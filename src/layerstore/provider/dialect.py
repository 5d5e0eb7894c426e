"""How a client names layers, see ``info``."""

from __future__ import annotations

import enum


class Dialect(enum.StrEnum):
    """By the digest of the blob, or by that of the TOC."""

    LAYER = "L"
    TOC = "T"
