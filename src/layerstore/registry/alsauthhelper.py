"""Credentials for the additional layer store of the consumer.

A lazy layer's bytes are fetched by the store long after the pull, so it needs what the
pull was allowed with.  registries.conf names a program for that,
``additional-layer-store-auth-helper`` (containers/image since 5.32,
"docker/docker_image_src.go").  It is run without arguments once a manifest has come and
before the first layer is looked up, and reads one JSON object:

    {"<physical reference>": {"username": "…", "password": "…", "identityToken": "…"}}

Members without a value are left out, so anonymous access is ``{}``.  Whatever goes wrong
is a warning: the pull does not depend on the store.
"""

from __future__ import annotations

import logging
import subprocess

import msgspec

from layerstore import limits
from layerstore.errors import ConfigError
from layerstore.image import Reference
from layerstore.registry.client import RegistryClient
from layerstore.registry.credentials import Credential

_log = logging.getLogger(__name__)


def hand_over(client: RegistryClient, reference: Reference) -> bool:
    """Run the configured helper for a reference whose manifest ``client`` has fetched.

    Whether one is configured and took the credential.
    """
    settings = client.settings
    program = settings.registries.auth_helper
    if not program:
        return False
    try:
        place = client.served_by(reference)
        credential = client.credential(place)
    except ConfigError as error:
        _log.warning("%s is not run: %s", program, error)
        return False
    version = f"@{reference.digest}" if reference.digest else f":{reference.tag}"
    request = {place.physical + version: _members(credential)}
    env = settings.helper_env
    try:
        done = subprocess.run(
            [program],
            input=msgspec.json.encode(request),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limits.HELPER_SECONDS,
            check=False,
            env=None if env is None else dict(env),
        )
    except subprocess.TimeoutExpired:
        _log.warning("%s did not end within %g seconds", program, limits.HELPER_SECONDS)
        return False
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be run: %s", program, error)
        return False
    if done.returncode != 0:
        _log.warning("%s ended with status %d", program, done.returncode)
        return False
    return True


def _members(credential: Credential | None) -> dict[str, str]:
    if credential is None:
        return {}
    members = {
        "username": credential.username,
        "password": credential.password,
        "identityToken": credential.identity_token,
    }
    return {name: value for name, value in members.items() if value}
