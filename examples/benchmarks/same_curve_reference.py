"""The reference of same_curve.py: transformers with PEFT in a plain loop.

It shares no code with rlsloth: advantages, losses and gradient steps are computed from their
definitions. Its forward is one padded batch of whole sequences, each with its own copy of the
prompt.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from same_curve_runs import Curve, Step, Train, Weights, Work
    from torch import Tensor

MAX_NORM, BETAS, EPSILON = 1.0, (0.9, 0.99), 0.2
CORRECTION_MAX = 3.0


def reference(work: Work) -> tuple[Train, Weights]:
    """The plain loop; the system's name says what it does in another way (REFERENCES)."""
    import torch

    args = work.args
    if work.system == "fp32":
        args = argparse.Namespace(**{**vars(args), "precision": "fp32"})
    model = load(args, "eager" if work.system == "eager" else "sdpa")
    weights = trained(model)
    optimizer = torch.optim.AdamW(
        weights.values(), lr=args.lr, betas=BETAS, eps=1e-8, weight_decay=0.0
    )

    def update(curve: Curve, losses: Iterator[Tensor]) -> None:
        total = 0.0
        for loss in losses:
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        curve.losses.append(total)
        curve.norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()

    def step(curve: Curve, number: int, groups: Step) -> None:
        rows = sequences(groups)
        if work.system == "reordered":
            random.Random(number).shuffle(rows)
        count = sum(len(row.completion) for row in rows)
        size = -(-len(rows) // 2) if work.system == "halved" else len(rows)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        if work.task == "sft":
            update(curve, (-logprobs(args, model, part).sum() / count for part in parts))
            return
        old: list[Tensor] = []

        def losses() -> Iterator[Tensor]:
            for i, part in enumerate(parts):
                new = logprobs(args, model, part)
                if len(old) == i:  # the step's first update
                    old.append(new.detach())
                yield grpo_loss(args, new, old[i], part).sum() / count

        for _ in range(args.updates):
            update(curve, losses())
        curve.gaps.append(gap(old, parts))

    model.train()
    return step, weights


@dataclass(frozen=True)
class Sequence:
    """A prompt with one completion."""

    prompt: list[int]
    completion: list[int]
    recorded: list[float]
    advantage: float


def sequences(groups: Step) -> list[Sequence]:
    """The sequences of a step; GRPO's advantage is (r - mean) / (std + 1e-4) of the group."""
    import torch

    rows = []
    for group in groups:
        rewards = torch.tensor([r.reward or 0.0 for r in group.rollouts], dtype=torch.float64)
        advantages = torch.zeros_like(rewards)
        if len(rewards) > 1 and rewards.max() - rewards.min() > 1e-9:
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        rows += [
            Sequence(group.prompt_ids, rollout.token_ids, rollout.logprobs, advantage)
            for rollout, advantage in zip(group.rollouts, advantages.tolist(), strict=True)
        ]
    return rows


def logprobs(args: argparse.Namespace, model: Any, rows: list[Sequence]) -> Tensor:
    """[N] log-probs of the completions' tokens, row after row, from one padded forward."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device = next(model.parameters()).device
    texts = [torch.tensor(row.prompt + row.completion) for row in rows]
    ids = pad_sequence(texts, batch_first=True).to(device)
    lengths = torch.tensor([[len(text)] for text in texts])
    prompts = torch.tensor([[len(row.prompt)] for row in rows])
    at = torch.arange(ids.shape[1])
    mask = (at < lengths).to(device)
    scored = ((at >= prompts) & (at < lengths))[:, 1:].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocasts(args)):
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    rows_NV, targets_N = logits[:, :-1][scored].float(), ids[:, 1:][scored]
    # Not log_softmax: on a CPU its running sum in float32 is off by 2e-5 at 49,152 tokens.
    found: Tensor = rows_NV.gather(-1, targets_N[:, None])[:, 0] - rows_NV.logsumexp(-1)
    return found


def autocasts(args: argparse.Namespace) -> bool:
    """Whether the reference multiplies by its adapter in bf16, as transformers' Trainer does."""
    return args.precision == "bf16" and not args.adapter_fp32


def grpo_loss(args: argparse.Namespace, new: Tensor, old: Tensor, rows: list[Sequence]) -> Tensor:
    """[N] rlsloth's default loss: -min(r A, clip(r) A), times min(old / recorded, 3)."""
    import torch

    advantage = of_tokens(rows, new, lambda row: [row.advantage] * len(row.completion))
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if args.correction == "none":
        return loss
    recorded = of_tokens(rows, new, lambda row: row.recorded)
    return loss * (old - recorded).exp().clamp(max=CORRECTION_MAX)


def gap(old: list[Tensor], parts: list[list[Sequence]]) -> float:
    """Mean |old - recorded| over the tokens that have a gradient."""
    total, count = 0.0, 0
    for values, rows in zip(old, parts, strict=True):
        recorded = of_tokens(rows, values, lambda row: row.recorded)
        on = of_tokens(rows, values, lambda row: [float(row.advantage != 0)] * len(row.completion))
        total += ((values - recorded).abs() * on).sum().item()
        count += int(on.sum())
    return total / max(count, 1)


def of_tokens(
    rows: list[Sequence], like: Tensor, value: Callable[[Sequence], Iterable[float]]
) -> Tensor:
    """[N] a value of each trained token, on the device of ``like``."""
    return like.new_tensor([x for row in rows for x in value(row)])


def load(args: argparse.Namespace, attention: str = "sdpa") -> Any:
    """PEFT's model on transformers' own, with an adapter from --seed, or transformers' own."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, attn_implementation=attention
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.trained == "all":
        return base.to(device)
    torch.manual_seed(args.seed)
    lora = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora)
    return model.to(device)


def trained(model: Any) -> Weights:
    """The trained weights by PEFT's names, or transformers' (live tensors)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
