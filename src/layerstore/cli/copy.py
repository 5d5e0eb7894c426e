"""``layerstore copy``: an image from one place to another, with Skopeo's words."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from layerstore.cli.common import (
    STORAGE,
    Json,
    StorageFlags,
    named_auth_file,
    option,
    print_json,
    switch,
)
from layerstore.copy.context import CopyContext
from layerstore.copy.copyimage import CopyOptions, Platforms, copy_image
from layerstore.copy.manifestedit import Family
from layerstore.copy.policy import Policy
from layerstore.copy.progress import listener
from layerstore.copy.recompress import Form
from layerstore.errors import StorageError, UsageError
from layerstore.image import Platform, Reference
from layerstore.registry import Credential, RegistrySettings

_ACCEPT_ANYTHING = b'{"default": [{"type": "insecureAcceptAnything"}]}'


def copy(
    src: str,
    dst: str,
    /,
    *,
    all_images: Annotated[bool, switch("Copy all images of an index.", "--all", "-a")] = False,
    multi_arch: Annotated[
        Literal["system", "all", "index-only"] | None,
        option("What to copy of an index: the image of one platform, all, or none."),
    ] = None,
    platform: Annotated[
        str | None, option("The os/architecture[/variant] to choose from an index.")
    ] = None,
    override_os: Annotated[str | None, option("Choose for this operating system.")] = None,
    override_arch: Annotated[str | None, option("Choose for this architecture.")] = None,
    override_variant: Annotated[str | None, option("Choose for this CPU variant.")] = None,
    format: Annotated[  # noqa: A002
        Literal["oci", "v2s2"] | None, option("The kind of manifest to write.", "--format", "-f")
    ] = None,
    preserve_digests: Annotated[bool, switch("Fail rather than change a digest.")] = False,
    remove_signatures: Annotated[bool, switch("Do not copy signatures.")] = False,
    additional_tag: Annotated[
        tuple[str, ...], option("A further name in a docker-archive; may be repeated.")
    ] = (),
    digestfile: Annotated[
        Path | None, option("Write the digest of the copied manifest to this file.")
    ] = None,
    dest_compress: Annotated[bool, switch("Pack plain layers in a dir: too.")] = False,
    dest_decompress: Annotated[bool, switch("Unpack the layers.")] = False,
    dest_compress_format: Annotated[
        Literal["gzip", "zstd"] | None, option("What layers shall be packed with.")
    ] = None,
    dest_compress_level: Annotated[int | None, option("How hard to pack.")] = None,
    dest_force_compress_format: Annotated[
        bool, switch("Pack anew what the destination has in another form.")
    ] = False,
    authfile: Annotated[Path | None, option("Credentials, instead of the usual places.")] = None,
    src_authfile: Annotated[Path | None, option("Credentials for SRC.")] = None,
    dest_authfile: Annotated[Path | None, option("Credentials for DST.")] = None,
    src_creds: Annotated[str | None, option("USERNAME[:PASSWORD] for SRC.")] = None,
    dest_creds: Annotated[str | None, option("USERNAME[:PASSWORD] for DST.")] = None,
    src_no_creds: Annotated[bool, switch("Be anonymous at SRC.")] = False,
    dest_no_creds: Annotated[bool, switch("Be anonymous at DST.")] = False,
    src_cert_dir: Annotated[Path | None, option("Certificates for SRC.")] = None,
    dest_cert_dir: Annotated[Path | None, option("Certificates for DST.")] = None,
    src_tls_verify: bool | None = None,
    dest_tls_verify: bool | None = None,
    policy: Annotated[Path | None, option("policy.json, instead of the usual one.")] = None,
    insecure_policy: Annotated[bool, switch("Accept any image.")] = False,
    image_parallel_copies: Annotated[int, option("Blobs on their way at once.")] = 6,
    quiet: Annotated[bool, switch("Show no progress.", "--quiet", "-q")] = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Copy the image SRC to DST.

    Both are TRANSPORT:NAME: docker://REFERENCE, oci:DIRECTORY[:TAG],
    oci-archive:FILE[:TAG], docker-archive:FILE[:REFERENCE], dir:DIRECTORY or
    containers-storage:REFERENCE.  What DST can take as it is keeps its digests.
    """
    options = CopyOptions(
        platforms=_platforms(multi_arch, all_images=all_images),
        format=None if format is None else Family(format),
        compression=_form(dest_compress_format, compress=dest_compress, decompress=dest_decompress),
        level=dest_compress_level,
        force_compression=dest_force_compress_format,
        preserve_digests=preserve_digests,
        remove_signatures=remove_signatures,
        tags=tuple(map(Reference.parse, additional_tag)),
    )
    with listener(quiet=quiet) as shown:
        ctx = CopyContext(
            source_registry=_settings(
                src_authfile or authfile, src_creds, src_no_creds, src_cert_dir, src_tls_verify
            ),
            destination_registry=_settings(
                dest_authfile or authfile,
                dest_creds,
                dest_no_creds,
                dest_cert_dir,
                dest_tls_verify,
            ),
            storage=None if storage == STORAGE else storage.config(),
            policy=_policy(policy, insecure=insecure_policy),
            platform=_platform(platform, override_os, override_arch, override_variant),
            listener=shown,
            parallel=image_parallel_copies,
        )
        result = copy_image(src, dst, ctx, options)
    if digestfile is not None:
        try:
            digestfile.write_text(str(result.digest))
        except OSError as error:
            raise StorageError(error.strerror or str(error), subject=str(digestfile)) from error
    if json:
        print_json(
            {
                "source": result.source,
                "digest": result.digest,
                "mediaType": result.media_type,
                "imageId": result.image_id or None,
            }
        )
    sys.stdout.flush()


def _platforms(text: str | None, *, all_images: bool) -> Platforms:
    if all_images and text not in (None, "all"):
        raise UsageError(f"--all and --multi-arch={text} contradict each other")
    if all_images:
        return Platforms.ALL
    return Platforms.SYSTEM if text is None else Platforms(text)


def _form(text: str | None, *, compress: bool, decompress: bool) -> Form | None:
    if decompress and (compress or text is not None):
        raise UsageError("layers cannot be both packed and unpacked")
    if decompress:
        return Form.PLAIN
    if text is not None:
        return Form(text)
    return Form.GZIP if compress else None


def _platform(
    text: str | None, system: str | None, architecture: str | None, variant: str | None
) -> Platform | None:
    if text is not None:
        return Platform.parse(text)
    if not (system or architecture or variant):
        return None
    host = Platform.host()
    if architecture not in (None, host.architecture) and variant is None:
        variant = ""
    return Platform(
        system or host.os,
        architecture or host.architecture,
        host.variant if variant is None else variant,
    )


def _policy(path: Path | None, *, insecure: bool) -> Policy | None:
    if insecure:
        return Policy.parse(_ACCEPT_ANYTHING)
    return None if path is None else Policy.load(path)


def _settings(
    authfile: Path | None,
    creds: str | None,
    no_creds: bool,
    cert_dir: Path | None,
    tls_verify: bool | None,
) -> RegistrySettings:
    if creds is not None and no_creds:
        raise UsageError("credentials and no credentials contradict each other")
    settings = RegistrySettings.from_system(
        auth_file=named_auth_file(authfile), cert_directory=cert_dir, tls_verify=tls_verify
    )
    if no_creds:
        return replace(settings, auth_files=(), credential_sources=())
    if creds is not None:
        username, _, password = creds.partition(":")
        return settings.with_sources(lambda _: Credential(username, password))
    return settings
