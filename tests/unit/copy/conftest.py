"""Images for the copier, small enough to be looked at."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from lab import oci, tars
from lab.oci import StoredImage
from layerstore.copy.context import CopyContext
from layerstore.copy.policy import Policy
from layerstore.registry import RegistrySettings
from layerstore.registry.registriesconf import RegistriesConf

MakeImage = Callable[..., StoredImage]


@pytest.fixture
def accepting() -> CopyContext:
    """A context that accepts every image and knows no configuration of the machine."""
    settings = RegistrySettings(registries=RegistriesConf(), tls_verify=False, attempts=2)
    return CopyContext(
        source_registry=settings,
        destination_registry=settings,
        policy=Policy.parse(b'{"default": [{"type": "insecureAcceptAnything"}]}'),
    )


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """``make(tag="x", layers=2, architecture=...)``: an image in the layout ``tmp_path/source``."""

    def make(
        tag: str = "x",
        *,
        layers: int = 2,
        architecture: str = "amd64",
        compression: Literal["gzip", "none"] = "gzip",
    ) -> StoredImage:
        sources = []
        for number in range(layers):
            out = io.BytesIO()
            name = f"{architecture}-{number}".encode()
            tars.write_tar(
                out, [tars.directory(b"d"), tars.regular(b"d/" + name, name * 1000 * (number + 1))]
            )
            sources.append(oci.LayerSource(out.getvalue(), compression=compression))
        config = oci.RunConfig(architecture=architecture)
        return oci.write_image(tmp_path / "source", tag, sources, config)

    return make
