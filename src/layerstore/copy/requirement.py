"""What a policy may demand of an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from layerstore.errors import PolicyRejected
from layerstore.image import Reference


class Unchecked(msgspec.Struct, frozen=True):
    """An image before it is believed: its logical name, its manifest, its signatures."""

    reference: Reference | None
    manifest: bytes
    signatures: Sequence[bytes]


class Requirement(ABC):
    """One entry of a list of requirements."""

    needs_signatures = False

    @abstractmethod
    def check(self, image: Unchecked) -> None:
        """Raise ``PolicyRejected`` unless the image meets it."""


class AcceptAnything(Requirement):
    """``insecureAcceptAnything``."""

    def check(self, image: Unchecked) -> None:
        """Everything will do."""


class Reject(Requirement):
    """``reject``."""

    def check(self, image: Unchecked) -> None:
        """Nothing will do."""
        raise PolicyRejected("the policy rejects it")


@dataclass(frozen=True, slots=True)
class Unsupported(Requirement):
    """What a policy may demand and we cannot check."""

    what: str

    def check(self, image: Unchecked) -> None:
        """Nothing will do."""
        raise PolicyRejected(
            f"the policy demands {self.what}, which is not supported here",
            advice="copy it with skopeo or podman, which can check it",
        )
