"""Reopen a GGUF file and compare it with the folder it came from, in content and in log-probs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlsloth.errors import UserError, first_line
from rlsloth.exports.gguf.families import add_hyperparameters, family_of, read_config
from rlsloth.exports.gguf.quantize import load_llama_cpp, quiet
from rlsloth.exports.gguf.tensors import plan
from rlsloth.exports.gguf.vocab import add_vocabulary, read_vocabulary, starts_with_space
from rlsloth.exports.stored import Weights
from rlsloth.policy.attention.interface import whole_attention

LIMITS = {
    "MOSTLY_F16": (0.005, 0.1),
    "MOSTLY_BF16": (0.005, 0.1),
    "MOSTLY_Q8_0": (0.02, 0.2),
    "MOSTLY_Q6_K": (0.03, 0.3),
    # Rows whose length is not a multiple of 256 become Q5_1 here, which is coarser than the Q5_0
    # that Q4_K_M gives them.
    "MOSTLY_Q5_K_M": (0.15, 1.0),
    "MOSTLY_Q4_K_M": (0.10, 1.0),
}
"""File type -> largest allowed differences from transformers' model, in nats.

First the absolute difference of the mean negative log-likelihoods (NLL) a token, then the mean of
the tokens' absolute differences: the means alone of a wrong model may agree by chance.
"""
MIN_TOKENS = 2000
WINDOW = 512
"""Most tokens that are scored in one pass."""
_SAMPLE_CHARACTERS = 24_000
"""Enough for MIN_TOKENS as long as a token has at most ten characters on average."""
_HARD_TEXT = (
    "Two  spaces,\ttab\n\n\nthree lines; 7 31 1234567 3.14 x_1+=2; can't WE'LL it's 'quoted' "
    '"double" <b>tag</b> https://example.org/a?b=c#d été naïve Straße Ελληνικά Русский 中文字符 '
    "日本語 한국어 עברית العربية 🙂👍🏽🇩🇪 … — “x” ½ ²\r\n    indented()  \n"
)
_CHAT = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "  And\n\n3 times as much, isn't it?"},
]


@dataclass(frozen=True, slots=True)
class Checked:
    """Results of a check that a GGUF file passed."""

    tensors: int
    """Number of tensors in the file."""
    keys: int
    """Number of compared metadata keys."""
    tokens: int = 0
    """Number of tokens that both scored; 0 without llama-cpp-python, which runs the file."""
    nll: float = 0.0
    """Mean negative log-likelihood a token by transformers' model, in nats."""
    nll_gguf: float = 0.0
    """Mean negative log-likelihood a token by llama.cpp, in nats."""


def check_gguf(folder: Path, path: Path) -> Checked:
    """Compare the GGUF file ``path`` with the model folder that it was written from.

    The file's keys, tensor names and shapes, token table and chat template must match. If
    llama-cpp-python is installed, llama.cpp must also give the same token ids, render the same
    conversation, and score at least MIN_TOKENS tokens within LIMITS. The transformers model runs in
    float32 on a CPU, and in the stored type on a GPU.

    Raises:
        UserError: the first difference found.
    """
    from gguf import GGUFReader, LlamaFileType

    config = read_config(folder)
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: cannot read this GGUF file: {first_line(error)}; export it again"
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    keys = _check_keys(path, fields, folder, config)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    wanted = {e.name: e.shape for e in plan(folder, config, Weights(folder), "bf16")}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise UserError(
                f"{path}: tensor {name} has shape {shapes.get(name, 'none')}, but "
                f"{wanted.get(name, 'none')} in {folder}; export again"
            )
    if importlib.util.find_spec("llama_cpp") is None:
        return Checked(len(shapes), keys)
    kind = LlamaFileType(fields["general.file_type"]).name
    return _run(folder, path, fields, LIMITS[kind], Checked(len(shapes), keys))


def _check_keys(path: Path, fields: dict[str, Any], folder: Path, config: Any) -> int:
    """Compare every metadata key with the value that ``folder`` gives it; return their number."""
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(None, family_of(config).arch)
    add_hyperparameters(writer, config)
    add_vocabulary(writer, read_vocabulary(folder, config))
    for name, want in writer.kv_data[0].items():
        value = want.value
        if want.type == GGUFValueType.FLOAT32:
            value = float(np.float32(value))
        elif want.type == GGUFValueType.ARRAY and isinstance(value[0], float):
            value = np.array(value, np.float32).tolist()
        if name not in fields or fields[name] != value:
            found = repr(fields[name])[:80] if name in fields else "missing"
            raise UserError(
                f"{path}: key {name} is {found}, but {repr(value)[:80]} in {folder}; export again"
            )
    return len(writer.kv_data[0])


