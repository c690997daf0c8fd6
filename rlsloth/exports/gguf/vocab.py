"""A tokenizer's tables as llama.cpp reads them from a GGUF file."""

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
"""Tokens at which llama.cpp ends a text because of their name (src/llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The values of GGUF's ``tokenizer.`` keys."""

    model: str
    """gpt2: byte-level BPE with merges. llama: sentencepiece's BPE, merging by score."""
    pre: str
    """Name of the split into words, "default" for sentencepiece, which has none."""
    tokens: list[str]
    """One for each row of the embedding."""
    types: list[int]
    """gguf.TokenType."""
    scores: list[float] | None
    """Sentencepiece's scores: the higher, the earlier merged."""
    merges: list[str] | None
    special: dict[str, int]
    """bos, eos, … : their ids."""
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    """Whether llama.cpp puts a space before a text and after each special token."""
    template: str | None


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """The tokenizer in ``folder``.

    Raises:
        UserError: a tokenizer that llama.cpp does not run as transformers does, or tokens without
            embeddings.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise UserError(f"{folder}: a tokenizer of type {model['type']} cannot be written as GGUF")
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
        scores=_scores(tokens, types, backend, pairs) if by_score else None,
        merges=None if by_score else [" ".join(pair) for pair in pairs],
        special=_special(folder, tokenizer, config, tokens),
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        adds_space=_adds_space(tokenizer),
        template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write the tables into a GGUFWriter."""
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
    """Text and type of every id; ids that the tokenizer does not use are [PAD<id>]."""
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
            f"{size} embeddings; {len(beyond)} tokens were added without training theirs"
        )
    for index, text in table.items():
        kind = TokenType.NORMAL
        if text == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            control = added[index]["special"] or _looks_special(text)
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            if by_score and not control:
                text = text.replace("▁", " ")  # llama.cpp finds these before spaces are replaced
        elif by_score and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        tokens[index], types[index] = text, int(kind)
    return tokens, types


def _looks_special(text: str) -> bool:
    """Marks that some tokenizers do not call special; llama.cpp's converter takes them so, too."""
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end)
        for start, end in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))  # noqa: RUF001
    )


def _scores(
    tokens: list[str], types: list[int], backend: dict[str, Any], pairs: list[list[str]]
) -> list[float]:
    """Sentencepiece's scores, regained from the order of merges: the first piece merged has 0, the
    next -1, …; pieces that no merge makes come after them."""
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
    """Whether the tokenizer puts its bos before a text and its eos behind."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for bos in (False, True):
        for eos in (False, True):
            start = [tokenizer.bos_token_id] if bos else []
            if whole == start + plain + ([tokenizer.eos_token_id] if eos else []):
                return bos, eos
    raise UserError(
        f"{folder}: the tokenizer puts {tokenizer.convert_ids_to_tokens(whole)} for 'a'; GGUF can "
        "add the bos token before a text and the eos token behind it, nothing else"
    )


def starts_with_space(tokenizer: Any) -> bool:
    """Whether the tokenizer (sentencepiece's) puts a space before a text."""
    return bool(tokenizer.tokenize("a")[0].startswith("▁"))


def _adds_space(tokenizer: Any) -> bool:
    """Some tokenizers put a space before a text only, which llama.cpp cannot: there conversations,
    which begin with a special token, are right without, and other text with a space."""
    after_special = tokenizer.tokenize(f"{tokenizer.eos_token}a")[1].startswith("▁")
    return starts_with_space(tokenizer) and (after_special or not tokenizer.chat_template)


def _special(folder: Path, tokenizer: Any, config: Any, tokens: list[str]) -> dict[str, int]:
    """Ids by name. Ends of the generation configuration that llama.cpp would not find by their
    name become eot and eom, where it stops as it does at eos."""
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
    others = [i for i in ends if i != special.get("eos") and tokens[i] not in ENDS]
    if len(others) > 2:
        raise UserError(f"{file}: {len(others) + 1} end tokens; GGUF has room for three")
    return special | dict(zip(("eot", "eom"), others, strict=False))
