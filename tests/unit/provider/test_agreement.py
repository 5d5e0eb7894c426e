"""A tar stream and its TOC: honest pairs agree, every single lie is found."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

import msgspec
import pytest

from lab import tars
from layerstore.errors import InvalidLayer, ServiceError, VerificationError
from layerstore.formats import TocEntry, iter_toc, parse_footer, read_toc, write_estargz
from layerstore.formats.estargz_writer import EstargzOptions
from layerstore.formats.members import Packing
from layerstore.formats.zstdchunked import parse_zstd_footer, read_zstd_toc
from layerstore.formats.zstdchunked_writer import ZstdChunkedOptions, write_zstd_chunked
from layerstore.image import Digest
from layerstore.layertree import LayerIndex, build_index
from layerstore.provider.agreement import check_agreement

NOISE = hashlib.shake_256(b"noise").digest(300_000)
MEMBERS = (
    tars.directory(b"./bin/"),
    tars.regular(b"./bin/sh", NOISE[:200_000], mode=0o4755, uid=3, gid=4),
    tars.hard_link(b"bin/link", b"bin/sh"),
    tars.regular(b"bin/twice", b"first"),
    tars.regular(b"bin/twice", b"second"),
    tars.symlink(b"sbin", b"bin"),
    tars.regular(b"empty"),
    tars.regular(b"holes", NOISE[:5000] + bytes(400_000) + NOISE[:5000]),
    tars.regular(b"caps", b"x", xattrs={b"security.capability": b"\1\0\xff", b"user.a": b"b"}),
    tars.Member(b"dev/null", tars.CHARACTER, device=(1, 3)),
    tars.Member(b"pipe", tars.FIFO),
    tars.regular("\xfcml\xe4ut".encode(), b"name", mtime_ns=1_600_000_000_123_456_789),
    tars.regular(b"raw-\xff", b"not UTF-8"),
    tars.symlink(b"raw-link", b"to-\xff"),
    tars.whiteout(b"bin/gone"),
    tars.whiteout(b"etc/.wh..opq"),
    tars.regular(b"later/child", b"before its parent"),
    tars.directory(b"later", mode=0o700),
)


def tar(members: tuple[tars.Member, ...] = MEMBERS) -> io.BytesIO:
    out = io.BytesIO()
    tars.write_tar(out, members)
    out.seek(0)
    return out


class Layer:
    """A layer of one form: its blob, its TOC, the facts."""

    def __init__(self, form: str, members: tuple[tars.Member, ...] = MEMBERS) -> None:
        out = io.BytesIO()
        if form == "estargz":
            made = write_estargz(tar(members), out, EstargzOptions(chunk_size=65_536))
            self.diff_id, self.diff_size = made.diff_id, made.uncompressed_size
            self.blob = out.getvalue()
            footer = parse_footer(self.blob[-51:], len(self.blob))
            self.end = footer.toc_offset
            toc = read_toc(self.blob[footer.toc_offset :])
            self.packing = Packing.GZIP
        else:
            written = write_zstd_chunked(tar(members), out, ZstdChunkedOptions(chunk_size=16_384))
            self.diff_id, self.diff_size = written.diff_id, written.uncompressed_size
            self.blob = out.getvalue()
            place = parse_zstd_footer(self.blob[-64:], len(self.blob)).toc
            packed = self.blob[place.offset : place.offset + place.size]
            toc = read_zstd_toc(packed, written.toc_digest, compressed_digest=True)
            self.end = place.offset
            self.packing = Packing.ZSTD
        self.entries = list(iter_toc(toc))

    def index(self, entries: list[TocEntry] | None = None) -> LayerIndex:
        out = io.BytesIO()
        build_index(
            self.entries if entries is None else entries, out,
            blob_size=len(self.blob), toc_offset=self.end, packing=self.packing,
        )  # fmt: skip
        return LayerIndex.from_bytes(out.getvalue())


FORMS = ["estargz", "zstd:chunked"]


def without_odd_names(form: str) -> tuple[tars.Member, ...]:
    """The zstd:chunked writer's peers cannot hold paths that come twice."""
    return MEMBERS if form == "estargz" else tuple(
        member for member in MEMBERS if member.name != b"bin/twice"
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_an_honest_layer_agrees(form: str):
    layer = Layer(form, without_odd_names(form))
    facts = check_agreement(layer.index(), io.BytesIO(layer.blob))
    assert facts.diff_id == layer.diff_id
    assert facts.diff_size == layer.diff_size


@pytest.mark.parametrize("form", FORMS)
def test_rounded_times_are_no_lies(form: str):
    layer = Layer(form, without_odd_names(form))
    entries = layer.entries
    for one in entries:
        one.modtime = one.modtime.split(".")[0].rstrip("Z") + "Z" if one.modtime else ""
    check_agreement(layer.index(entries), io.BytesIO(layer.blob))


def entry(entries: list[TocEntry], name: str) -> TocEntry:
    return next(one for one in entries if one.name.rstrip("/").removeprefix("./") == name)


def changed(name: str, **fields: object) -> Callable[[list[TocEntry]], list[TocEntry]]:
    def change(entries: list[TocEntry]) -> list[TocEntry]:
        found = entry(entries, name)
        return [msgspec.structs.replace(one, **fields) if one is found else one for one in entries]

    return change


def dropped(name: str) -> Callable[[list[TocEntry]], list[TocEntry]]:
    return lambda entries: [one for one in entries if one is not entry(entries, name)]


def added(**fields: object) -> Callable[[list[TocEntry]], list[TocEntry]]:
    return lambda entries: [*entries, TocEntry(**fields)]  # type: ignore[arg-type]


ZERO_DIGEST = "sha256:" + hashlib.sha256(b"other").hexdigest()
LIES = {
    "mode": (changed("bin/sh", mode=0o755), "mode"),
    "uid": (changed("bin/sh", uid=0), "owner"),
    "gid": (changed("empty", gid=9), "owner"),
    "time": (changed("empty", modtime="2001-01-01T00:00:00Z"), "time"),
    "type": (changed("empty", type="fifo"), "type"),
    "device": (changed("dev/null", dev_minor=5), "device"),
    "target": (changed("sbin", link_name="usr"), "target"),
    "xattr value": (changed("caps", xattrs={"security.capability": "AAAA"}), "attributes"),
    "no xattrs": (changed("caps", xattrs=None), "attributes"),
    "content": (
        changed("caps", digest=ZERO_DIGEST, chunk_digest=ZERO_DIGEST),
        "content",
    ),
    "dropped": (dropped("caps"), "'/caps' is in the tar stream only"),
    "whiteout dropped": (dropped("bin/.wh.gone"), "in the tar stream only"),
    "opaque dropped": (dropped("etc/.wh..wh..opq"), "/"),
    "added": (added(name="bin/zzz", type="dir"), "'/bin/zzz' is not in the tar stream"),
    "whiteout added": (added(name="bin/.wh.x", type="reg"), "is not in the tar stream"),
    "hard link to another": (changed("bin/link", link_name="caps"), "/"),
    "hard link turned file": (changed("bin/link", type="reg", link_name=""), "/"),
    "file turned hard link": (
        changed("empty", type="hardlink", link_name="caps", digest=""),
        "/",
    ),
    "directory mode": (changed("later", mode=0o755), "mode"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_found(form: str, lie: str):
    layer = Layer(form, without_odd_names(form))
    change, says = LIES[lie]
    index = layer.index(change(layer.entries))
    with pytest.raises(VerificationError, match=says):
        check_agreement(index, io.BytesIO(layer.blob))


@pytest.mark.parametrize("form", FORMS)
def test_a_lie_about_one_chunk_is_found(form: str):
    layer = Layer(form, without_odd_names(form))
    for number, one in enumerate(layer.entries):
        if one.type == "chunk" and not one.chunk_type:
            entries = list(layer.entries)
            entries[number] = msgspec.structs.replace(one, chunk_digest=ZERO_DIGEST)
            with pytest.raises(VerificationError, match="content"):
                check_agreement(layer.index(entries), io.BytesIO(layer.blob))
            return
    pytest.fail("no chunk to lie about")


def test_a_hole_that_is_none_is_found():
    layer = Layer("zstd:chunked", without_odd_names("zstd:chunked"))
    index = next(
        number for number, one in enumerate(layer.entries)
        if one.type == "chunk" and not one.chunk_type
    )  # fmt: skip
    entries = list(layer.entries)
    entries[index] = msgspec.structs.replace(entries[index], chunk_type="zeros")
    with pytest.raises(VerificationError, match="content"):
        check_agreement(layer.index(entries), io.BytesIO(layer.blob))


def test_a_broken_blob_is_no_agreement_and_the_check_can_be_stopped():
    layer = Layer("estargz")
    with pytest.raises(InvalidLayer):
        check_agreement(layer.index(), io.BytesIO(layer.blob[: len(layer.blob) // 2]))

    def stop() -> None:
        raise ServiceError("stopped")

    with pytest.raises(ServiceError):
        check_agreement(layer.index(), io.BytesIO(layer.blob), check=stop)


def test_the_diff_id_is_that_of_the_tar_stream():
    layer = Layer("zstd:chunked", without_odd_names("zstd:chunked"))
    plain = tar(without_odd_names("zstd:chunked")).getvalue()
    assert layer.diff_id == Digest.of(plain)
    facts = check_agreement(layer.index(), io.BytesIO(plain))
    assert (facts.diff_id, facts.diff_size) == (Digest.of(plain), len(plain))
