"""Distillation from an OpenAI-compatible endpoint: a real HTTP server in a thread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.endpoint import Server, run
from rlsloth.cli.read_config import read_config
from rlsloth.config.distill import DistillConfig
from rlsloth.data.rows import load_rows
from rlsloth.distillation.pipeline import distill
from rlsloth.errors import UserError

pytestmark = pytest.mark.slow


def test_verified_answers_become_rows(server: Server) -> None:
    rows = load_rows(str(run(server, "--rollout.max-tokens", "99", "--env.system-prompt", "Add.")))
    assert len(server.requests) == 8 * 4
    assert len({body["seed"] for body in server.requests}) == 32  # or samples would repeat
    first = server.requests[0]
    assert (first["max_tokens"], first["temperature"], first["top_p"]) == (99, 1.0, 1.0)
    assert "top_k" not in first  # OpenAI's own API refuses it
    assert 0 < len(rows) <= 8
    for row in rows:
        assert [m["role"] for m in row["prompt"]] == ["system", "user"]
        content = row["completion"][0]["content"]
        assert content == f"The sum is {row['answer']}"
        origin = row["provenance"]
        assert origin["teacher"]["endpoint"] == server.url
        assert origin["teacher"]["served_model"] == "adder-2"
        assert origin["finish"] == "stop"
        assert origin["tokens"] == 7 + origin["sampling"]["seed"] % 5  # of this very request
        assert origin["rewards"] == {"right": 1.0}


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
        origin = row["provenance"]
        assert origin["rewards"]["brief"] == pytest.approx(1 / origin["tokens"])
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


def test_a_lasting_failure_is_one_line_and_leaves_the_chunks_before(server: Server) -> None:
    run(server, "--traces.problems", "3", "--traces.keep", "1")
    server.failures = [429] * 99
    flags = ("--resume", "--endpoint.retries", "2")
    with pytest.raises(UserError, match="answers 429") as caught:
        run(server, *flags)
    text = str(caught.value)
    assert server.url in text
    assert "3 tries" in text
    assert "\n" not in text
    assert len(Path("out/raw.jsonl").read_text().splitlines()) == 3
    server.failures = []
    server.requests.clear()
    run(server, *flags)
    problems = [json.loads(line) for line in Path("out/raw.jsonl").read_text().splitlines()]
    assert len({problem["index"] for problem in problems}) == 8
    done = [problem["prompt"] for problem in problems[:3]]
    assert server.requests
    assert not [body for body in server.requests if body["messages"] in done]  # none is sent twice


def test_half_of_a_surrogate_pair_spoils_no_file(server: Server) -> None:
    message = {"role": "assistant", "content": "sum \ud800 is"}
    server.replies = {"choices": [{"message": message, "finish_reason": "stop"}]}
    path = run(server, "--traces.correct-at", "0")
    assert all("sum \ufffd is" in r["completion"][0]["content"] for r in load_rows(str(path)))


def test_further_fields_are_sent_and_recorded(server: Server) -> None:
    path = run(server, "--endpoint.params", "reasoning_effort", "high")
    assert {body["reasoning_effort"] for body in server.requests} == {"high"}
    rows = load_rows(str(path))
    origin = {row["provenance"]["teacher"]["params"] for row in rows}
    assert origin == {'{"reasoning_effort": "high"}'}
    with pytest.raises(UserError, match=r"endpoint.params cannot set model, temperature"):
        run(server, "--endpoint.params", "temperature", "0.2", "model", "x")


def test_changed_data_and_rewards_are_refused_on_resume(server: Server) -> None:
    few = ("--traces.problems", "3")
    run(server, *few)
    more = ("--traces.problems", "6", "--resume")
    for name in ("reward.py", "data.jsonl"):
        text = Path(name).read_text()
        Path(name).write_text(text + ("# other\n" if name == "reward.py" else "\n"))
        with pytest.raises(
            UserError, match=r"line 1 was made with another dataset or reward \(a file has ch"
        ):
            run(server, *more)
        Path(name).write_text(text)
    run(server, *more)


def test_a_choice_that_fails_leaves_the_dataset_and_its_configuration(server: Server) -> None:
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
    with pytest.raises(UserError, match=r"calculator has tools .*local teacher.*--endpoint.url"):
        run(server, "--env.name", "calculator", "--env.params.size", "20")


def test_plain_text_to_continue_is_refused(server: Server) -> None:
    Path("plain.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    with pytest.raises(UserError, match="prompt 1 is plain text to continue"):
        run(server, "--env.train", "plain.jsonl", "--env.heldout", "0")
