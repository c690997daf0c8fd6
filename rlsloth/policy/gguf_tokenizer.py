"""The tokenizer's settings in a GGUF file that transformers drops, restored as llama.cpp has them.

transformers (5.16 - 5.19) reads tokens, scores and merges. It drops the way of splitting text into
words, the tokens added around a text, and the space before it: without its first token, Gemma 3
270M reads a text at 6.0 nats a token instead of 2.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError
from rlsloth.policy.pretokenizers import ADDS_BOS, ALIASES, DIGITS, GPT2, SPLITS

_KEY = "tokenizer.ggml."
_READ = {
    "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges",
    "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id",
    "padding_token_id", "add_bos_token", "add_eos_token", "add_space_prefix",
}  # fmt: skip
_UNUSED = {
    "seperator_token_id", "mask_token_id", "cls_token_id", "prefix_token_id", "suffix_token_id",
    "middle_token_id", "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id",
    "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id",
}  # fmt: skip
"""Names of tokens that no text needs which is trained or sampled here."""
_SPACE = "▁"
_USER_DEFINED = 4
"""Type of a token that is matched whole in a text (gguf.TokenType)."""


def restore_tokenizer(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer read from a GGUF file the settings that the file names, in place.

    Args:
        tokenizer: transformers' tokenizer.
        path: the GGUF file.

    Raises:
        UserError: the token ids would be silently wrong: the way of splitting text is unknown, or
            a token to add is missing.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    values = {
        name: field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.") and len(field.data) == 1
    }
    kind = values.get(f"{_KEY}model")
    if kind == "gpt2":  # sentencepiece vocabularies have no pre-tokenizer
        _restore_split(tokenizer, values, path)
    elif kind == "llama":
        _restore_space(tokenizer, bool(values.get(f"{_KEY}add_space_prefix", True)))
        _restore_runs_of_spaces(tokenizer, fields)
    _restore_ends(tokenizer, values, path)


def unread_keys(keys: Mapping[str, Any]) -> list[str]:
    """List the keys about the tokenizer, among all of a file's keys, that have no effect here."""
    own = (key for key in keys if key.startswith("tokenizer."))
    used = {f"{_KEY}{name}" for name in _READ | _UNUSED} | {"tokenizer.chat_template"}
    off = {f"{_KEY}add_sep_token", f"{_KEY}remove_extra_whitespaces"}
    return sorted(key for key in own if key not in used and not (key in off and not keys[key]))


def end_ids(values: Mapping[str, Any]) -> list[int]:
    """Return the ids at which llama.cpp stops, as the file names them: eos, eot, eom."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = (values.get(f"{_KEY}{name}") for name in names)
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))


def _restore_split(tokenizer: Any, values: Mapping[str, Any], path: Path) -> None:
    """Set the way of splitting text into words, which changes token ids: SmolLM2 splits numbers."""
    name = values.get(f"{_KEY}pre") or "default"
    split = SPLITS.get(ALIASES.get(name, name))
    if split is None or not split.readable:
        raise UserError(
            f"--model.path {path}: the pre-tokenizer {name!r} of this GGUF file is not supported; "
            "pass the model's folder or hub id"
        )
    if split.steps != (GPT2,):  # that is what transformers assumes
        tokenizer.backend_tokenizer.pre_tokenizer = _pretokenizer(split.steps)


def _pretokenizer(steps: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    made: list[Any] = []
    for step in steps:
        if step == DIGITS:
            made.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != GPT2:
            made.append(pre_tokenizers.Split(Regex(step), "isolated"))
    gpt2 = steps[-1] == GPT2
    made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
    return pre_tokenizers.Sequence(made)


def _restore_space(tokenizer: Any, before: bool) -> None:
    """Put a space before a text and after special tokens, or nowhere, as llama.cpp does."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if not before and not isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        return  # Gemma's, which adds none
    steps = [normalizers.Prepend(_SPACE)] if before else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    backend.pre_tokenizer = None
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if before else [])])


def _restore_runs_of_spaces(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Match tokens of spaces alone before merging, the longest first, as llama.cpp does (Gemma)."""
    from tokenizers import AddedToken

    kinds, tokens = (fields.get(f"{_KEY}{name}") for name in ("token_type", "tokens"))
    if kinds is None or tokens is None:
        return
    known, found = tokenizer.get_vocab(), []
    for at, kind in zip(tokens.data, kinds.data, strict=False):
        if kinds.parts[kind][0] == _USER_DEFINED:
            text = bytes(tokens.parts[at]).decode("utf-8", "replace")
            spelled = text.replace(" ", _SPACE)
            if " " in text and not text.strip() and spelled in known:
                found.append(AddedToken(spelled, normalized=True, special=False))
    if found:
        tokenizer.add_tokens(found)


def _restore_ends(tokenizer: Any, values: Mapping[str, Any], path: Path) -> None:
    """Let the tokenizer add its bos token before a text and its eos token after it, or not."""
    adds = values.get(f"{_KEY}model") == "llama" or values.get(f"{_KEY}pre") in ADDS_BOS
    bos = bool(values.get(f"{_KEY}add_bos_token", adds))
    eos = bool(values.get(f"{_KEY}add_eos_token", False))
    for name, wanted in (("bos", bos), ("eos", eos)):
        if wanted and getattr(tokenizer, f"{name}_token_id") is None:
            raise UserError(
                f"--model.path {path}: {_KEY}add_{name}_token is set, but the file names no {name} "
                "token; download it again, or pass the model's folder or hub id"
            )
    if (bos, eos) != (tokenizer.add_bos_token, tokenizer.add_eos_token):
        tokenizer.add_bos_token, tokenizer.add_eos_token = bos, eos
        tokenizer.update_post_processor()
