"""Every distiller keeps the promises of `strategies.stages.Distiller`."""

from __future__ import annotations

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fl_app.inference import Likelihood
from fl_app.types import Draft, Origin
from strategies.distillers import AnyDistiller

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KINDS: dict[str, dict[str, Any]] = {
    "professional": {},
    "endpoint": {"base_url": "", "model": "teacher", "max_total_tokens": 10**6},
    "judge_then_rewrite": {"threshold": 0.5},
    "self_consistency": {"samples": 3},
    "selected": {"inner": {"kind": "professional"}, "keep": 1.0},
}
"""Per kind, options under which every usable answer makes a lesson; an empty address is filled in."""
INSTRUCTIONS = ["cough?", "fever?", "nothing", "a link", "END of it", "", "überall?", "cough?"]


def answer_to(asked: str) -> str:
    """Return what any teacher says, so that all are held to the same lessons."""
    return {"nothing": " ", "a link": "See https://a.example."}.get(asked, f"On {asked!r}: rest well.")


class _FakeModel:
    name = "teacher"

    def chat(self, user: str) -> str:
        return user

    def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
        return [answer_to(prompt) for prompt in prompts]

    def option_likelihood(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[Likelihood]]:
        return [
            [Likelihood(log_prob=-float(len(prompt + one) % 7), tokens=1 + len(one), bytes=1) for one in row]
            for prompt, row in zip(prompts, options, strict=True)
        ]


class _FakeLab:
    professional = _FakeModel()
    public_words: frozenset[str] = frozenset()
    directory = None


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][1]["content"].split("\n", 1)[1].rsplit("\n", 1)[0]
        choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": answer_to(asked)}}
        reply = json.dumps({"choices": [choice], "usage": {"total_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_member_of_the_union_is_tested() -> None:
    members = get_args(get_args(AnyDistiller)[0])
    assert {get_args(member.model_fields["kind"].annotation)[0] for member in members} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picked=st.lists(st.sampled_from(INSTRUCTIONS), max_size=6))
def test_distiller_contract(kind: str, url: str, picked: list[str]) -> None:
    options = {key: value or url if key == "base_url" else value for key, value in KINDS[kind].items()}
    section: Any = TypeAdapter(AnyDistiller).validate_python({"kind": kind, **options})
    stage = section.build(_FakeLab())
    origins = [Origin(round=1, method="m", code="c", stream=str(number)) for number in range(len(picked))]
    drafts = [Draft(id=f"d{n}", instruction=asked, response="", origin=origins[n]) for n, asked in enumerate(picked)]
    before = copy.deepcopy(drafts)
    lessons = stage(drafts, np.random.default_rng(0))

    assert drafts == before, "inputs are not changed"
    ids = [lesson.draft_id for lesson in lessons]
    assert ids == [draft.id for draft in drafts if draft.id in set(ids)], "in order, at most one per draft"
    by_id = {draft.id: draft for draft in drafts}
    assert all(lesson.instruction == by_id[lesson.draft_id].instruction for lesson in lessons)
    assert all(lesson.answer.strip() == lesson.answer != "" for lesson in lessons)
    assert {lesson.teacher for lesson in lessons} <= {"teacher"}
    assert {draft.instruction for draft in drafts if draft.id not in ids} <= {"nothing", "a link"}
    assert list(stage(drafts, np.random.default_rng(0))) == list(lessons), "same generator state, same lessons"
