"""The tables of a tokenizer that llama.cpp reads from a GGUF file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError
from rlsloth.exports.gguf.pretokenizer import pretokenizer_name

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>",
    "<EOT>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>",  # noqa: RUF001
}  # fmt: skip
"""Tokens at which llama.cpp stops because of their text alone (src/llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The values of the keys of a GGUF file that begin with ``tokenizer.``"""

    model: str
    """``gpt2``: byte-level BPE with merges. ``llama``: sentencepiece's BPE, merged by score."""
    pre: str
    """llama.cpp's name for the split into words; "default" for sentencepiece, which has none."""
    tokens: list[str]
    """Text of each token, one for each row of the embedding."""
    types: list[int]
    """gguf.TokenType of each token."""
    scores: list[float] | None
    """Sentencepiece's score of each token: higher scores merge earlier. None for byte-level BPE."""
    merges: list[str] | None
    """Byte-level BPE's merges as "left right", first merge first. None for sentencepiece."""
    special: dict[str, int]
    """Name of a special token (bos, eos, …) -> its id."""
    adds_bos: bool
    """Whether the tokenizer adds its bos token before a text."""
    adds_eos: bool
    """Whether the tokenizer adds its eos token after a text."""
    adds_space: bool
    """Whether llama.cpp adds a space before a text and after each special token."""
    template: str | None
    """The chat template in Jinja; None without one."""


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """Read the tokenizer in ``folder``.

    Args:
        folder: the model's folder, with tokenizer.json.
        config: its configuration, for the number of embeddings.

    Raises:
        UserError: llama.cpp would tokenize differently, or a token has no embedding.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json, which GGUF files are written from; load its "
            "tokenizer with transformers and save it with save_pretrained"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"{folder}: a tokenizer of type {model['type']} cannot be written as GGUF (known: "
            "BPE); export with --to merged instead"
        )
    by_score = bool(model["byte_fallback"])
    unknown = tokenizer.unk_token if by_score else None
    tokens, types = _tokens(folder, backend, config.vocab_size, by_score, unknown)
    adds_bos, adds_eos = _added(folder, tokenizer)
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return Vocabulary(
        model="llama" if by_score else "gpt2",
        pre="default" if by_score else pretokenizer_name(folder, backend),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, types, pairs) if by_score else None,
        merges=None if by_score else [" ".join(pair) for pair in pairs],
        special=_special(folder, tokenizer, config, tokens),
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        adds_space=_adds_space(tokenizer),
        template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write the vocabulary's keys with a gguf.GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _tokens(
    folder: Path, backend: dict[str, Any], size: int, by_score: bool, unknown: str | None
) -> tuple[list[str], list[int]]:
    """List text and type of every token id below ``size``.

    Ids that the tokenizer does not use have the text [PAD<id>], as in llama.cpp's converter.
    """
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    added = {entry["id"]: entry for entry in backend["added_tokens"]}
    table = {index: text for text, index in backend["model"]["vocab"].items()}
    table |= {index: entry["content"] for index, entry in added.items()}
    beyond = sorted(index for index in table if index >= size)
    if beyond:
        raise UserError(
            f"{folder}: token {table[beyond[0]]!r} has id {beyond[0]}, but the model has only "
            f"{size} embeddings; {len(beyond)} tokens were added without embeddings: remove them "
            "from the tokenizer"
        )
    for index, text in table.items():
        kind = TokenType.NORMAL
        if text == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            control = added[index]["special"] or _looks_special(text)
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            if by_score and not control:
                text = text.replace("▁", " ")  # llama.cpp looks for these before it replaces spaces
        elif by_score and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        tokens[index], types[index] = text, int(kind)
    return tokens, types


def _looks_special(text: str) -> bool:
    """Tell whether a token is a control token by its text, even if the tokenizer does not say so.

    llama.cpp's converter has the same rule.
    """
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end)
        for start, end in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))  # noqa: RUF001
    )


def _scores(tokens: list[str], types: list[int], pairs: list[list[str]]) -> list[float]:
    """Recover sentencepiece's scores [tokens] from the order of the merges.

    The first piece merged gets 0, the next -1, and so on; pieces that no merge makes come last.
    """
    from gguf import TokenType

    order = dict.fromkeys(left + right for left, right in pairs)
    rank = {text: float(-i) for i, text in enumerate(order)}
    scores = [-10000.0 if kind == TokenType.UNUSED else 0.0 for kind in types]
    last = -float(len(rank))
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            scores[index] = -1000.0
        elif kind == TokenType.NORMAL:
            if text in rank:
                scores[index] = rank[text]
            else:
                scores[index] = last
                last -= 1
    return scores


def _added(folder: Path, tokenizer: Any) -> tuple[bool, bool]:
    """Tell whether the tokenizer adds its bos token before a text, and its eos token after it."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for bos in (False, True):
        for eos in (False, True):
            start = [tokenizer.bos_token_id] if bos else []
            if whole == start + plain + ([tokenizer.eos_token_id] if eos else []):
                return bos, eos
    raise UserError(
        f"{folder}: the tokenizer turns 'a' into {tokenizer.convert_ids_to_tokens(whole)}; a GGUF "
        "file can add the bos token before a text and the eos token after it, nothing else: export "
        "with --to merged instead"
    )


def starts_with_space(tokenizer: Any) -> bool:
    """Tell whether the tokenizer adds a space before a text, as sentencepiece does."""
    return bool(tokenizer.tokenize("a")[0].startswith("▁"))


def _adds_space(tokenizer: Any) -> bool:
    """Decide whether llama.cpp adds a space before a text and after each special token.

    Some tokenizers add one before a text, but not after a special token, and llama.cpp cannot do
    that. If such a model has a chat template, no space is added: conversations, which begin with a
    special token, are then right, and other text lacks its first space.
    """
    after_special = tokenizer.tokenize(f"{tokenizer.eos_token}a")[1].startswith("▁")
    return starts_with_space(tokenizer) and (after_special or not tokenizer.chat_template)


def _special(folder: Path, tokenizer: Any, config: Any, tokens: list[str]) -> dict[str, int]:
    """Map the names of special tokens to their ids.

    Further end tokens of generation_config.json become eot and eom, at which llama.cpp stops as at
    eos; those that it does not know by their text come first.
    """
    special: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is None:
            index = getattr(config, f"{name}_token_id", None)
        if isinstance(index, int):
            special[name] = index
    file = folder / "generation_config.json"
    ends = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    ends = [ends] if isinstance(ends, int) else ends or []
    further = [i for i in ends if i != special.get("eos")]
    others = [i for i in further if tokens[i] not in ENDS] or further[:1]
    if len(others) > 2:
        raise UserError(
            f"{file}: eos_token_id lists {len(others) + 1} end tokens, but GGUF holds at most 3; "
            "remove those that the model never generates"
        )
    return special | dict(zip(("eot", "eom"), others, strict=False))
