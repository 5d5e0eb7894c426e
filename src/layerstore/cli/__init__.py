"""The command line: one file a group of verbs, no logic of its own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from layerstore import __version__

# CONV
from layerstore.cli.serve import serve
from layerstore.cli.status import status
from layerstore.errors import Fault, LayerstoreError

app = App(
    name="layerstore",
    help="Containers start before their images have arrived.",
    version=__version__,
    help_format="plaintext",
)
app.command(serve)
app.command(status)
# CONV2


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(negative="", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        logging.getLogger("layerstore").setLevel(logging.DEBUG)
        app(tokens, exit_on_error=False)
        return
    try:
        app(tokens, exit_on_error=False, print_error=True)
    except LayerstoreError as error:
        print(f"layerstore: {error}", file=sys.stderr)
        sys.exit(2 if error.fault is Fault.CALLER else 1)
    except CycloptsError:
        sys.exit(2)
    except KeyboardInterrupt:
        print("layerstore: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``layerstore`` program."""
    app.meta(arguments)
