"""The work that full_step.py gives every trainer."""

from __future__ import annotations

import argparse
import random
import re
import string
import sys
from typing import Any

LEARNING_RATE = 1e-5


def completions(args: argparse.Namespace) -> int:
    """Of a step."""
    return int(args.prompts * args.group)


def context(args: argparse.Namespace) -> int:
    """Tokens of a prompt with a completion."""
    return int(args.prompt_tokens + args.new_tokens)


def micro_rows(args: argparse.Namespace) -> int:
    """Completions in a micro-batch of a trainer that counts in them: the most within the token
    budget that divide a step's."""
    total = completions(args)
    most = max(args.micro_tokens // context(args), 1)
    return next(rows for rows in range(min(most, total), 0, -1) if total % rows == 0)


def texts(tokenizer: Any, args: argparse.Namespace) -> list[str]:
    """Prompts for all steps, each of exactly ``prompt_tokens`` tokens: words of one token each."""
    decoded = (tokenizer.decode([i]) for i in range(len(tokenizer)))
    words = [w for w in decoded if re.fullmatch(r" [a-z]{3,}", w)] or list(string.ascii_lowercase)
    draw = random.Random(0)
    count = args.prompts * (1 + args.steps)
    made = ["".join(draw.choices(words, k=args.prompt_tokens)) for _ in range(count)]
    if {len(ids) for ids in tokenizer(made)["input_ids"]} != {args.prompt_tokens}:
        sys.exit("this tokenizer does not keep words that are one token each apart")
    return made
