"""HTTP to registries: manifests, blobs, byte ranges, authentication, mirrors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from layerstore import lazy

if TYPE_CHECKING:
    from layerstore.registry.body import BlobReader
    from layerstore.registry.client import FetchedManifest, RegistryClient
    from layerstore.registry.credentials import (
        AuthFile,
        Credential,
        CredentialSource,
        CredentialStore,
    )
    from layerstore.registry.registriesconf import (
        Endpoint,
        Mirror,
        RegistriesConf,
        Registry,
        is_prefix,
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
    "is_prefix",
    "match_prefix",
]

_HOMES: Final = {
    "AuthFile": "credentials",
    "BlobReader": "body",
    "Credential": "credentials",
    "CredentialSource": "credentials",
    "CredentialStore": "credentials",
    "Endpoint": "registriesconf",
    "FetchedManifest": "client",
    "Mirror": "registriesconf",
    "RegistriesConf": "registriesconf",
    "Registry": "registriesconf",
    "RegistryClient": "client",
    "RegistrySettings": "settings",
    "Stats": "stats",
    "is_prefix": "registriesconf",
    "match_prefix": "registriesconf",
}
if not TYPE_CHECKING:  # else every name would be one to mypy
    __getattr__ = lazy.attributes(__name__, _HOMES)
