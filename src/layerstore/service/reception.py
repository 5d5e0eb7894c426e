"""Who connects to the keeper's socket: let in, heard and answered, in the keeper's loop."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable
from functools import partial

from layerstore import limits
from layerstore.errors import ServiceError
from layerstore.service import messages

Asked = Callable[[socket.socket, str | None], None]


class Reception:
    """Calls ``asked`` with what each one asks for, and with None for one that is gone.

    Whoever was heard is not listened to any more: the answer ends the connection.
    """

    def __init__(self, selector: selectors.BaseSelector, asked: Asked) -> None:
        self._selector = selector
        self._asked = asked

    def open(self, listener: socket.socket) -> None:
        """Let in who comes (``listener`` is non-blocking)."""
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def close(self, listener: socket.socket) -> None:
        """Let in nobody any more."""
        self._selector.unregister(listener)

    def listen_to(self, link: socket.socket) -> None:
        """Hear one more thing from somebody who was let in."""
        self._selector.register(link, selectors.EVENT_READ, partial(self._hear, link))

    def answer(self, link: socket.socket, answer: dict[str, object]) -> None:
        """The last word to somebody."""
        with contextlib.suppress(OSError):
            messages.send(link, answer)
        link.close()

    def _accept(self, listener: socket.socket) -> None:
        link, _ = listener.accept()
        link.settimeout(1.0)  # one answer fits into any socket: nobody is ever waited for
        if not messages.peer_may_ask(link):
            self.answer(link, {"error": "only root and the owner of the service may ask"})
        elif len(self._selector.get_map()) > limits.KEEPER_CLIENTS + 4:
            self.answer(link, {"error": "too many ask at once"})
        else:
            self.listen_to(link)

    def _hear(self, link: socket.socket) -> None:
        try:
            got = messages.receive(link)
        except (ServiceError, OSError):
            got = None
        self._selector.unregister(link)
        self._asked(link, None if got is None else str(got[0].get("method", "")))
