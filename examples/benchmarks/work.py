"""The work of full_step.py, equal for every trainer."""

from __future__ import annotations

import argparse
import random
import re
import string
import sys
from typing import Any

LEARNING_RATE = 1e-5


def completions(args: argparse.Namespace) -> int:
    """Number of completions of a step."""
    return int(args.prompts * args.group)


def context(args: argparse.Namespace) -> int:
    """Tokens of a prompt with its completion."""
    return int(args.prompt_tokens + args.new_tokens)


def micro_rows(args: argparse.Namespace) -> int:
    """Completions of a micro-batch, for trainers that count in completions: the largest number
    within the token budget that divides the step's number."""
    total = completions(args)
    most = max(args.micro_tokens // context(args), 1)
    return next(rows for rows in range(min(most, total), 0, -1) if total % rows == 0)


def texts(tokenizer: Any, args: argparse.Namespace) -> list[str]:
    """Prompts of all steps, each of exactly ``prompt_tokens`` words of one token."""
    decoded = (tokenizer.decode([i]) for i in range(len(tokenizer)))
    words = [w for w in decoded if re.fullmatch(r" [a-z]{3,}", w)] or list(string.ascii_lowercase)
    draw = random.Random(0)
    count = args.prompts * (1 + args.steps)
    made = ["".join(draw.choices(words, k=args.prompt_tokens)) for _ in range(count)]
    if {len(ids) for ids in tokenizer(made)["input_ids"]} != {args.prompt_tokens}:
        sys.exit("this tokenizer joins words of one token: pass a --model with another tokenizer")
    return made
