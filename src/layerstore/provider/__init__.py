"""The protocol of additional layer stores: names, dialects, info, use counts, state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from layerstore import lazy

if TYPE_CHECKING:
    from layerstore.provider.cachecheck import Checks
    from layerstore.provider.dialect import Dialect
    from layerstore.provider.diskuse import DiskUse
    from layerstore.provider.explain import ExplainedImage, ExplainedLayer, Verdict
    from layerstore.provider.fetch import Fetches
    from layerstore.provider.indexes import GivenLayer
    from layerstore.provider.info import unsized
    from layerstore.provider.layers import Layer, Layers
    from layerstore.provider.memory import limit_arenas
    from layerstore.provider.needs import LookAtNeeds, Needs
    from layerstore.provider.policy import DialectL, Ordinary, Outage, Policy
    from layerstore.provider.refusal import Refusal
    from layerstore.provider.state import View
    from layerstore.provider.statefile import check_state, open_state
    from layerstore.provider.store import Store
    from layerstore.provider.workers import WorkerPool

__all__ = [
    "Checks",
    "Dialect",
    "DialectL",
    "DiskUse",
    "ExplainedImage",
    "ExplainedLayer",
    "Fetches",
    "GivenLayer",
    "Layer",
    "Layers",
    "LookAtNeeds",
    "Needs",
    "Ordinary",
    "Outage",
    "Policy",
    "Refusal",
    "Store",
    "Verdict",
    "View",
    "WorkerPool",
    "check_state",
    "limit_arenas",
    "open_state",
    "unsized",
]

_HOMES: Final = {
    "Checks": "cachecheck",
    "Dialect": "dialect",
    "DialectL": "policy",
    "DiskUse": "diskuse",
    "ExplainedImage": "explain",
    "ExplainedLayer": "explain",
    "Fetches": "fetch",
    "GivenLayer": "indexes",
    "Layer": "layers",
    "Layers": "layers",
    "LookAtNeeds": "needs",
    "Needs": "needs",
    "Ordinary": "policy",
    "Outage": "policy",
    "Policy": "policy",
    "Refusal": "refusal",
    "Store": "store",
    "Verdict": "explain",
    "View": "state",
    "WorkerPool": "workers",
    "limit_arenas": "memory",
    "check_state": "statefile",
    "open_state": "statefile",
    "unsized": "info",
}
if not TYPE_CHECKING:  # else every name would be one to mypy
    __getattr__ = lazy.attributes(__name__, _HOMES)
