"""The command line: one file a group of verbs, no logic of its own.

A verb's module is loaded when the verb is used: ``layerstore serve`` and
``layerstore images`` have little in common, and each is started often.
"""

from __future__ import annotations

import atexit
import gc
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Annotated, Final, NoReturn

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from layerstore import __version__, limits
from layerstore.cli.process import (
    Ended,
    ending_by_signals,
    forget_output,
    is_broken_pipe,
    log_to_stderr,
    open_missing_streams,
)
from layerstore.cli.rootless import enter_namespace
from layerstore.errors import LayerstoreError, exit_status

VERBS: Final = {
    "Service": {
        "serve": "serve:serve",
        "reload": "reload:reload",
        "unmount": "unmount:unmount",
        "status": "status:status",
        "fetch": "fetch:fetch",
        "save-index": "indexes:save_index",
        "load-index": "indexes:load_index",
        "explain": "explain:explain",
        "inspect-layer": "inspectlayer:inspect_layer",
        "df": "diskuse:df",
        "gc": "diskuse:gc",
        "pin": "diskuse:pin",
        "unpin": "diskuse:unpin",
        "materialize": "materialize:materialize",
    },
    "Moving images": {
        "pull": "pull:pull",
        "push": "push:push",
        "copy": "copy:copy",
        "save": "save:save",
        "load": "save:load",
        "convert": "convert:convert",
        "unpack": "unpack:unpack",
    },
    "Images in storage": {
        "images": "images:images",
        "inspect": "images:inspect",
        "history": "images:history",
        "tag": "images:tag",
        "untag": "images:untag",
        "rmi": "images:rmi",
        "mount": "mounts:mount",
        "umount": "mounts:umount",
        "diff": "layers:diff",
        "prune": "prune:prune",
        "check": "check:app",
    },
}
"""Group of verbs -> verb -> ``module:function`` below this package."""

app = App(
    name="layerstore",
    help="Containers start before their images have arrived.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # it is ours to tell
)
for _group, _verbs in VERBS.items():
    for _verb, _place in _verbs.items():
        app.command(f"{__name__}.{_place}", name=_verb, group=_group)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[
        bool, Parameter(negative="", show_default=False, help="Log more and show tracebacks.")
    ] = False,
) -> None:
    open_missing_streams()
    with ExitStack() as stack:
        if tokens[:1] == ("serve",):  # it becomes another program, with its own log and its own end
            if debug:
                logging.getLogger("layerstore").setLevel(logging.DEBUG)
        else:
            stack.enter_context(log_to_stderr(debug=debug))
            stack.enter_context(ending_by_signals())
        _run(tokens, debug=debug)


def _run(tokens: tuple[str, ...], *, debug: bool) -> None:
    try:
        app(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except LayerstoreError as error:
        if is_broken_pipe(error):
            sys.exit(1)
        if debug:
            raise
        _fail(str(error), exit_status(error))
    except Ended as ended:
        _fail(f"ended by {ended}", ended.status)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        forget_output()
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        forget_output()
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 1)


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


def _load_every_verb() -> None:
    """The list of verbs has the first line of each docstring."""
    for verb in chain.from_iterable(VERBS.values()):
        app[verb]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``layerstore`` program.

    Ends with status 0; 2 for a command line or configuration that makes no sense and
    for what others still need; 1 for everything else.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if arguments is None:  # else we are a part of somebody's program, and must not leave it
        # The interpreter looks for garbage while it loads and before it ends, in all that was loaded:
        # a good part of the time of a short verb, for memory that the kernel takes back anyway.
        gc.set_threshold(limits.GARBAGE_OBJECTS)
        atexit.register(gc.freeze)
        try:
            enter_namespace(given)
        except LayerstoreError as error:
            _fail(str(error), exit_status(error))
    known = {"--version", *chain.from_iterable(VERBS.values())}
    if not any(token in known for token in given):
        _load_every_verb()
    try:
        app.meta(given, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(_usage(error), 2)
