"""The keeper: the process that `layerstore serve` becomes.

It mounts the store, holds the FUSE descriptor, and starts the server that answers on it.  While the
descriptor is open the mount lives; so a server may die, or be replaced, and its successor goes on
with the requests that are open.  To live long the keeper does nothing else: one loop, no threads,
few modules, all loaded at the start.  It never touches its own mount: it would wait for a server
that it has to start first.

docs/how-it-works.md has the picture.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from layerstore.service import held, renewal
from layerstore.service.holding import Holding
from layerstore.service.keeperloop import Keeper
from layerstore.service.options import LOG_FORMAT, Options
from layerstore.service.signalpipe import SignalPipe
from layerstore.service.systemd import Notifier, received


def main() -> None:
    """``python -m layerstore.service.keeper``: what `layerstore serve` starts itself anew as."""
    parser = argparse.ArgumentParser(prog="layerstore serve")
    parser.add_argument("mountpoint", type=Path, nargs="?")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--resume", type=int)
    given = parser.parse_args()
    if given.trial:
        print(renewal.VERSION)
        return
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    if given.debug:
        logging.getLogger("layerstore").setLevel(logging.DEBUG)
    options = Options(given.mountpoint, given.root, given.config, given.debug)
    notifier = Notifier.of(os.environ)
    keeper = Keeper(options, notifier, Holding(notifier), SignalPipe())
    if given.resume is not None:
        keeper.resume(renewal.read(given.resume, given.root))
    else:
        keeper.holding.mounts = held.from_store(received(os.environ))
    sys.exit(keeper.run())


if __name__ == "__main__":
    main()
