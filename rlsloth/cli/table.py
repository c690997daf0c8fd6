"""The table of commands. A new command is a file in ``commands/`` and a line here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from rlsloth.losses.preference.methods import METHODS


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its line in ``rlsloth --help``, and the file that runs it."""

    name: str
    help: str
    """Description in a few words."""
    example: str
    module: str
    """File in ``commands/`` with ``run(name, argv) -> exit status``, imported on first use."""

    def run(self, argv: list[str]) -> int:
        """Run the command with the words after its name.

        Returns:
            The exit status: 0, or 1 for a failed check.
        """
        module = importlib.import_module(f"rlsloth.cli.commands.{self.module}")
        status: int = module.run(self.name, argv)
        return status


_PREFERENCE = [
    Command(name, method.help, f"rlsloth {name} --data.train {method.examples}.jsonl", "preference")
    for name, method in METHODS.items()
]

COMMANDS = (
    Command("grpo", "reinforcement learning from rewards",
            "rlsloth grpo --rewards math_verify", "grpo"),
    Command("sft", "learn the completions of a dataset (warm start)",
            "rlsloth sft --data.train answers.jsonl", "sft"),
    *_PREFERENCE,
    Command("distill", "train a student on a teacher's verified completions",
            "rlsloth distill --teacher runs/x", "distill"),
    Command("eval", "avg@k, pass@k and maj@k of a model",
            "rlsloth eval runs/x/config.yaml", "evaluate"),
    Command("export", "write an adapter, merged weights or GGUF",
            "rlsloth export runs/x --out DIR", "export"),
    Command("quantize", "write a model in 4 bits, fitted to your texts",
            "rlsloth quantize MODEL --data.train answers.jsonl --out DIR", "quantize"),
    Command("chat", "talk to a run, an adapter or a model",
            "rlsloth chat runs/x", "chat"),
    Command("rewards", "list the rewards, or test one",
            "rlsloth rewards test ./mine.py:reward", "rewards"),
    Command("plan", "check whether a run fits the GPU's memory",
            "rlsloth plan my.yaml --memory-gb 24", "plan"),
    Command("doctor", "check this machine, and how well it runs a model",
            "rlsloth doctor --model MODEL", "doctor"),
)  # fmt: skip
"""In the order in which ``rlsloth --help`` lists them."""


def overview() -> str:
    """The text of ``rlsloth --help``."""
    first = max(len(command.name) for command in COMMANDS)
    second = max(len(command.help) for command in COMMANDS)
    rows = [f"  {c.name:{first}}  {c.help:{second}}  {c.example}" for c in COMMANDS]
    return "\n".join(
        [
            "usage: rlsloth COMMAND [FILE.yaml ...] [--section.key VALUE ...]",
            "",
            "Train reasoning models from reward scripts on one GPU.",
            "",
            "commands:",
            *rows,
            "",
            "options:",
            "  -h, --help  print this text; rlsloth COMMAND --help lists a command's options",
            "  --version   print the version",
            "",
        ]
    )