def _run(
    folder: Path, path: Path, fields: dict[str, Any], limits: tuple[float, float], checked: Checked
) -> Checked:
    """Run the file in llama.cpp and compare token ids, the rendered template and NLL.

    Args:
        folder: the model's folder.
        path: the GGUF file.
        fields: its metadata keys and values.
        limits: the entry of LIMITS for its type.
        checked: results so far.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    library = load_llama_cpp()
    window = min(WINDOW, int(fields[f"{fields['general.architecture']}.context_length"]))
    ids = tokenizer(sample_text(), add_special_tokens=False).input_ids
    rows = -(-MIN_TOKENS // (window - 1))
    windows = torch.tensor(ids[: rows * window]).view(rows, window)
    with quiet(library) as errors:
        try:
            model = library.Llama(str(path), n_ctx=window, logits_all=True, verbose=False)
        except ValueError as error:
            reason = errors[-1] if errors else str(error)
            raise UserError(
                f"{path}: llama.cpp cannot load this file: {reason}; report this"
            ) from error
        try:
            _check_tokens(path, tokenizer, model, fields)
            if tokenizer.chat_template:
                _check_template(path, tokenizer, model, fields)
            by_gguf = _nll_llama_cpp(model, windows)
        finally:
            model.close()
    by_folder = _nll_transformers(folder, windows)
    gap = float((by_gguf - by_folder).abs().mean())
    nll, nll_gguf = float(by_folder.mean()), float(by_gguf.mean())
    if not (abs(nll - nll_gguf) <= limits[0] and gap <= limits[1]):
        raise UserError(
            f"{path}: llama.cpp scores a text differently from transformers: mean NLL "
            f"{nll_gguf:.4f} and {nll:.4f} nats (limit of the difference: {limits[0]}), tokens "
            f"differ by {gap:.3f} nats on average (limit: {limits[1]}); export with --to merged "
            "instead, and report this"
        )
    return Checked(checked.tensors, checked.keys, len(by_folder), nll, nll_gguf)


def sample_text() -> str:
    """Text to tokenize and score: source files of this package, cut to a fixed length."""
    files = sorted((Path(__file__).parents[1]).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return text[:_SAMPLE_CHARACTERS]


def _check_tokens(path: Path, tokenizer: Any, model: Any, fields: dict[str, Any]) -> None:
    """Compare token ids of texts with special characters, spaces and several languages."""
    # The file turns llama.cpp's leading space off for the sake of conversations; plain text needs
    # one to match the tokenizer.
    missing = starts_with_space(tokenizer) and not fields["tokenizer.ggml.add_space_prefix"]
    for text in (_HARD_TEXT, sample_text()):
        want = tokenizer(text).input_ids
        given = " " + text if missing else text
        got = model.tokenize(given.encode(), add_bos=True, special=True)
        _same_ids(path, tokenizer, want, got)


def _check_template(path: Path, tokenizer: Any, model: Any, fields: dict[str, Any]) -> None:
    """Compare the text and token ids of a conversation rendered by the chat template."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(
        template=fields["tokenizer.chat_template"],
        eos_token=tokenizer.eos_token or "",
        bos_token=tokenizer.bos_token or "",
    )
    want = tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True)
    got = formatter(messages=_CHAT).prompt
    if got != want:
        raise UserError(
            f"{path}: its chat template renders {got!r} in llama.cpp, but {want!r} in "
            "transformers; report this"
        )
    _same_ids(
        path,
        tokenizer,
        tokenizer(want, add_special_tokens=False).input_ids,
        model.tokenize(got.encode(), add_bos=False, special=True),
    )


def _same_ids(path: Path, tokenizer: Any, want: list[int], got: list[int]) -> None:
    """Refuse token ids of llama.cpp (``got``) that differ from the tokenizer's (``want``)."""
    if want == got:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b),
        min(len(want), len(got)),
    )
    raise UserError(
        f"{path}: llama.cpp's token ids differ from the tokenizer's from position {at} on: "
        f"{tokenizer.convert_ids_to_tokens(got[at : at + 5])} instead of "
        f"{tokenizer.convert_ids_to_tokens(want[at : at + 5])}; report this"
    )


def _nll_llama_cpp(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Score windows of token ids [W, T] in llama.cpp: [W * (T - 1)] NLL in nats.

    A window's first token has no NLL.
    """
    found = []
    for row in windows:
        model.reset()
        model.eval(row.tolist())
        found.append(_nll(torch.from_numpy(model.scores[: len(row)]), row))
    return torch.cat(found)


@torch.no_grad()
def _nll_transformers(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Score windows of token ids [W, T] in transformers: [W * (T - 1)] NLL in nats."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if on_gpu else torch.float32)
    model.set_attn_implementation(whole_attention(model))
    model.eval().to("cuda" if on_gpu else "cpu")
    return torch.cat(
        [_nll(model(row[None].to(model.device)).logits[0].float().cpu(), row) for row in windows]
    )


def _nll(logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """[T - 1] NLL in nats from logits [T, V] and token ids [T]."""
    return torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none")
