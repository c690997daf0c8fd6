"""Distillation as a user runs it, with a tiny random model in this process as the teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from helpers.distillation import CONFIG
from helpers.tiny import tiny_llama, tiny_tokenizer
from helpers.tool_templates import HERMES
from helpers.trained_runs import make_run
from rlsloth import __version__
from rlsloth.cli.read_config import read_config
from rlsloth.config import EnvConfig
from rlsloth.config.data import SftDataConfig
from rlsloth.config.distill import DistillConfig
from rlsloth.config.sft import SftConfig
from rlsloth.data.prompts import make_prompts
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import load_rows
from rlsloth.data.sft import sft_examples
from rlsloth.distillation import pipeline as loop
from rlsloth.errors import UserError
from rlsloth.policy.identity import hash_weights
from rlsloth.records import Completion, SamplingParams
from rlsloth.training import opening
from rlsloth.training.source import find_source

pytestmark = pytest.mark.slow

REWARD = """
LETTERS = range(67, 93)  # the ids of a to z

def letters(completion_ids, **_):
    return [sum(t in LETTERS for t in ids) / len(ids) for ids in completion_ids]

def ended(finish_reasons, **_):
    return [float(reason == "stop") for reason in finish_reasons]
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data, rewards and a configuration; it is the working directory."""
    folder = tmp_path_factory.mktemp("work")
    model = tiny_llama()
    model.lm_head.weight.data *= 4
    # Many ends, so that completions of a random model end: they are read from the folder.
    model.generation_config.eos_token_id = [2, *range(40, 60)]
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"question": f"Question {i}?", "answer": str(i), "text": "t"} for i in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


Distill = Callable[..., Path]


@pytest.fixture(scope="module")
def distill(workplace: Path) -> Distill:
    """Runs the command; returns the data set's file."""

    def run(out: str, *flags: str) -> Path:
        return loop.distill(
            read_config(DistillConfig, ["mine.yaml", "--out", out, *flags], "rlsloth distill")
        )

    return run


@pytest.fixture(scope="module")
def whole(distill: Distill) -> Path:
    """The folder of a distillation that nothing interrupted."""
    return distill("whole", "--traces.keep", "2").parent


def raw(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "raw.jsonl").read_text().splitlines()]


def undated(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in p.items() if key != "date"} for p in problems]


def test_every_row_is_verified_and_says_where_it_comes_from(whole: Path) -> None:
    rows = load_rows(str(whole))  # of the folder: raw.jsonl is no part of the split train
    problems = {problem["index"]: problem for problem in raw(whole)}
    assert len(problems) == 12
    assert 0 < len(rows) <= 24
    for row in rows:
        told = row["provenance"]
        problem = problems[told["index"]]
        sample = next(s for s in problem["samples"] if s["completion"] == row["completion"])
        assert row["prompt"] == [
            {"role": "system", "content": "Letters!"},
            {"role": "user", "content": f"Question {told['index']}?"},
        ]
        assert row["answer"] == str(told["index"])
        assert "text" not in row  # or trainers would take the rows for plain text
        assert row["source_text"] == "t"
        assert told["rewards"] == sample["scores"]
        assert told["rewards"]["letters"] >= 0.05
        assert told["finish"] == "stop"
        good = [s["scores"]["letters"] >= 0.05 and not s["truncated"] for s in problem["samples"]]
        assert told["pass_rate"] == sum(good) / 4
        assert told["tokens"] == sample["tokens"] > 0
        assert (told["environment"], told["dataset"]) == ("dataset", "data.jsonl")
        assert len(told["dataset_sha256"]) == 64
        assert told["rlsloth"] == __version__
        assert told["teacher"]["weights"] == hash_weights("model")
        assert told["teacher"]["model"] == "model"
        assert told["sampling"]["temperature"] == 0.9
        assert told["sampling"]["max_tokens"] == 16
        assert isinstance(told["sampling"]["seed"], int)
        assert told["date"].endswith("+00:00")


