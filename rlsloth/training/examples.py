"""Checks of a dataset of examples before training, and the lines that a run prints about it."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import hash_question
from rlsloth.data.examples import Examples
from rlsloth.data.heldout import overlap_warning, question_text
from rlsloth.environments.protocol import Environment
from rlsloth.errors import UserError
from rlsloth.policy.policy import Policy
from rlsloth.run.run import Run

_SHOWN_CHARACTERS = 300


def check_longest(cfg: SupervisedConfig, data: Examples) -> None:
    """Raise UserError if the longest example does not fit a micro-batch."""
    longest = data.longest.packed
    if cfg.tokens_per_microbatch is not None and longest > cfg.tokens_per_microbatch:
        raise UserError(
            f"the longest example has {longest} tokens, which does not fit --tokens-per-microbatch "
            f"{cfg.tokens_per_microbatch}; raise it to {longest}, or leave long examples out with "
            "--data.max-tokens"
        )


def warn_of_data(run: Run, data: Examples) -> None:
    """Warn of examples that are left out, and of held-out questions among the training examples."""
    for warning in data.warnings:
        run.warn(warning)
    if data.left_out:
        run.warn(
            f"{data.left_out} examples of more than {data.limit} tokens are left out; raise "
            "--data.max-tokens or --model.max-context to train on them"
        )
    questions = [example.question for example in data.train]
    heldout = [example.question for example in data.heldout]
    if text := overlap_warning(questions, heldout, "examples", "loss"):
        run.warn(text)


def warn_of_overlap(env: Environment, data: Examples, run: Run) -> None:
    """Warn of training examples that answer a held-out problem."""
    questions = [example.question for example in data.train]
    heldout = [hash_question(question_text(prompt)) for prompt in env.heldout]
    if text := overlap_warning(questions, heldout, "examples"):
        run.warn(text)


def show_first(run: Run, policy: Policy, data: Examples) -> None:
    """Print the first example with its trained text in brackets, since a wrong mask raises no
    error, and the columns that were read and those that were not."""
    example = data.train[0]
    token_ids, mask = example.answers[0]
    decode = partial(policy.tokenizer.decode, clean_up_tokenization_spaces=False)
    parts = [str(decode(example.prompt_ids.tolist()))[-_SHOWN_CHARACTERS:]]
    edges = [0, *(i + 1 for i in range(len(mask) - 1) if mask[i] != mask[i + 1]), len(mask)]
    for start, end in pairwise(edges):
        text = str(decode(token_ids[start:end].tolist()))[:_SHOWN_CHARACTERS]
        parts.append(f"[{text}]" if mask[start] else text)
    for note in data.notes:
        run.say(note)
    run.say(f"first example, trained text in brackets: {''.join(parts)}")
