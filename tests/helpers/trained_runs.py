"""Trained runs to export, made in a second: random models with adapters of a size that shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.families import family_model
from helpers.policies import make_groups
from helpers.tiny import tiny_tokenizer
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.policy.lora import save_adapter
from rlsloth.policy.policy import Policy
from rlsloth.records import MicroBatch

Export = Callable[..., Path]
"""``rlsloth export`` as a function of the source and further flags; returns the folder written."""
SUMMARY = {
    "accuracy_before": 0.25, "interval_before": [0.2, 0.3],
    "accuracy_after": 0.75, "interval_after": [0.7, 0.8],
    "problems": 100, "samples": 8, "steps": 7, "seconds": 61.5, "device": "cpu",
}  # fmt: skip
STEP = {"step": 7, "loss": 0.01, "reward": 0.5, "rewards/letters/mean": 0.5, "step_time": 1.0}


def make_base(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A model's folder in bf16, of 259 tokens."""
    sizes = {"vocab_size": 259, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 2}
    model = family_model(family, **sizes, initializer_range=0.1, **settings)
    model.bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_run(
    run: Path, base: Path, *, zero: bool = False, size: float = 0.05, **options: Any
) -> Policy:
    """A finished run's folder, and its policy. ``options``: model.* and lora.*"""
    model = {k: v for k, v in options.items() if k in ModelConfig.model_fields}
    lora = {k: v for k, v in options.items() if k in LoraConfig.model_fields}
    cfg = GrpoConfig(
        model=ModelConfig(path=str(base), device="cpu", gradient_checkpointing=False, **model),
        lora=LoraConfig(rank=4, **lora),
        optim=OptimConfig(lr=3e-4),
        rewards=["./reward.py:letters"],
        steps=7,
    )
    torch.manual_seed(0)
    policy = Policy.load(cfg.model, cfg.lora, cfg.optim, temperature=1.0, total_updates=1)
    with torch.no_grad():
        for name, p in policy.weights().tensors.items():
            if not zero and ("lora_B" in name or "lora_embedding_B" in name):
                p.normal_(0, size)
            if not zero and "lora_magnitude_vector" in name:
                p.mul_(1 + torch.randn_like(p) / 5)
    save_adapter(policy.model, run / "adapter")
    (run / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    return policy


def micro_batch() -> MicroBatch:
    (micro,) = pack(
        make_groups(3), 10_000, mask_truncated=False, keep_zero_advantage=True
    ).microbatches
    return micro


def plain_logprobs(model: Any) -> torch.Tensor:
    """[N] log-probs of ``micro_batch`` by a transformers or PEFT model, one rollout at a time."""
    groups, out = make_groups(3), []
    model.eval()
    for g, i in micro_batch().source:
        prompt, rollout = groups[g].prompt_ids, groups[g].rollouts[i]
        ids = torch.tensor([prompt + rollout.token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0].float().log_softmax(-1)
        scored = [len(prompt) + j for j, on in enumerate(rollout.loss_mask) if on]
        out += [logprobs[at - 1, ids[0, at]] for at in scored]
    return torch.stack(out)


def reopened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model's folder, read by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def scale_b(run: Path, factor: float) -> None:
    """Multiply the B matrices of a run's adapter."""
    file = run / "adapter" / "adapter_model.safetensors"
    rewrite(file, lambda name, value: value * factor if "lora_B" in name else value)


def rewrite(file: Path, new: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Replace the tensors of a safetensors file; those for which ``new`` gives None are dropped."""
    changed = {name: new(name, value) for name, value in load_file(file).items()}
    save_file({n: v for n, v in changed.items() if v is not None}, file, metadata={"format": "pt"})
