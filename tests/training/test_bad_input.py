"""A user's mistakes, through the command: status 2 and a line saying what, where, what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli

REWARD = """
def ones(completions, **_): return [float(i) for i, _ in enumerate(completions)]
def long(completions, **_): return [1.0] * (len(completions) + 1)
def raises(completions, **_): raise ValueError("no digits here")
def wants_gold(completions, gold, **_): return [0.0] * len(completions)
"""
CONFIG = {
    "steps": 1,
    "prompts_per_step": 2,
    "group_size": 2,
    "rewards": ["./reward.py:ones"],
    "model": {"path": "model", "device": "cpu"},
    "lora": {"rank": 2},
    "env": {"train": "data.jsonl", "heldout": 2},
    "rollout": {"max_tokens": 4},
    "reward": {"workers": 1},
    "eval": {"at_start": False, "at_end": False},
    "run": {"save_every": 0, "show_samples": 0},
}


def write_rows(path: str, *rows: dict[str, Any]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which everything is right; it is the working directory, offline."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_llama(context=128).save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_rows("data.jsonl", *({"question": f"Question {i}?"} for i in range(8)))
        Path("reward.py").write_text(REWARD)
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
        yield folder


@pytest.fixture
def refused(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs the command; it must leave with 2 and one line on stderr that holds all the words."""

    def check(command: str, *words: str, new: bool = True) -> None:
        args = command.split()
        if new:
            args += ["--run.dir", "refused"]
        capfd.readouterr()
        assert cli.main([args[0], "config.yaml", *args[1:]]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ")
        for word in words:
            assert word in line
        assert not Path("refused").exists()  # made by the start that failed

    return check


def test_all_is_well_otherwise(workplace: Path) -> None:
    assert cli.main(["grpo", "config.yaml", "--run.dir", "fine"]) == 0
    (row,) = map(json.loads, Path("fine/metrics.jsonl").read_text().splitlines())
    assert row["reward"] == 0.5


# Data


def test_missing_prompt_column(refused) -> None:
    write_rows("columns.jsonl", {"qestion": "1 + 1?", "gold": "2"})
    refused(
        "grpo --env.train columns.jsonl",
        "columns.jsonl",
        "prompt, question, problem",
        "--env.prompt-column",
        "qestion, gold",
    )


def test_named_prompt_column_is_missing(refused) -> None:
    refused(
        "grpo --env.prompt-column questoin",
        "data.jsonl has no column 'questoin'",
        "did you mean 'question'?",
    )


def test_column_that_a_reward_needs_is_missing(refused) -> None:
    refused(
        "grpo --rewards ./reward.py:wants_gold", "'wants_gold'", "needs a column 'gold'", "question"
    )


def test_empty_dataset(refused) -> None:
    Path("empty.jsonl").write_text("")
    refused("grpo --env.train empty.jsonl", "dataset 'empty.jsonl' (split 'train') has no rows")


def test_dataset_that_is_not_there(refused) -> None:
    refused("grpo --env.train dat.jsonl", "no data file dat.jsonl", "did you mean 'data.jsonl'?")


def test_malformed_row(refused) -> None:
    Path("torn.jsonl").write_text('{"question": "a"}\n{"question": \n')
    refused("grpo --env.train torn.jsonl", "torn.jsonl line 2")


def test_empty_prompt(refused) -> None:
    write_rows("blank.jsonl", {"question": "a"}, {"question": " "})
    refused("grpo --env.train blank.jsonl", "blank.jsonl row 2, column 'question'", "empty")


def test_hub_dataset_offline(refused, monkeypatch) -> None:
    offline(monkeypatch)
    refused(
        "grpo --env.train some-org/some-data",
        "'some-org/some-data'",
        "pass a .jsonl, .json or .parquet file",
    )


def test_prompt_longer_than_the_context(refused) -> None:
    rows = [{"question": "short"}, {"question": "long " * 40}]
    write_rows("long.jsonl", *rows)
    refused(
        "grpo --env.train long.jsonl --env.heldout 0",
        "prompt 2 has",
        "fills the model's context of 128",
        "--model.max-context",
    )


def test_held_out_prompt_longer_than_the_context(refused) -> None:
    """Refused before training, not by the evaluation after it."""
    write_rows("heldout.jsonl", {"question": "fine"}, {"question": "long " * 40})
    command = "grpo --env.validation heldout.jsonl --eval.at-end"
    refused(command, "prompt 2 has", "context of 128", "--model.max-context")


def test_prompt_and_completion_longer_than_a_microbatch(refused) -> None:
    command = "grpo --tokens-per-microbatch 40 --rollout.max-tokens 30"
    refused(command, "--tokens-per-microbatch 40", "raise it to")


def test_nothing_to_evaluate_on(refused) -> None:
    """Refused before training, not by the evaluation after it."""
    command = "grpo --env.heldout 0 --eval.at-end"
    refused(command, "no held-out problems", "--env.validation FILE", "--env.heldout")


def test_more_held_out_than_there_is(refused) -> None:
    refused("grpo --env.heldout 8", "--env.heldout 8 leaves nothing to train on", "8 distinct")


# Rewards and environments


def test_unknown_reward(refused) -> None:
    refused("grpo --rewards math_verfy", "'math_verfy'", "did you mean 'math_verify'?")


def test_no_reward(refused) -> None:
    refused("grpo --rewards", "--rewards is empty", "--rewards NAME", "rlsloth rewards list")


def test_unknown_function_in_a_reward_file(refused) -> None:
    refused("grpo --rewards ./reward.py:one", "no 'one'", "did you mean 'ones'?")


def test_unknown_eval_reward(refused) -> None:
    refused("grpo --eval.reward two", "--eval.reward 'two' is not among --rewards ones")


def test_unknown_environment(refused) -> None:
    refused("grpo --env.name calculater", "'calculater'", "did you mean 'calculator'?")


@pytest.mark.parametrize(("name", "kind"), [("long", "wrong length"), ("raises", "raised")])
def test_a_failing_reward_is_counted_and_training_goes_on(name, kind, workplace) -> None:
    rewards = ["--rewards", "./reward.py:ones", f"./reward.py:{name}"]
    assert cli.main(["grpo", "config.yaml", *rewards, "--run.dir", name]) == 0
    (row,) = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
    assert row[f"rewards/{name}/failures"] == 4
    assert row["rewards/ones/failures"] == 0
    assert row["reward"] is None  # a failure is never a zero
    assert f"{name} on 4 of 4 ({kind} 4" in Path(name, "log.txt").read_text()


# Model


def copy_model(name: str, *, without: str = "", **tokenizer: Any) -> None:
    Path(name).mkdir()
    for file in Path("model").iterdir():
        if not (without and without in file.name):
            (Path(name) / file.name).write_bytes(file.read_bytes())
    if tokenizer:
        tiny_tokenizer(**tokenizer).save_pretrained(name)


def test_model_without_a_tokenizer(refused) -> None:
    copy_model("no_tokenizer", without="tokenizer")
    refused("grpo --model.path no_tokenizer", "no_tokenizer: the folder has no tokenizer", "copy")


def test_model_without_a_chat_template(refused) -> None:
    copy_model("no_template", without="chat_template", chat_template=None)
    refused("grpo --model.path no_template", "no chat template", "instruct model", "`prompt`")


def test_model_that_is_not_there(refused, monkeypatch) -> None:
    offline(monkeypatch)
    refused("grpo --model.path ./modle", "./modle", "--model.path")


def test_hub_model_offline(refused, monkeypatch) -> None:
    offline(monkeypatch)
    refused(
        "grpo --model.path some-org/some-model",
        "--model.path some-org/some-model: cannot load this model from the hub",
        "pass a folder or a GGUF file when offline",
    )


def test_not_a_gguf_file(refused) -> None:
    Path("garbage.gguf").write_bytes(bytes(range(256)) * 10)
    refused("grpo --model.path garbage.gguf", "garbage.gguf", "GGUF")


def test_gguf_file_that_is_not_there(refused) -> None:
    refused("grpo --model.path absent.gguf", "--model.path absent.gguf: there is no such file")


def test_folder_without_weights(refused) -> None:
    copy_model("no_weights", without="safetensors")
    refused("grpo --model.path no_weights", "--model.path no_weights", "safetensors")


def test_adapter_that_is_not_there(refused) -> None:
    refused("grpo --model.adapter nowhere", "--model.adapter nowhere", "adapter_config.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the device exists")
def test_device_that_is_not_there(refused) -> None:
    refused("grpo --model.device cuda", "--model.device cuda", "rlsloth doctor")


def test_targets_that_match_nothing(refused) -> None:
    wrong = "--lora.targets q_porj: no module of model has this name"
    refused("grpo --lora.targets q_porj", wrong)
    refused("grpo --lora.targets all-linear q_porj", wrong)


def test_model_quantised_by_others(refused) -> None:
    copy_model("gptq")
    config = json.loads(Path("gptq/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    Path("gptq/config.json").write_text(json.dumps(config))
    refused("grpo --model.path gptq", "--model.path gptq", "with gptq", "--model.precision nf4")


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, for libraries that have read it already."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


# Configuration


def test_group_size_1(refused) -> None:
    refused("grpo --group-size 1", "--group-size", "2")


def test_typo_in_a_flag(refused) -> None:
    refused("grpo --optim.learning_rat 1", "--optim.learning_rat")
    refused("grpo --optim.warmup_step 1", "did you mean '--optim.warmup-steps'?")


def test_typo_in_a_yaml_key(refused) -> None:
    Path("typo.yaml").write_text("optim:\n  warmup_step: 3\n")
    refused("grpo typo.yaml", "typo.yaml", "optim.warmup_step", "did you mean", "warmup_steps")


def test_value_of_the_wrong_kind(refused) -> None:
    refused("grpo --optim.lr fast", "--optim.lr", "fast", "number")


# Run folder


def test_a_folder_that_was_there_stays(workplace: Path, capfd) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    assert cli.main(["grpo", "config.yaml", "--run.dir", "mine", "--model.path", "./modle"]) == 2
    assert Path("mine/notes.txt").read_text() == "keep"
    assert "stopped by UserError" in Path("mine/log.txt").read_text()
    printed = capfd.readouterr()
    assert (printed.out + printed.err).count("modle:") <= 1
    assert "stopped by" not in printed.out


def test_files_in_the_way(refused, workplace: Path) -> None:
    Path("file").write_text("")
    refused("grpo --run.dir file", "--run.dir file is a file", new=False)
    refused("grpo --run.dir file/in", "file/in: Not a directory", new=False)
    refused(f"grpo --run.dir {'n' * 300}", "File name too long", new=False)


def test_damaged_files_of_a_run(refused, workplace: Path) -> None:
    assert cli.main(["grpo", "config.yaml", "--run.dir", "hurt"]) == 0
    saved = Path("hurt/config.yaml").read_bytes()
    command = "grpo --run.dir hurt --run.resume --steps 2"
    for damage in (b"", b"steps: [", b"\xff", b"steps: 0"):
        Path("hurt/config.yaml").write_bytes(damage)
        refused(command, "hurt/config.yaml cannot be read", new=False)
        assert Path("hurt/config.yaml").read_bytes() == damage
    Path("hurt/config.yaml").write_bytes(saved)
    metrics = Path("hurt/metrics.jsonl").read_bytes()
    for damage in (b"{", b"3", b'{"reward": 1}', b"\xff"):
        Path("hurt/metrics.jsonl").write_bytes(metrics + damage + b"\n" + metrics)
        refused(command, "hurt/metrics.jsonl line 2 is damaged", new=False)
    Path("hurt/metrics.jsonl").write_bytes(metrics)
    Path("hurt/samples/step_x.parquet").write_text("stray")
    Path("hurt/samples/step_00001.parquet").write_text("damaged")
    assert cli.main(["grpo", "config.yaml", *command.split()[1:]]) == 0


def test_folder_with_a_run(refused, workplace: Path) -> None:
    assert cli.main(["grpo", "config.yaml", "--run.dir", "done"]) == 0
    before = Path("done/metrics.jsonl").read_bytes()
    refused(
        "grpo --run.dir done", "done already holds a run", "--run.resume", "--run.dir", new=False
    )
    assert Path("done/metrics.jsonl").read_bytes() == before


def test_folder_in_use(refused, workplace: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlsloth.config import *\n"
        "from rlsloth.run.folder import open_folder\n"
        "folder, lock = open_folder(RunConfig(dir=Path('busy')), ModelConfig(), Path('runs'))\n"
        "print(flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        holder.stdout.readline()
        refused(
            "grpo --run.dir busy",
            f"busy is in use by process {holder.pid}",
            "pass another --run.dir",
            new=False,
        )
        holder.stdin.close()
    assert cli.main(["grpo", "config.yaml", "--run.dir", "busy"]) == 0


def test_nothing_to_resume(refused) -> None:
    refused("grpo --run.dir never --run.resume", "no run in never to resume", new=False)
    refused("grpo --run.resume", "--run.resume needs --run.dir", new=False)


def test_eval_of_an_unfinished_run(refused, workplace: Path) -> None:
    Path("half").mkdir()
    Path("half/config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": {"adapter": None}}))
    refused("eval --run.dir half", "half has no adapter yet", "--model.adapter", new=False)


def test_eval_of_a_run_that_was_moved(workplace: Path, capfd) -> None:
    assert cli.main(["grpo", "config.yaml", "--run.dir", "first"]) == 0
    Path("first").rename("moved")
    command = ["eval", "moved/config.yaml", "--eval.problems", "1", "--eval.samples", "2"]
    assert cli.main(command) == 0
    assert "continuing moved/adapter" in capfd.readouterr().out
