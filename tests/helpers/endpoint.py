"""Shared by the tests of an endpoint: a chat API on a real HTTP server, and the command."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rlsloth.cli.read_config import read_config
from rlsloth.config.distill import DistillConfig
from rlsloth.distillation.pipeline import distill

KEY = "sk-very-secret-1234"
REWARD = """
def right(completions, answer, **_):
    texts = [c[-1]["content"] for c in completions]
    return [float(text.endswith(right)) for text, right in zip(texts, answer, strict=True)]

def brief(completion_ids):
    return [1.0 / len(ids) for ids in completion_ids]
"""


class Server(ThreadingHTTPServer):
    """Adds two numbers as a chat model would, and fails on demand."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        """Statuses of the next answers."""
        self.key: str | None = None
        self.field: str | None = None
        """The field that takes the reasoning; None: the content."""
        self.finish = "stop"
        self.seeds = True
        """Whether it uses the seeds of requests."""
        self.replies: dict[str, Any] = {}
        """Fields that replace those of the usual reply."""
        self.page: bytes | None = None
        """Sent in place of any reply."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """Say nothing: a run that stops ends its requests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "adder"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        if self.server.failures:
            status = self.server.failures.pop(0)
            return self._answer(status, {"error": {"message": f"no {self.server.key}\nnow"}})
        if body["model"] != "adder":
            return self._answer(404, {"error": {"message": "no such model"}})
        a, b = map(int, re.findall(r"\d+", body["messages"][-1]["content"]))
        # One sample in two is wrong, by its seed.
        seed = body["seed"] if self.server.seeds else 0
        total = f"{a + b + seed % 2}"
        message = {"role": "assistant", "content": f"The sum is {total}"}
        if self.server.field:
            message[self.server.field] = f"{a} and {b}"
        choice = {"index": 0, "message": message, "finish_reason": self.server.finish}
        usage = {"prompt_tokens": 5, "completion_tokens": 7 + body["seed"] % 5}
        reply = {"model": "adder-2", "choices": [choice], "usage": usage}
        self._answer(200, reply | self.server.replies)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        wanted = self.server.key and f"Bearer {self.server.key}"
        if wanted and self.headers["Authorization"] != wanted:
            status, body = 401, {"error": {"message": f"wrong key {self.headers['Authorization']}"}}
        data = self.server.page or json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def run(server: Server, *flags: str) -> Path:
    usual = {
        "--endpoint.url": server.url,
        "--endpoint.model": "adder",
        "--endpoint.parallel": "4",
        "--env.train": "data.jsonl",
        "--env.heldout": "2",
        "--out": "out",
        "--rewards": "./reward.py:right",
        "--reward.workers": "1",
        "--traces.samples": "4",
        "--traces.chunk": "3",
    }
    argv = [word for pair in usual.items() if pair[0] not in flags for word in pair]
    return distill(read_config(DistillConfig, [*argv, *flags], "rlsloth distill"))
