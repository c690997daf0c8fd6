"""Local teachers: an adapter, a run, and turns with tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from helpers.distillation import CONFIG, Distill, raw
from helpers.tiny import tiny_llama, tiny_tokenizer
from helpers.tool_templates import HERMES
from helpers.trained_runs import make_run
from rlsloth.cli.read_config import read_config
from rlsloth.config import EnvConfig
from rlsloth.config.data import SftDataConfig
from rlsloth.config.distill import DistillConfig
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import load_rows
from rlsloth.data.sft import sft_examples
from rlsloth.distillation import pipeline
from rlsloth.errors import UserError
from rlsloth.policy.identity import hash_weights
from rlsloth.records import Completion, SamplingParams
from rlsloth.training import collector

pytestmark = pytest.mark.slow


def test_an_adapter_teaches_and_is_named(whole: Path, workplace: Path) -> None:
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
    for row in load_rows(str(pipeline.distill(cfg))):
        origin = row["provenance"]["teacher"]
        assert (origin["model"], origin["adapter"]) == ("model", "adapter")
        assert len(origin["adapter_sha256"]) == 64
    plain, adapted = raw(whole), raw(workplace / "adapted")
    assert plain[0]["samples"] != adapted[0]["samples"]


def test_a_run_teaches_with_what_it_trained(distill: Distill, workplace: Path) -> None:
    make_run(workplace / "run", workplace / "model")
    (workplace / "by_run.yaml").write_text(
        yaml.safe_dump(CONFIG | {"model": {"device": "cpu"}, "teacher": "run"})
    )
    cfg = read_config(
        DistillConfig, ["by_run.yaml", "--out", "by_run", "--traces.correct-at", "0"], "x"
    )
    origin = load_rows(str(pipeline.distill(cfg)))[0]["provenance"]["teacher"]
    assert (origin["run"], origin["adapter"]) == ("run", "run/adapter")
    assert origin["weights"] == hash_weights("model")
    # Other weights under the same name cannot continue it.
    file = workplace / "run/adapter/adapter_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    longer = cfg.model_copy(update={"resume": True, "env": cfg.env})
    cut = (workplace / "by_run/raw.jsonl").read_bytes().splitlines(keepends=True)[:4]
    (workplace / "by_run/raw.jsonl").write_bytes(b"".join(cut))
    with pytest.raises(UserError, match="line 1 was sampled from another teacher"):
        pipeline.distill(longer)


class ScriptedEngine:
    """Calls the calculator with the question's expression, then repeats its result."""

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
            prompt = self._tokenizer.decode(prefix)
            result = re.search(r"calculate: (\S+?)<", prompt)
            expression = re.findall(r"Calculate (.+?)\.<", prompt)[-1]
            call = {"name": "calculate", "arguments": {"expression": expression}}
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
        collector, "open_engine", lambda cfg, policy, *_, **__: ScriptedEngine(policy.tokenizer)
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
        origin = row["provenance"]
        assert (origin["environment"], origin["dataset"]) == ("calculator", None)
        assert json.loads(origin["params"]) == {"size": 8}
    renderer = Renderer(tiny_tokenizer(HERMES), EnvConfig())
    (example, *_) = sft_examples(rows, SftDataConfig(), renderer, str(path))
    ids, mask = example.answers[0]
    assert renderer.decode(ids[mask].tolist()).count("<tool_call>") == 1
