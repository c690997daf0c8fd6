"""Read compressed weights back from their folder, and compare predictions with those of 16 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsloth.config import EnvConfig
from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError
from rlsloth.exports.check import divergence, predictions, refuse_changed, sample_ids
from rlsloth.exports.compressed.scheme import Scheme
from rlsloth.exports.compressed.weights import dequantised, fp8
from rlsloth.exports.compressed.write import read_parts
from rlsloth.exports.merged import checksums
from rlsloth.exports.stored import Weights

LIMIT = 1.0
"""Largest mean divergence, in nats a token, that rounding can explain."""
_CHATS = (
    (
        "Tom has 3 boxes of 12 pencils and gives 7 pencils away. How many are left?",
        "He has 3 * 12 = 36 pencils. After giving 7 away, 36 - 7 = 29 are left.",
    ),
    (
        "Which is larger, 2/3 or 3/5?",
        "In fifteenths, 2/3 is 10/15 and 3/5 is 9/15, so 2/3 is larger.",
    ),
    (
        "Why is the sky blue? Answer in one sentence.",
        "Air scatters the short waves of sunlight, which are blue, more than the long ones.",
    ),
)
"""Conversations, by question and answer, that no dataset of training supplies."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Results of a check that compressed weights passed."""

    divergence: float
    """Mean Kullback-Leibler divergence of the predictions from those in 16 bits, nats a token."""
    agree: float
    """Share of tokens at which both predict the same token as the most likely one."""
    prompts: int
    tokens: int


def check_compressed(
    folder: Path,
    merged: Path,
    scheme: Scheme,
    sums: Mapping[str, str],
    prompts: list[Tensor],
    *,
    trust_remote_code: bool,
) -> Compared:
    """Compare a compressed folder with the merged one it came from, on the CPU in float32.

    Linear layers get the weights that their tensors in ``folder`` stand for. Where engines round a
    layer's inputs, they are rounded here, too.

    Args:
        folder: the compressed folder.
        merged: the folder of 16-bit weights.
        scheme: the compressed layers.
        sums: tensor's name -> checksum (``merged.checksums``) before writing.
        prompts: [T] token ids of each.
        trust_remote_code: run code shipped with the model.

    Raises:
        UserError: a tensor differs from what was written, or the mean divergence exceeds LIMIT.
    """
    from transformers import AutoModelForCausalLM

    stored = Weights(folder)
    found = {name: s for n in stored.shapes for name, s in checksums({n: stored.read(n)})}
    refuse_changed([n for n in sums.keys() | found.keys() if sums.get(n) != found.get(n)])
    model = AutoModelForCausalLM.from_pretrained(
        merged, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    wanted = [predictions(model, ids) for ids in prompts]
    _compress(model, stored, scheme)
    pairs = list(zip(wanted, (predictions(model, ids) for ids in prompts), strict=True))
    apart = float(torch.cat([divergence(*pair) for pair in pairs]).mean())
    if not apart <= LIMIT:
        raise UserError(
            f"--to {scheme.to}: predictions differ from those of the merged weights by {apart:.3g} "
            f"nats a token on average, more than the limit of {LIMIT:g}: export with --to merged "
            "instead"
        )
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float()
    return Compared(apart, float(same.mean()), len(prompts), len(same))


@torch.no_grad()
def _compress(model: Any, stored: Weights, scheme: Scheme) -> None:
    """Give a model's linear layers the weights, and the rounding of inputs, of a scheme."""
    for name in scheme.linears:
        linear = model.get_submodule(name)
        linear.weight.copy_(dequantised(read_parts(stored, name)))
        if scheme.rounds_inputs:
            linear.register_forward_pre_hook(_round_inputs)


def _round_inputs(_: Any, inputs: tuple[Tensor]) -> Tensor:
    """Round a layer's inputs [..., I] to FP8 with one scale a token, as engines do."""
    (values,) = inputs
    return dequantised(fp8(values.float().flatten(0, -2))).view_as(values)


def sample_prompts(tokenizer: Any, context: int, settings: Mapping[str, Any]) -> list[Tensor]:
    """Tokenize the prompts to compare: a text and, with a chat template, conversations.

    Args:
        tokenizer: transformers' tokenizer.
        context: the most tokens that the model takes.
        settings: how training made its prompts (``Source.prompts``).

    Returns:
        [T] token ids of each.
    """
    chats = _chats(tokenizer, settings) if tokenizer.chat_template else ()
    return [sample_ids(tokenizer, context), *(torch.tensor(ids[:context]) for ids in chats)]


def _chats(tokenizer: Any, settings: Mapping[str, Any]) -> Iterator[list[int]]:
    kwargs = settings.get("chat_template_kwargs") or {}
    renderer = Renderer(tokenizer, EnvConfig(chat_template_kwargs=kwargs))
    system = settings.get("system_prompt")
    first = [{"role": "system", "content": system}] if system else []
    for question, answer in _CHATS:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = renderer.render([*first, *chat], (), "a sample conversation", whole=True)
        yield renderer.ids(text, begins=True)