def test_the_folder_has_card_and_configuration(whole: Path) -> None:
    card = (whole / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["configs"][0]["data_files"][0]["path"] == "train.jsonl"
    assert f"| kept traces | {len(load_rows(str(whole)))} |" in body
    assert "| samples | 48 |" in body
    dropped = sum(int(line.split("|")[2]) for line in body.split("## Left out")[1].splitlines()
                  if line.startswith("|") and line.split("|")[2].strip().isdigit())  # fmt: skip
    assert dropped + len(load_rows(str(whole))) == 48  # each trace is kept or counted once
    saved = DistillConfig.model_validate(yaml.safe_load((whole / "config.yaml").read_text()))
    assert (saved.traces.keep, saved.out, saved.resume) == (2, whole, False)


def test_rows_are_taken_by_sft_grpo_and_trl(whole: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig as TrlConfig
    from trl import SFTTrainer

    path = str(whole / "train.jsonl")
    rows = load_rows(path)
    renderer = Renderer(tiny_tokenizer(), EnvConfig())
    examples = sft_examples(rows, SftDataConfig(), renderer, path)
    assert len(examples) == len(rows)
    for example, row in zip(examples, rows, strict=True):
        ids, mask = example.answers[0]
        assert renderer.decode(ids[mask]).strip() == row["completion"][0]["content"].strip()
    assert make_prompts(rows, EnvConfig(), path)[0].columns["answer"] == rows[0]["answer"]
    trainer = SFTTrainer(
        "model",
        args=TrlConfig("trl", report_to=[], use_cpu=True, bf16=False, max_length=None),
        train_dataset=Dataset.from_list(rows),
    )
    ours = sorted((list(e.prompt_ids), list(e.answers[0][0])) for e in examples)
    for (prompt, answer), row in zip(
        ours, sorted(trainer.train_dataset, key=lambda r: r["input_ids"]), strict=True
    ):
        assert row["input_ids"][: len(prompt) + len(answer)] == [*prompt, *answer]


def test_same_seed_same_traces_and_another_seed_others(distill: Distill, whole: Path) -> None:
    again = distill("again", "--traces.keep", "2").parent
    assert undated(raw(again)) == undated(raw(whole))
    distill("other", "--seed", "1")
    assert undated(raw(again)) != undated(raw(whole.parent / "other"))


def test_filters_alone_are_applied_anew_without_a_teacher(
    distill: Distill, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_teacher(*_: Any) -> None:
        raise AssertionError("no teacher is needed")

    before = (whole / "raw.jsonl").read_bytes()
    two = load_rows(str(whole))
    monkeypatch.setattr(loop, "_open_teacher", no_teacher)
    path = distill("whole", "--resume", "--traces.keep", "1", "--format", "parquet")
    assert path == whole / "train.parquet"
    assert not (whole / "train.jsonl").exists()  # or the folder would hold both
    one = load_rows(str(whole))
    assert len(one) < len(two)
    kept = {row["provenance"]["index"]: row for row in reversed(two)}  # the best comes first
    assert one == [kept[row["provenance"]["index"]] for row in one]
    assert (whole / "raw.jsonl").read_bytes() == before
    distill("whole", "--resume", "--traces.keep", "2")
    assert load_rows(str(whole)) == two


def test_an_interrupted_distillation_goes_on_with_the_next_problem(
    distill: Distill, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.make_problem, []

    def dies(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 6:
            raise MemoryError  # in the second chunk of four
        return real(*args)

    monkeypatch.setattr(loop, "make_problem", dies)
    with pytest.raises(MemoryError):
        distill("cut", "--traces.keep", "2")
    folder = whole.parent / "cut"
    assert len(raw(folder)) == 4  # nothing of the chunk that was not finished
    with open(folder / "raw.jsonl", "a") as file:
        file.write('{"index": 4, "pro')  # as if the machine had died while it wrote
    monkeypatch.setattr(loop, "make_problem", real)
    with pytest.raises(UserError, match="already holds traces; continue with --resume"):
        distill("cut")
    with pytest.raises(UserError, match=r"rollout.temperature 0.9, which cannot become 0.5"):
        distill("cut", "--resume", "--rollout.temperature", "0.5")
    path = distill("cut", "--traces.keep", "2", "--resume")
    assert undated(raw(folder)) == undated(raw(whole))
    dateless = [[r | {"provenance": r["provenance"] | {"date": ""}} for r in load_rows(str(p))]
                for p in (path, whole / "train.jsonl")]  # fmt: skip
    assert dateless[0] == dateless[1]
    steps = [json.loads(s)["step"] for s in (folder / "teacher/metrics.jsonl").open()]
    assert steps == [1, 2, 3]


def test_changed_data_is_refused_on_resume(distill: Distill, workplace: Path) -> None:
    (workplace / "moving.jsonl").write_text('{"question": "A?"}\n{"question": "B?"}\n')
    flags = ("--env.train", "moving.jsonl", "--env.heldout", "0", "--traces.correct-at", "0")
    distill("moved", *flags)
    (workplace / "moving.jsonl").write_text('{"question": "B?"}\n{"question": "A?"}\n')
    with pytest.raises(UserError, match="line 1 is about another problem"):
        distill("moved", *flags, "--resume")


def test_held_out_questions_are_never_put_to_the_teacher(distill: Distill, workplace: Path) -> None:
    (workplace / "held.jsonl").write_text('{"question": "Question  3?"}\n{"question": "X?"}\n')
    path = distill(
        "held", "--env.validation", "held.jsonl", "--traces.problems", "5",
        "--traces.correct-at", "0",
    )  # fmt: skip
    assert [problem["index"] for problem in raw(path.parent)] == [0, 1, 2, 4, 5]
    assert (
        "| left out before: they ask a held-out question | 1 |"
        in (path.parent / "README.md").read_text()
    )


def test_nothing_kept_says_why_and_keeps_the_traces(distill: Distill, workplace: Path) -> None:
    with pytest.raises(UserError, match=r"none of 4 traces of 1 problems was kept \(.*not verif"):
        distill("nothing", "--traces.correct-at", "2", "--traces.problems", "1")
    assert len(raw(workplace / "nothing")) == 1
    assert not list((workplace / "nothing").glob("*train*"))


def test_a_refused_start_leaves_no_folder(distill: Distill, workplace: Path) -> None:
    with pytest.raises(UserError, match=r"--eval.reward|--traces.reward"):
        distill("refused", "--traces.reward", "nonesuch")
    assert not (workplace / "refused").exists()


def test_an_adapter_teaches_and_is_named(distill: Distill, workplace: Path) -> None:
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(str(workplace / "adapter"))
    saved = workplace / "adapter/adapter_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text())
                                | {"base_model_name_or_path": "model"}))  # fmt: skip
    yaml_file = workplace / "by_adapter.yaml"
    model = {"device": "cpu"}
    yaml_file.write_text(yaml.safe_dump(CONFIG | {"model": model, "teacher": "adapter"}))
    cfg = read_config(
        DistillConfig,
        ["by_adapter.yaml", "--out", "adapted", "--traces.correct-at", "0"],
        "rlsloth distill",
    )
    for row in load_rows(str(loop.distill(cfg))):
        told = row["provenance"]["teacher"]
        assert (told["model"], told["adapter"]) == ("model", "adapter")
        assert len(told["adapter_sha256"]) == 64
    plain, adapted = raw(workplace / "whole"), raw(workplace / "adapted")
    assert plain[0]["samples"] != adapted[0]["samples"]


def test_a_run_teaches_with_what_it_trained(distill: Distill, workplace: Path) -> None:
    make_run(workplace / "run", workplace / "model")
    (workplace / "by_run.yaml").write_text(
        yaml.safe_dump(CONFIG | {"model": {"device": "cpu"}, "teacher": "run"})
    )
    cfg = read_config(
        DistillConfig, ["by_run.yaml", "--out", "by_run", "--traces.correct-at", "0"], "x"
    )
    told = load_rows(str(loop.distill(cfg)))[0]["provenance"]["teacher"]
    assert (told["run"], told["adapter"]) == ("run", "run/adapter")
    assert told["weights"] == hash_weights("model")
    # Other weights under the same name cannot continue it.
    file = workplace / "run/adapter/adapter_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    longer = cfg.model_copy(update={"resume": True, "env": cfg.env})
    cut = (workplace / "by_run/raw.jsonl").read_bytes().splitlines(keepends=True)[:4]
    (workplace / "by_run/raw.jsonl").write_bytes(b"".join(cut))
    with pytest.raises(UserError, match="line 1 was written by another teacher"):
        loop.distill(longer)


class ScriptedEngine:
    """Calls the calculator with the question's expression, then gives its answer."""

    version = 0

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        found = []
        for i, prefix in enumerate(prefixes):
            said = self._tokenizer.decode(prefix)
            result = re.search(r"calculate: (\S+?)<", said)
            asked = re.findall(r"Calculate (.+?)\.<", said)[-1]
            call = {"name": "calculate", "arguments": {"expression": asked}}
            text = (
                f"\\boxed{{{result[1]}}}"
                if result
                else f"<tool_call>{json.dumps(call)}</tool_call>"
            )
            ids = self._tokenizer(f"{text}<|im_end|>")["input_ids"]
            found.append([Completion(ids, [0.0] * len(ids), "stop", 0)] * n)
            if done is not None:
                done(i, found[-1])
        return found


def test_turns_with_tools_become_completions(
    distill: Distill, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        opening, "open_engine", lambda cfg, policy, *_, **__: ScriptedEngine(policy.tokenizer)
    )
    tiny_llama(context=4096).save_pretrained(workplace / "tools")
    tiny_tokenizer(HERMES).save_pretrained(workplace / "tools")
    path = distill("tooled", "--model.path", "tools", "--env.name", "calculator",
                   "--env.params.size", "8", "--rewards", "math_verify",
                   "--rollout.max-tokens", "200", "--traces.correct-at", "1",
                   "--env.heldout", "2")  # fmt: skip
    rows = load_rows(str(path))
    assert len(rows) == 6
    for row in rows:
        first, tool, last = row["completion"]
        assert first["content"] == ""
        call = first["tool_calls"][0]["function"]
        assert f"Calculate {call['arguments']['expression']}." in row["question"]
        assert tool == {"role": "tool", "name": "calculate", "content": row["answer"]}
        assert last["content"] == f"\\boxed{{{row['answer']}}}"
        assert json.loads(row["tools"])[0]["function"]["name"] == "calculate"
        told = row["provenance"]
        assert (told["environment"], told["dataset"]) == ("calculator", None)
        assert json.loads(told["params"]) == {"size": 8}
    renderer = Renderer(tiny_tokenizer(HERMES), EnvConfig())
    (example, *_) = sft_examples(rows, SftDataConfig(), renderer, str(path))
    ids, mask = example.answers[0]
    assert renderer.decode(ids[mask]).count("<tool_call>") == 1


def test_a_student_trains_on_the_data_set(
    distill: Distill, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--train-student", "--student.model.path", "model", "--student.steps", "2",
             "--student.data.heldout", "1", "--student.samples-per-step", "2",
             "--student.model.device", "cpu", "--traces.keep", "2")  # fmt: skip
    path = distill("taught", *flags)
    folder = workplace / "taught" / "student"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    saved = SftConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))
    assert Path(saved.data.train) == path.resolve()
    assert f"{len(load_rows(str(path))) - 1} examples, 1 held out" in capsys.readouterr().out

    distill("taught", *flags, "--resume")
    assert "taught/student: the student is trained already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"taught/student learnt another data set: pass --student"):
        distill("taught", *flags, "--resume", "--traces.keep", "1")
    with pytest.raises(UserError, match="taught is a distillation; did you mean taught/student"):
        find_source("taught")


def test_resume_needs_something_to_resume(distill: Distill, workplace: Path) -> None:
    with pytest.raises(UserError, match="no distillation in nowhere to resume"):
        distill("nowhere", "--resume")
    with pytest.raises(UserError, match="--resume needs --out"):
        loop.distill(read_config(DistillConfig, ["mine.yaml", "--resume"], "rlsloth distill"))
