"""The HTTP client of an endpoint: it follows no redirect, keeps no connection, and gives up after one time-out in all.

httpx bounds each read; a server that sends one byte a second passes every such bound, in its headers as in its body.
So each request has an hourglass: when it has run out, the request's socket is shut down under it. That needs a
socket of its own for each request, hence no kept connections: a handshake is little beside an answer that takes
seconds. A redirect would carry prompts to a host that nobody has named.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

    import httpx2


class Hourglass:
    """A context in which one thread makes one request. `over` says whether its time ran out."""

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self.over = False
        self._transport = transport
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(timeout_s, self._run_out)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._transport.glass.now = self
        self._timer.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _e: BaseException | None, _at: TracebackType | None) -> None:
        self._timer.cancel()
        self._transport.glass.now = None
        with self._lock:
            self._socket = None

    def connected(self, name: str, told: dict[str, Any]) -> None:
        """Take the socket of this request: httpx tells of it when the connection, or TLS on it, stands."""
        if name.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._socket = told["return_value"].get_extra_info("socket")
            if self.over:
                self._shut()

    def _run_out(self) -> None:
        self.over = True
        self._shut()

    def _shut(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # it may have ended by itself
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)


class Transport:
    """An httpx client for several threads, each of which holds an hourglass while it makes a request."""

    def __init__(self, timeout_s: float) -> None:
        import httpx2

        self.glass = threading.local()
        self.timeout_s = timeout_s
        self.client: httpx2.Client = httpx2.Client(
            timeout=timeout_s,
            follow_redirects=False,
            limits=httpx2.Limits(max_keepalive_connections=0),
            event_hooks={"request": [self._watch]},
        )

    def hourglass(self) -> Hourglass:
        """Return the bound of one request."""
        return Hourglass(self, self.timeout_s)

    def _watch(self, request: httpx2.Request) -> None:
        request.extensions["trace"] = self.glass.now.connected
