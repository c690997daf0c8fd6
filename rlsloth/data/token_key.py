"""Key of tokenised examples in the cache: a digest of everything that decides about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlsloth.config.data import ExamplesConfig
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import Row

_PLAIN = frozenset(
    {str, int, float, bool, type(None), bytes, datetime, date, time, timedelta, Decimal}
)
"""Types of values whose ``repr`` is their whole content."""
_SELECTS = {
    "train", "train_split", "validation", "validation_split", "limit", "heldout", "cache",
}  # fmt: skip
"""Options that choose rows or divide examples; all others may change an example."""


def key_of(
    rows: Sequence[Row],
    cfg: ExamplesConfig,
    renderer: Renderer,
    source: str,
    reading: Reading,
    reader: Callable[..., Any],
) -> str | None:
    """Hash everything that the examples depend on; None if some of it cannot be hashed."""
    tokenizer = _tokenizer_facts(renderer.tokenizer)
    if tokenizer is None:
        return None
    facts = {
        "code": _code_version(),
        "reader": f"{reader.__module__}.{reader.__qualname__}",
        "options": cfg.model_dump(mode="json", exclude=_SELECTS),
        "source": source,
        "reading": reading.state(),
        "stop_ids": renderer.stop_ids,
        **tokenizer,
    }
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    try:
        for row in rows:
            if not _is_plain(row):
                return None
            digest.update(f"{row!r}\n".encode())
    except RecursionError:
        return None
    return digest.hexdigest()[:32]


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is dict:
        return all(type(key) in _PLAIN and _is_plain(item) for key, item in value.items())
    return kind in (list, tuple) and all(map(_is_plain, value))


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any] | None:
    """Everything of a tokenizer that decides about tokens; None if it is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(tokenizer).__module__.partition(".")[0] != "transformers":
        return None  # Python code of its own may depend on anything
    template = json.dumps(tokenizer.chat_template)
    return {
        "class": type(tokenizer).__qualname__,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "template": template,
        "special": tokenizer.special_tokens_map,
        "split": getattr(tokenizer, "split_special_tokens", None),
        # Templates such as Llama 3's write the day into the system message.
        "day": date.today().isoformat() if "strftime_now" in template else None,
    }


def _code_version() -> str:
    """Hash the code of this room, and the versions of the libraries that it works with."""
    import jinja2
    import tokenizers
    import transformers

    digest = hashlib.sha256()
    for library in (jinja2, tokenizers, transformers):
        digest.update(f"{library.__name__} {library.__version__}\n".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()
