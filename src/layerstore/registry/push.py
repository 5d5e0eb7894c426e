"""Writing to a registry (OCI distribution specification, "Push")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final
from urllib.parse import quote

from layerstore import limits
from layerstore.errors import NetworkError, NotFound, RegistryError, UsageError
from layerstore.image import Digest
from layerstore.registry.body import discard
from layerstore.registry.tokens import Access
from layerstore.registry.transport import Host, Request

_UPLOADS: Final = 3  # whole uploads of one blob that are tried

ChunkSource = Callable[[], Iterable[bytes]]


def has_blob(
    host: Host, path: str, digest: Digest, subject: str, deadline: float | None = None
) -> bool:
    """Whether the repository holds a blob."""
    access = Access(f"{host.name}/{path}")
    request = Request("HEAD", f"/v2/{path}/blobs/{digest}", access, subject)
    try:
        response = host.open(request, deadline)
    except NotFound:
        return False
    discard(response)
    return True


def mount_blob(host: Host, path: str, digest: Digest, source: str, subject: str) -> bool:
    """Take a blob over from another repository of the registry; False if it would not."""
    access = Access(f"{host.name}/{path}", "push", f"repository:{source}:pull")
    request = Request(
        "POST",
        f"/v2/{path}/blobs/uploads/?mount={quote(digest)}&from={quote(source, safe='')}",
        access,
        subject,
        headers=(("Content-Length", "0"),),
        expect=(201, 202),
    )
    response = host.open(request, None)
    discard(response)
    if response.status == 201:
        return True
    # The registry opened an upload instead; it is not wanted.
    location = host.location(response, subject, None)
    cancel = Request(
        "DELETE", location, Access(f"{host.name}/{path}", "push"), subject, expect=(200, 202, 204)
    )
    try:
        discard(host.open(cancel, None, 1))
    except (RegistryError, NetworkError):
        return False  # abandoned uploads expire by themselves
    return False


def upload_blob(
    host: Host, path: str, digest: Digest, chunks: ChunkSource, size: int, *, subject: str
) -> None:
    """Upload ``size`` bytes in one piece; ``chunks`` is called anew for each attempt.

    The registry checks the digest.  Raises ``UsageError`` if the chunks do not
    add up to ``size``.
    """
    access = Access(f"{host.name}/{path}", "push")
    start = Request(
        "POST",
        f"/v2/{path}/blobs/uploads/",
        access,
        subject,
        headers=(("Content-Length", "0"),),
        expect=(202,),
    )
    for attempt in range(_UPLOADS):
        response = host.open(start, None)
        discard(response)
        location = host.location(response, subject, None)
        joiner = "&" if "?" in location else "?"
        finish = Request(
            "PUT",
            f"{location}{joiner}digest={quote(digest)}",
            access,
            subject,
            headers=(
                ("Content-Type", "application/octet-stream"),
                ("Content-Length", str(size)),
            ),
            body=lambda: _exactly(chunks(), size, subject),
            expect=(201, 204),
        )
        try:
            # An upload that broke off cannot be continued here: start a new one.
            discard(host.open(finish, None, 1))
        except NetworkError:
            if attempt + 1 == _UPLOADS:
                raise
        except RegistryError as error:
            if attempt + 1 == _UPLOADS or (error.status < 500 and error.status != 404):
                raise
        else:
            return


def put_manifest(
    host: Host, path: str, target: str, raw: bytes, media_type: str, *, subject: str
) -> None:
    """Store a manifest under a tag or digest."""
    if len(raw) > limits.MANIFEST_BYTES:
        raise UsageError(f"a manifest has at most {limits.MANIFEST_BYTES} bytes", subject=subject)
    request = Request(
        "PUT",
        f"/v2/{path}/manifests/{target}",
        Access(f"{host.name}/{path}", "push"),
        subject,
        headers=(("Content-Type", media_type), ("Content-Length", str(len(raw)))),
        body=lambda: (raw,),
        expect=(200, 201, 202),
    )
    discard(host.open(request, None))


def _exactly(chunks: Iterable[bytes], size: int, subject: str) -> Iterator[bytes]:
    sent = 0
    for chunk in chunks:
        sent += len(chunk)
        if sent > size:
            break
        if chunk:
            yield chunk
    if sent != size:
        raise UsageError(f"an upload of {size} bytes was given {sent}", subject=subject)
