"""Tokens without an embedding are refused by row and token, before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow

QUIET = [
    "--steps", "1", "--eval.at-start", "false", "--eval.at-end", "false", "--model.device", "cpu",
    "--run.dir", "run", "--model.path", "model",
]  # fmt: skip


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<ans>"]})
    tiny_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.main([*words, *QUIET]) == 2
    output = capsys.readouterr()
    assert "loading model" not in output.out or words[0] == "grpo"
    (line,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
    return line


def rows(name: str, values: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(value) + "\n" for value in values))


def chat(answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def test_supervised_examples(capsys: pytest.CaptureFixture[str]) -> None:
    rows("d.jsonl", [chat("4")] * 8 + [chat("<ans>4")])
    line = refusal(capsys, "sft", "--data.train", "d.jsonl", "--data.heldout", "0")
    assert "d.jsonl row 9: token '<ans>' has id 259" in line
    assert "only 259 embeddings" in line


def test_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    rows("d.jsonl", [{"question": f"{i}"} for i in range(5)] + [{"question": "<ans>?"}])
    Path("r.py").write_text("def score(completions, **_):\n    return [1.0] * len(completions)\n")
    argv = ["grpo", "--env.train", "d.jsonl", "--env.heldout", "0", "--rewards", "r.py:score"]
    line = refusal(capsys, *argv, "--rollout.engine", "transformers")
    assert "token '<ans>' has id 259" in line
    assert "prompt 6" in line


ECHO = """
from rlsloth import Episode, Prompt, Reply
from rlsloth.environments.protocol import SingleTurn


class Answer(Episode):
    def step(self, message):
        return Reply([{"role": "user", "content": "The <ans>wer is 4."}], reward=0.0)


class Echo(SingleTurn):
    def __init__(self, cfg, seed):
        prompts = [Prompt(i, ({"role": "user", "content": str(i)},), {}) for i in range(4)]
        super().__init__("echo", prompts, [], ("environment",), single_turn=False)

    def start(self, prompt):
        return Answer()
"""


def test_replies_of_an_environment(capsys: pytest.CaptureFixture[str]) -> None:
    Path("e.py").write_text(ECHO)
    argv = ["grpo", "--env.name", "e.py:Echo", "--rollout.engine", "transformers"]
    argv += ["--rollout.max-tokens", "200", "--group-size", "4", "--prompts-per-step", "4"]
    line = refusal(capsys, *argv)
    assert "reply: token '<ans>' has id 259" in line
    assert "e.py" in line or "echo" in line
