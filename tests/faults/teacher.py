"""An OpenAI-compatible endpoint on this machine that fails as it is told, and what tests ask of it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import SecretStr

from fl_app.types import Draft, Origin
from strategies.distillers.endpoint import Endpoint, EndpointDistiller

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

KEY = "sk-canary-0123456789"
RNG = np.random.default_rng(0)


def draft(number: int, instruction: str) -> Draft:
    return Draft(
        id=f"d{number}",
        instruction=instruction,
        response="",
        origin=Origin(round=1, method="m", code="c", stream=str(number)),
    )


def drafts(*instructions: str) -> list[Draft]:
    return [draft(number, one) for number, one in enumerate(instructions)]


@dataclass
class Reply:
    """What the server does with one request. `cut` ends in the middle of the body, `stall_s` waits there."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0
    header_drip_s: float = 0.0
    stall_s: float = 0.0
    cut: bool = False
    content_type: str = "application/json"


def completion(content: str | None = "Rest well.", finish: str = "stop", tokens: int = 100, **message: Any) -> Reply:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    tree = {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": tokens}}
    return Reply(body=json.dumps(tree).encode())


def failure(status: int, message: str = "no", code: str = "", **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    return Reply(status=status, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


class Teacher:
    """An OpenAI-compatible server. `script` gives the reply to the n-th request for an instruction.

    `counts` are requests by instruction, `served` complete answers with status 200.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.script: Callable[[str, int], Reply] = lambda _asked, _attempt: completion()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.over = threading.Event()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = body["messages"][1]["content"].split("\n", 1)[1].rsplit("\n", 1)[0]
                teacher.requests.append(body)
                teacher.keys.add(self.headers["Authorization"])
                teacher.counts[asked] += 1
                reply = teacher.script(asked, teacher.counts[asked])
                teacher.over.wait(reply.delay_s)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.reply(reply)
                    teacher.served[asked] += reply.status == 200 and not (reply.cut or reply.stall_s or reply.drip_s)

            def reply(self, reply: Reply) -> None:
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.content_type)
                self.send_header("Content-Length", str(len(reply.body)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.header_drip_s:
                    self.flush_headers()
                    while not teacher.over.wait(reply.header_drip_s):
                        self.wfile.write(b"X-Slow: 1\r\n")
                    return
                self.end_headers()
                if reply.cut or reply.stall_s:
                    self.wfile.write(reply.body[: len(reply.body) // 2])
                    teacher.over.wait(reply.stall_s)
                elif reply.drip_s:
                    for byte in reply.body:
                        if teacher.over.wait(reply.drip_s):
                            return
                        self.wfile.write(bytes([byte]))
                else:
                    self.wfile.write(reply.body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@dataclass
class Clock:
    """Time that passes only while someone sleeps."""

    now: float = 1_700_000_000.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def section(url: str, **options: Any) -> Endpoint:
    given = {"kind": "endpoint", "base_url": url, "model": "m", "api_key_env": "STILLROOM_TEST_KEY", **options}
    return Endpoint.model_validate({"max_total_tokens": 1_000_000, "timeout_s": 5.0, "max_concurrency": 1, **given})


def distiller(url: str, clock: Clock | None = None, cache: Path | None = None, **options: Any) -> EndpointDistiller:
    clock = clock or Clock()
    return EndpointDistiller(
        section=section(url, **options),
        api_key=SecretStr(KEY),
        cache=cache,
        sleep=clock.sleep,
        clock=lambda: clock.now,
    )


def answers(stage: EndpointDistiller, *instructions: str) -> list[tuple[str, str]]:
    return [(one.draft_id, one.answer) for one in stage(drafts(*instructions), RNG)]
