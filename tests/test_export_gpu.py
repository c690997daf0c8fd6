"""On a CUDA GPU in bf16: a warm start's exported adapter in plain PEFT and in a stock vLLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import unpack_smollm2

from rlsloth import cli
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.policy import Policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
README = Path(__file__).parents[1] / "README.md"
LIMIT = 0.02
"""Mean |difference of log-probs| in nats a token."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[list[int]], Any]:
    """Base, exported adapter, texts as token ids, and the trainer's log-probs of them."""
    folder = tmp_path_factory.mktemp("warm")
    base = unpack_smollm2(folder / "base")
    paragraphs = [p for p in README.read_text().split("\n\n") if 200 < len(p) < 2000]
    (folder / "d.jsonl").write_text("\n".join(json.dumps({"text": p}) for p in paragraphs))
    run = ["sft", "--model.path", str(base), "--data.train", str(folder / "d.jsonl")]
    run += ["--data.heldout", "4", "--steps", "20", "--samples-per-step", "8"]
    run += ["--run.dir", str(folder / "run"), "--run.show-samples", "0"]
    assert cli.main(run) == 0
    assert cli.main(["export", str(folder / "run"), "--out", str(folder / "adapter")]) == 0
    policy = Policy.load(
        ModelConfig(path=str(base), adapter=folder / "run" / "adapter"),
        LoraConfig(),
        OptimConfig(),
        temperature=1.0,
        total_updates=1,
    )
    texts = [policy.tokenizer(p)["input_ids"][:400] for p in paragraphs[:12]]
    from rlsloth.dataset.example import make_example
    from rlsloth.dataset.turns import Answer
    from rlsloth.packing import to_device
    from rlsloth.sft import pack_examples

    examples = [
        make_example(i, "", [Answer(ids[:1], ids[1:], [True] * (len(ids) - 1))])
        for i, ids in enumerate(texts)
    ]
    micro = to_device(pack_examples(examples, 10**6).microbatches[0], policy.device)
    order = [group for group, _ in micro.source]
    scored = policy.eval_logprobs(micro).cpu().split([len(texts[i]) - 1 for i in order])
    want = dict(zip(order, scored, strict=True))
    return base, folder / "adapter", texts, [want[i] for i in range(len(texts))]


def gap(got: list[Any], want: list[Any], what: str) -> float:
    difference = (torch.cat(got).float().cpu() - torch.cat(want)).abs()
    print(f"{what}: mean {difference.mean():.4f}, max {difference.max():.3f} nats")
    return float(difference.mean())


def test_plain_peft(trained: tuple[Path, Path, list[list[int]], Any]) -> None:
    base, adapter, texts, want = trained
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).cuda()
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    got = []
    with torch.no_grad():
        for ids in texts:
            tokens = torch.tensor([ids]).cuda()
            logprobs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            got.append(logprobs.gather(-1, tokens[0, 1:, None])[:, 0])
    assert gap(got, want, "plain PEFT") <= LIMIT


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_stock_vllm(
    trained: tuple[Path, Path, list[list[int]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, texts, want = trained
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(base),
        dtype="bfloat16",
        max_model_len=512,
        enable_lora=True,
        max_lora_rank=16,
        gpu_memory_utilization=0.3,
        enable_prefix_caching=False,
    )
    got = []
    for ids in texts:
        (out,) = llm.generate(
            {"prompt_token_ids": ids},
            SamplingParams(max_tokens=1, prompt_logprobs=0),
            lora_request=LoRARequest("warm", 1, str(adapter)),
            use_tqdm=False,
        )
        steps = zip(out.prompt_logprobs[1:], ids[1:], strict=True)
        got.append(torch.tensor([found[token].logprob for found, token in steps]))
    assert gap(got, want, "stock vLLM") <= LIMIT
