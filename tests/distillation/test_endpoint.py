"""Distillation from an OpenAI-compatible endpoint: a real HTTP server in a thread."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlsloth.cli.read_config import read_config
from rlsloth.config.distill import DistillConfig
from rlsloth.data.rows import load_rows
from rlsloth.distillation import chat_api
from rlsloth.distillation.pipeline import distill
from rlsloth.errors import UserError

KEY = "sk-very-secret-1234"
REWARD = """
def right(completions, answer, **_):
    said = [c[-1]["content"] for c in completions]
    return [float(text.endswith(right)) for text, right in zip(said, answer, strict=True)]

def brief(completion_ids):
    return [1.0 / len(ids) for ids in completion_ids]
"""


class Server(ThreadingHTTPServer):
    """Adds two numbers as a chat model would, and can be told to fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        """Statuses of the next answers."""
        self.key: str | None = None
        self.field: str | None = None
        """Where the reasoning goes; None: into the content."""
        self.finish = "stop"
        self.seeds = True
        """Whether it heeds them."""
        self.replies: dict[str, Any] = {}
        """Put over the usual reply."""
        self.page: bytes | None = None
        """Sent in place of any reply."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "adder"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        if self.server.failures:
            status = self.server.failures.pop(0)
            return self._answer(status, {"error": {"message": f"no {self.server.key}\nnow"}})
        if body["model"] != "adder":
            return self._answer(404, {"error": {"message": "no such model"}})
        a, b = map(int, re.findall(r"\d+", body["messages"][-1]["content"]))
        # One sample in two is wrong, by its seed.
        seed = body["seed"] if self.server.seeds else 0
        said = f"{a + b + seed % 2}"
        message = {"role": "assistant", "content": f"The sum is {said}"}
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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Also the working directory, with ten questions and a reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat_api, "FIRST_WAIT", 0.01)
    rows = [{"question": f"What is {i} + {i + 1}?", "answer": str(2 * i + 1)} for i in range(10)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("reward.py").write_text(REWARD)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


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


def test_verified_answers_become_rows(server: Server) -> None:
    rows = load_rows(str(run(server, "--rollout.max-tokens", "99", "--env.system-prompt", "Add.")))
    assert len(server.asked) == 8 * 4
    assert len({body["seed"] for body in server.asked}) == 32  # or samples would repeat
    asked = server.asked[0]
    assert (asked["max_tokens"], asked["temperature"], asked["top_p"]) == (99, 1.0, 1.0)
    assert "top_k" not in asked  # OpenAI's own API refuses it
    assert 0 < len(rows) <= 8
    for row in rows:
        assert [m["role"] for m in row["prompt"]] == ["system", "user"]
        content = row["completion"][0]["content"]
        assert content == f"The sum is {row['answer']}"
        told = row["provenance"]
        assert told["teacher"]["endpoint"] == server.url
        assert told["teacher"]["served_model"] == "adder-2"
        assert told["finish"] == "stop"
        assert told["tokens"] == 7 + told["sampling"]["seed"] % 5  # of this very request
        assert told["rewards"] == {"right": 1.0}


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_put_back_in_front(server: Server, field: str) -> None:
    server.field = field
    for row in load_rows(str(run(server))):
        i = row["provenance"]["index"]
        thought = f"<think>\n{i} and {i + 1}\n</think>\n\nThe sum is {2 * i + 1}"
        assert row["completion"] == [{"role": "assistant", "content": thought}]


def test_a_reward_that_counts_tokens_gets_their_number(server: Server) -> None:
    path = run(server, "--rewards", "./reward.py:right", "./reward.py:brief")
    for row in load_rows(str(path)):
        told = row["provenance"]
        assert told["rewards"]["brief"] == pytest.approx(1 / told["tokens"])
    # The best reward is that of the shortest right answer.
    for line in Path("out/raw.jsonl").read_text().splitlines():
        problem = json.loads(line)
        right = [s["tokens"] for s in problem["samples"] if s["scores"]["right"] == 1]
        kept = [r for r in load_rows(str(path)) if r["provenance"]["index"] == problem["index"]]
        assert [r["provenance"]["tokens"] for r in kept] == ([min(right)] if right else [])


def test_a_server_that_always_answers_alike_is_named(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    run(server)
    assert "the same" not in capsys.readouterr().out
    server.seeds = False
    run(server, "--out", "alike", "--traces.keep", "2")
    assert capsys.readouterr().out.count("all 4 samples of each problem are the same") == 1


def test_answers_cut_off_are_never_kept(server: Server) -> None:
    server.finish = "length"
    with pytest.raises(UserError, match=r"none of 32 traces of 8 problems was kept \(cut off 32\)"):
        run(server)
    assert len(Path("out/raw.jsonl").read_text().splitlines()) == 8
    assert not Path("out/train.jsonl").exists()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(server: Server, status: int) -> None:
    server.failures = [status, status]
    run(server)
    assert len(server.asked) == 34


def test_a_lasting_failure_is_one_line_and_leaves_the_chunks_before(server: Server) -> None:
    run(server, "--traces.problems", "3", "--traces.keep", "1")
    server.failures = [429] * 99
    flags = ("--resume", "--endpoint.retries", "2")
    with pytest.raises(UserError, match="answers 429") as caught:
        run(server, *flags)
    text = str(caught.value)
    assert server.url in text
    assert "3 times" in text
    assert "\n" not in text
    assert len(Path("out/raw.jsonl").read_text().splitlines()) == 3
    server.failures = []
    server.asked.clear()
    run(server, *flags)
    problems = [json.loads(line) for line in Path("out/raw.jsonl").read_text().splitlines()]
    assert len({problem["index"] for problem in problems}) == 8
    done = [problem["prompt"] for problem in problems[:3]]
    assert server.asked
    assert not [body for body in server.asked if body["messages"] in done]  # none is asked twice


def test_the_key_is_sent_and_written_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    monkeypatch.setenv("MY_KEY", KEY)
    run(server, "--endpoint.key-variable", "MY_KEY")
    assert server.keys == [f"Bearer {KEY}"] * 32
    files = [path for path in Path(".").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_refused_key_is_one_line_without_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "another"
    monkeypatch.setenv("MY_KEY", KEY)
    with pytest.raises(UserError, match=r"answers 401.*the key in MY_KEY") as caught:
        run(server, "--endpoint.key-variable", "MY_KEY")
    assert KEY not in str(caught.value)
    with pytest.raises(UserError, match="a request without a key"):
        run(server)
    assert not Path("out").exists()  # a start that is refused leaves nothing


def test_an_unset_key_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match=r"variable MY_KEY .* is not set"):
        run(server, "--endpoint.key-variable", "MY_KEY")


def test_an_unreachable_server_is_one_line_at_once(server: Server) -> None:
    with pytest.raises(UserError, match=r"cannot reach http://127.0.0.1:9/v1 .*refused"):
        run(server, "--endpoint.url", "http://127.0.0.1:9/v1")


def test_an_unknown_model_is_one_line(server: Server) -> None:
    with pytest.raises(UserError, match=r"answers 404 .*no such model.*ader; did you mean 'adder'"):
        run(server, "--endpoint.model", "ader")


@pytest.mark.parametrize(("status", "hint"), [(404, "often /v1"), (400, "endpoint section")])
def test_a_request_that_is_refused_is_not_repeated(server: Server, status: int, hint: str) -> None:
    server.failures = [status] * 99
    with pytest.raises(UserError, match=f"answers {status} .*: .*{hint}") as caught:
        run(server, "--endpoint.parallel", "1")
    assert len(server.asked) == 1
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"choices": []}, "without what a chat completion has"),
        ({"usage": None}, "without what a chat completion has"),
        ({"choices": [{"message": {"content": [1]}}]}, "content that is no text"),
        ({"choices": [{"message": {"reasoning": {"a": 1}}}]}, "content that is no text"),
        ({"usage": {"completion_tokens": 1e999}}, "completion_tokens inf, which counts no answer"),
        ({"usage": {"completion_tokens": 10**9}}, "completion_tokens 1000000000, which counts"),
        ({"usage": {"completion_tokens": -1}}, "completion_tokens -1, which counts no answer"),
    ],
)
def test_what_is_no_chat_completion_is_one_line(
    server: Server, reply: dict[str, Any], words: str
) -> None:
    server.replies = reply
    with pytest.raises(UserError, match=words):
        run(server)


@pytest.mark.parametrize(
    "page", [b"<html>Welcome</html>", b"data: {}\n\n", b"\x1f\x8b\xff", b"[1]", b"[" * 10**5]
)
def test_a_web_page_is_one_line(server: Server, page: bytes) -> None:
    """What a wrong URL mostly leads to."""
    server.page = page
    with pytest.raises(UserError, match=r"no(t a)? JSON object: .*its end is often /v1") as caught:
        run(server)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_half_of_a_surrogate_pair_spoils_no_file(server: Server) -> None:
    message = {"role": "assistant", "content": "sum \ud800 is"}
    server.replies = {"choices": [{"message": message, "finish_reason": "stop"}]}
    path = run(server, "--traces.correct-at", "0")
    assert all("sum \ufffd is" in r["completion"][0]["content"] for r in load_rows(str(path)))


@pytest.mark.parametrize("key", ["sk-abc\nx", "sk\u20ac", "sk abc"])
def test_what_is_no_key_is_not_shown(
    server: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match=r"MY_KEY .* holds what is no key") as caught:
        run(server, "--endpoint.key-variable", "MY_KEY")
    assert "sk" not in str(caught.value)


def test_further_fields_are_sent_and_told(server: Server) -> None:
    path = run(server, "--endpoint.params", "reasoning_effort", "high")
    assert {body["reasoning_effort"] for body in server.asked} == {"high"}
    rows = load_rows(str(path))
    told = {row["provenance"]["teacher"]["params"] for row in rows}
    assert told == {'{"reasoning_effort": "high"}'}
    with pytest.raises(UserError, match=r"endpoint.params cannot set model, temperature"):
        run(server, "--endpoint.params", "temperature", "0.2", "model", "x")


def test_changed_data_and_rewards_are_refused_on_resume(server: Server) -> None:
    few = ("--traces.problems", "3")
    run(server, *few)
    more = ("--traces.problems", "6", "--resume")
    for name in ("reward.py", "data.jsonl"):
        text = Path(name).read_text()
        Path(name).write_text(text + ("# other\n" if name == "reward.py" else "\n"))
        with pytest.raises(UserError, match=r"line 1 is of other data or rewards \(a file has ch"):
            run(server, *more)
        Path(name).write_text(text)
    run(server, *more)


def test_a_choice_that_fails_leaves_the_data_set_and_its_configuration(server: Server) -> None:
    run(server)
    saved = Path("out/config.yaml").read_text()
    with pytest.raises(UserError, match="was kept"):
        run(server, "--resume", "--traces.min-tokens", "1000", "--traces.max-tokens", "2000")
    assert Path("out/config.yaml").read_text() == saved
    assert Path("out/train.jsonl").exists()


def test_a_moved_folder_goes_on(server: Server) -> None:
    run(server, "--traces.problems", "3")
    Path("out").rename("moved")
    argv = ["moved/config.yaml", "--resume", "--traces.problems", "6"]
    path = distill(read_config(DistillConfig, argv, "rlsloth distill"))
    assert path == Path("moved/train.jsonl")
    kept = {row["provenance"]["index"] for row in load_rows(str(path))}
    assert min(kept) < 3 <= max(kept)


def test_tools_need_a_local_teacher(server: Server) -> None:
    with pytest.raises(UserError, match="calculator has tools, which only a local teacher"):
        run(server, "--env.name", "calculator", "--env.params.size", "20")


def test_plain_text_to_continue_is_refused(server: Server) -> None:
    Path("plain.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    with pytest.raises(UserError, match="prompt 1 is plain text to continue"):
        run(server, "--env.train", "plain.jsonl", "--env.heldout", "0")


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.failures = [302] * 99  # the key would go to another host
    with pytest.raises(UserError, match="answers 302"):
        run(server)
