"""The protocol of additional layer stores: names, dialects, info, use counts, state."""

from layerstore.content import DiskRoom
from layerstore.provider.cachecheck import Checks
from layerstore.provider.dialect import Dialect
from layerstore.provider.diskuse import DiskUse
from layerstore.provider.explain import ExplainedImage, ExplainedLayer, Verdict, explain
from layerstore.provider.fetch import Fetches
from layerstore.provider.indexes import GivenLayer
from layerstore.provider.info import unsized
from layerstore.provider.layers import Layer, Layers
from layerstore.provider.memory import limit_arenas
from layerstore.provider.needs import LookAtNeeds, Needs
from layerstore.provider.policy import DialectL, Ordinary, Outage, Policy
from layerstore.provider.refusal import Refusal
from layerstore.provider.state import View
from layerstore.provider.statefile import open_state
from layerstore.provider.store import Store
from layerstore.provider.workers import WorkerPool

__all__ = [
    "Checks",
    "Dialect",
    "DialectL",
    "DiskUse",
    "DiskRoom",
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
    "explain",
    "limit_arenas",
    "open_state",
    "unsized",
]
