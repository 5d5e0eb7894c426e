"""HTTP to registries: manifests, blobs, byte ranges, authentication, mirrors."""

from layerstore.registry.body import BlobReader
from layerstore.registry.client import FetchedManifest, RegistryClient
from layerstore.registry.credentials import AuthFile, Credential, CredentialSource, CredentialStore
from layerstore.registry.registriesconf import (
    Endpoint,
    Mirror,
    RegistriesConf,
    Registry,
    match_prefix,
)
from layerstore.registry.settings import RegistrySettings
from layerstore.registry.stats import Stats

__all__ = [
    "AuthFile",
    "BlobReader",
    "Credential",
    "CredentialSource",
    "CredentialStore",
    "Endpoint",
    "FetchedManifest",
    "Mirror",
    "RegistriesConf",
    "Registry",
    "RegistryClient",
    "RegistrySettings",
    "Stats",
    "match_prefix",
]
