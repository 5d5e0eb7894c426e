"""What ``layerstore status`` shows of each layer."""

from __future__ import annotations

from layerstore.provider.layers import Layers
from layerstore.provider.state import State


def report(state: State, layers: Layers) -> list[dict[str, object]]:
    """One report a known layer, for ``layerstore status``."""
    names: dict[int, list[str]] = {}
    uses: dict[int, int] = {}
    for view in state.views():
        names.setdefault(view.slot, []).append(view.reference)
        uses[view.slot] = uses.get(view.slot, 0) + state.uses(view.key)
    report: list[dict[str, object]] = []
    for record in state.layers():
        layer = layers.get(record.slot)
        complete = state.is_complete(record.slot)
        stored = record.size if complete else 0
        report.append(
            {
                "slot": record.slot,
                "digest": record.blob_digest,
                "toc_digest": record.toc_digest,
                "diff_id": record.diff_id,
                "form": record.form.value,
                "references": sorted({name for name in names.get(record.slot, ()) if name}),
                "uses": uses.get(record.slot, 0),
                "complete": complete,
                "verified": record.verified,
                "quarantine": record.quarantine,
                "total_bytes": record.size,
                "stored_bytes": layer.content.stored_bytes if layer else stored,
                "needed_bytes": layer.content.stats.needed_bytes if layer else 0,
                "fetched_bytes": layer.content.stats.fetched_bytes if layer else 0,
                "refused_units": layer.content.stats.failed_units if layer else 0,
                "files": layer.index.files if layer else None,
                "opened": layer is not None,
            }
        )
    return report
