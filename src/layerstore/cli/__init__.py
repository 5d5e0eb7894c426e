"""The command line: one file a group of verbs, no logic of its own."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from layerstore import __version__
from layerstore.cli.convert import convert
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
app.command(convert)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[
        bool, Parameter(negative="", show_default=False, help="Log more and show tracebacks.")
    ] = False,
) -> None:
    if debug:
        logging.getLogger("layerstore").setLevel(logging.DEBUG)
    try:
        app(tokens, exit_on_error=False, print_error=False)
    except LayerstoreError as error:
        if debug:
            raise
        _fail(str(error), 2 if error.fault is Fault.CALLER else 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(what: str, status: int) -> NoReturn:
    print(f"layerstore: {what}", file=sys.stderr)
    sys.exit(status)


def _usage(error: CycloptsError) -> str:
    """A wrong command line in one line, as every other error."""
    if isinstance(error, UnusedCliTokensError):
        said = f"unexpected argument: {shlex.join(error.unused_tokens or ())}"
    else:
        said = " ".join(str(error).split()).removesuffix(".")
    return f"{said} (see `layerstore --help`)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``layerstore`` program.

    Ends with status 0; 2 for a command line or configuration that makes no sense;
    1 for everything else.
    """
    try:
        app.meta(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(_usage(error), 2)
