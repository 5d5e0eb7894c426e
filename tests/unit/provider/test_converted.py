"""What convert writes, served: layers at the edge of what there is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from lab import oci, tars
from lab.waiting import until
from layerstore.copy.convert import ConvertOptions, convert
from layerstore.copy.layerform import Estargz, ExternalToc, LayerForm, ZstdChunked
from layerstore.registry import RegistrySettings
from layerstore.registry.registriesconf import RegistriesConf


def archive(*members: tars.Member) -> bytes:
    out = io.BytesIO()
    tars.write_tar(out, members)
    return out.getvalue()


@pytest.mark.parametrize("tar", [b"", archive()], ids=["no-bytes", "no-entries"])
@pytest.mark.parametrize("form", [Estargz(), ExternalToc(), ZstdChunked()])
def test_a_layer_with_nothing_in_it_is_served_and_verified(
    asker, registry, tmp_path: Path, form: LayerForm, tar: bytes
):
    sources = [oci.LayerSource(tar), oci.LayerSource(archive(tars.regular(b"a", b"a")))]
    oci.write_image(tmp_path / "in", "1", sources, oci.RunConfig(architecture="amd64"))
    reference = f"{registry.host}/app:1"
    options = ConvertOptions(
        form=form,
        destination_settings=RegistrySettings(registries=RegistriesConf(), tls_verify=False),
    )
    (image,) = convert(f"oci:{tmp_path}/in:1", f"docker://{reference}", options).images
    empty, other = image.layers
    assert empty.toc_digest is not None
    for name in (empty.toc_digest, empty.digest):
        view = asker.view(reference, name)
        assert asker.store.layers.open(view.slot).index.files == 0
    assert asker.read(asker.view(reference, other.digest), "a") == b"a"
    job = asker.store.fetches.start(reference, ("linux/amd64",))
    until(lambda: asker.store.fetches.status(job)["done"])
    assert [one["state"] for one in asker.store.fetches.status(job)["layers"]] == ["complete"] * 2
    assert all(one["verified"] for one in asker.store.status()["layers"])
