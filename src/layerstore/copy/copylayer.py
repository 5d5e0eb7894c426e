"""One layer on its way to a destination: left there, taken over, moved or made anew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from layerstore.copy.localfiles import said, scratch_directory
from layerstore.copy.manifestedit import CopiedLayer, LayerKind, layer_kind
from layerstore.copy.progress import ALREADY_EXISTS, PullItem, PullListener
from layerstore.copy.recompress import Form, OpenedBlob, make_blob, unpacked
from layerstore.copy.transport import ImageDestination, ImageSource
from layerstore.errors import (
    LayerstoreError,
    StorageError,
    UnsupportedFormat,
)
from layerstore.formats import Compression
from layerstore.formats.compression import Readable
from layerstore.image import Descriptor, Digest


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What may be done to a layer.

    ``fixed``: nothing.  ``compression`` is what it shall be, if that was asked for; with
    ``force`` even where the destination has the layer otherwise.  ``no_zstd``: the manifest
    has no word for zstd.
    """

    fixed: bool = False
    compression: Form | None = None
    level: int | None = None
    force: bool = False
    no_zstd: bool = False


class LayerCopier:
    """Copies layers between two transports; ``copy`` may run in several threads."""

    def __init__(
        self,
        source: ImageSource,
        destination: ImageDestination,
        listener: PullListener,
        scratch: Path | None,
        stop: threading.Event,
    ) -> None:
        """``stop`` makes what is under way end soon, with an error nobody will see."""
        self._source = source
        self._destination = destination
        self._listener = listener
        self._scratch = scratch_directory(scratch)
        self._stop = stop

    def copy(self, layer: Descriptor, diff_id: Digest | None, plan: LayerPlan) -> CopiedLayer:
        """Bring a layer to the destination.

        Raises ``VerificationError`` for wrong content, ``UnsupportedFormat`` for a layer that
        may not be changed and cannot stay as it is, and the errors of the transports, all
        naming the layer.
        """
        try:
            return self._copy(layer, diff_id, plan)
        except OSError as error:
            raise StorageError(said(error), subject=f"layer {layer.digest}") from error
        except LayerstoreError as error:
            if not error.subject:
                error.subject = f"layer {layer.digest}"
            raise

    def _copy(self, layer: Descriptor, diff_id: Digest | None, plan: LayerPlan) -> CopiedLayer:
        kind = layer_kind(layer.media_type)
        form = Form.AS_IS
        if kind is not None:
            form = self._form(kind.compression, plan)
            if form is not Form.PLAIN and layer.urls and not kind.distributed:
                return CopiedLayer(layer.digest, layer.size)
        if (left := self._left(layer, diff_id, form, plan, kind)) is not None:
            self._listener.skipped(layer.digest, ALREADY_EXISTS)
            return left
        if not self._source.gives_blob(layer.digest):
            return self._from_diff(layer, diff_id, plan)
        with self._listener.copying("blob", layer.digest, layer.size) as item:
            return self._move(layer, diff_id, plan, kind, item)

    def _left(
        self,
        layer: Descriptor,
        diff_id: Digest | None,
        form: Form,
        plan: LayerPlan,
        kind: LayerKind | None,
    ) -> CopiedLayer | None:
        """What the destination has already, or can take without moving it."""
        same = CopiedLayer(layer.digest, layer.size)
        destination = self._destination
        if form is Form.PLAIN:
            size = None if diff_id is None else destination.known_size(diff_id)
            if diff_id is None or size is None:
                return None
            return CopiedLayer(diff_id, size, Compression.NONE)
        zstd = kind is not None and kind.compression is Compression.ZSTD
        if (form is Form.AS_IS or not plan.force) and not (plan.no_zstd and zstd):
            if destination.has_blob(layer.digest, layer.size):
                return same
            if form is Form.AS_IS and destination.take_over(self._source, layer.digest):
                return same
        return None

    def _move(
        self,
        layer: Descriptor,
        diff_id: Digest | None,
        plan: LayerPlan,
        kind: LayerKind | None,
        item: PullItem,
    ) -> CopiedLayer:
        def check(position: int) -> None:
            self._check()
            item.at(position, layer.size)

        with OpenedBlob(self._source, layer, check) as opened:
            form = Form.AS_IS if kind is None else self._form(opened.compression, plan)
            if form is Form.AS_IS:
                self._destination.put_blob(layer.digest, opened.pieces, layer.size)
                return CopiedLayer(layer.digest, layer.size)
            plain = form is Form.PLAIN and opened.compression is Compression.NONE
            if plain and diff_id in (None, layer.digest):
                self._destination.put_blob(layer.digest, opened.pieces, layer.size)
                return CopiedLayer(layer.digest, layer.size, Compression.NONE)
            return self._make(unpacked(opened), layer, diff_id, plan, form)

    def _from_diff(self, layer: Descriptor, diff_id: Digest | None, plan: LayerPlan) -> CopiedLayer:
        """The layer from its tar stream, where the source has lost its blob."""
        if diff_id is None or plan.fixed:
            raise UnsupportedFormat(
                "the source has the layer's files, but not its blob, and the manifest may not"
                " be changed",
                advice="a signed image can be copied with --remove-signatures",
            )
        form = self._form(Compression.NONE, plan)
        if form is Form.AS_IS:
            form = Form.PLAIN
        with (
            self._listener.copying("blob", layer.digest, None) as item,
            self._source.layer_diff(layer, diff_id) as stream,
        ):
            told = _Told(stream, self._check, item)
            return self._make(told, layer, diff_id, plan, form, from_files=True)

    def _make(
        self,
        tar: Readable,
        layer: Descriptor,
        diff_id: Digest | None,
        plan: LayerPlan,
        form: Form,
        *,
        from_files: bool = False,
    ) -> CopiedLayer:
        made = make_blob(
            tar,
            form,
            self._scratch,
            level=plan.level,
            diff_id=diff_id,
            subject=f"layer {layer.digest}",
            from_files=from_files,
        )
        with made.file as file:
            self._check()
            if not self._destination.has_blob(made.digest, made.size):
                pieces = file.pieces(made.size, f"layer {layer.digest}")
                self._destination.put_blob(made.digest, pieces, made.size)
        return CopiedLayer(made.digest, made.size, made.compression)

    def _form(self, found: Compression, plan: LayerPlan) -> Form:
        """What a layer that is packed as ``found`` has to become."""
        wanted = self._destination.layer_form
        if wanted is Compression.NONE:
            return Form.PLAIN
        if plan.fixed:
            return Form.AS_IS
        if plan.compression is not None:
            form = plan.compression
            if form is Form.PLAIN:
                return form
            return Form.AS_IS if form.compression is found else form
        if wanted is Compression.GZIP and found is Compression.NONE:
            return Form.GZIP
        if plan.no_zstd and found is Compression.ZSTD:
            return Form.GZIP
        return Form.AS_IS

    def _check(self) -> None:
        if self._stop.is_set():
            raise StorageError("stopped because another layer failed")


class _Told:
    """A stream whose reader may be stopped, and whose progress is told."""

    def __init__(self, stream: Readable, check: Callable[[], None], item: PullItem) -> None:
        self._stream = stream
        self._check = check
        self._item = item

    def read(self, n: int, /) -> bytes:
        self._check()
        data = self._stream.read(n)
        self._item.advance(len(data))
        return data
