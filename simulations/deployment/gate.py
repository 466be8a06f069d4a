"""The gate: of everything a SuperLink offers on its one port, sites reach what nodes need, and nothing else.

In flwr 1.41 a SuperLink serves nodes (`/v1/fleet`), operators (`/v1/control`: start runs, register nodes) and task
processes (`/v1/runtime`) on the same port, and only the first asks who is there. So it listens on loopback alone, and
this small reverse proxy stands before it with a certificate of its own. Whatever is not on the list is answered 404
without being forwarded. `configs/deploy/nginx.conf` says the same to nginx.

    python -m simulations.deployment.gate --listen 0.0.0.0:8443 --superlink 127.0.0.1:8000 \
        --root-certificates ca.crt --ssl-certfile server.crt --ssl-keyfile server.key
"""

from __future__ import annotations

import argparse
import ssl
import sys
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]

CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""What an authenticated node calls. Not `register-node` and `unregister-node`: only the operator registers nodes."""

MAX_BODY = 16 * 2**20
"""Flower cuts arrays into chunks of 5 MB; a body of more than three of them comes from nobody honest."""

_HOP = frozenset({b"host", b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade", b"content-length"})


class Gate:
    """The ASGI application. `superlink` is `host:port` on loopback, `trust` the CA of its certificate."""

    def __init__(self, superlink: str, trust: str) -> None:
        verify = ssl.create_default_context(cafile=trust)
        self._client = httpx.AsyncClient(base_url=f"https://{superlink}", verify=verify, timeout=120, trust_env=False)
        self._open = {f"/v1/fleet/{call}" for call in CALLS}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._open:
            await _answer(send, 404, b"not published by this gate\n")
        else:
            await self._forward(scope, receive, send)

    async def _forward(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body = bytearray()
        async for part in _parts(receive):
            body += part
            if len(body) > MAX_BODY:
                await _answer(send, 413, b"larger than this gate lets through\n")
                return
        headers = [(name, value) for name, value in scope["headers"] if name not in _HOP]
        try:
            reply = await self._client.post(scope["path"], content=bytes(body), headers=headers)
        except httpx.TransportError:
            await _answer(send, 503, b"the SuperLink behind this gate does not answer\n")  # nodes retry on 503
            return
        kept = [(name, value) for name, value in reply.headers.raw if name.lower() not in _HOP | {b"content-encoding"}]
        await _answer(send, reply.status_code, reply.content, kept)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            event = await receive()
            if event["type"] == "lifespan.shutdown":
                await self._client.aclose()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return
        yield event.get("body", b"")
        if not event.get("more_body"):
            return


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), length]})
    await send({"type": "http.response.body", "body": body})


def main(argv: list[str] | None = None) -> int:
    """Command line; serves until it is ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="where the sites arrive")
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="the SuperLink, on loopback")
    parser.add_argument("--root-certificates", required=True, help="the CA of the SuperLink's certificate")
    parser.add_argument("--ssl-certfile", required=True)
    parser.add_argument("--ssl-keyfile", required=True)
    words = parser.parse_args(argv)
    host, _, port = words.listen.rpartition(":")
    gate: Any = Gate(words.superlink, words.root_certificates)  # uvicorn types its ASGI more narrowly than ASGI does
    uvicorn.run(
        gate,
        host=host,
        port=int(port),
        ssl_certfile=words.ssl_certfile,
        ssl_keyfile=words.ssl_keyfile,
        log_level="warning",
        access_log=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
