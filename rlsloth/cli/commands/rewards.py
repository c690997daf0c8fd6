"""``rlsloth rewards``: list the rewards that ship with rlsloth, or test one."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from rlsloth import plugins
from rlsloth.cli.flags import with_first_word
from rlsloth.cli.read_config import asks_for_help, read_config
from rlsloth.config import RewardConfig, Section
from rlsloth.config.section import Folder
from rlsloth.errors import UserError, nearest

REWARDS = "rlsloth.rewards"
USAGE = """\
usage: rlsloth rewards list
       rlsloth rewards test SPEC [--data FILE] [--limit N]

list prints the rewards that ship with rlsloth. test scores the examples of a reward, or the rows of
a file; rlsloth rewards test --help lists its options.
"""


class RewardTestOptions(Section):
    """Score the examples of a reward, or the rows of a file: the column completion, optionally
    completion_ids and finish_reason, and the columns of a dataset for rlsloth grpo. Exit status 1
    after a failure or an unexpected score."""

    spec: str | None = None
    """Name (math_verify), dotted path (pkg.module:function) or file (./mine.py:reward); the first
    word needs no --spec."""
    data: Folder | None = None
    """File with rows to score, in any format of datasets. Default: the EXAMPLES in the reward's
    file."""
    limit: int = Field(100, ge=1)
    """Most rows read from the file."""
    reward: RewardConfig = RewardConfig()


class NoOptions(Section):
    """List the rewards that ship with rlsloth, with the arguments and parameters of each."""


def run(name: str, argv: list[str]) -> int:
    """List or test rewards. Returns the exit status: 1 when a test fails."""
    actions = {"list": _run_list, "test": _run_test}
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action not in actions and asks_for_help(argv):
        print(USAGE, end="")
        return 0
    if action not in actions:
        what = f"no action {action!r}" if action else "an action is missing"
        raise UserError(
            f"rlsloth {name}: {what}{nearest(action, list(actions))} "
            f"(rlsloth {name} list, or rlsloth {name} test SPEC)"
        )
    return actions[action](f"rlsloth {name} {action}", rest)


def _run_list(prog: str, argv: list[str]) -> int:
    read_config(NoOptions, argv, prog)
    list_rewards()
    return 0


def _run_test(prog: str, argv: list[str]) -> int:
    chosen = read_config(RewardTestOptions, with_first_word(argv, "--spec"), f"{prog} SPEC")
    if chosen.spec is None:
        raise UserError(f"no reward to test: pass one, as in {prog} ./mine.py:reward")
    from rlsloth.cli.reward_trial import test_reward

    return test_reward(chosen.spec, chosen.data, chosen.limit, chosen.reward)


@dataclass(frozen=True, slots=True)
class RewardSummary:
    """Description of a built-in reward."""

    name: str
    summary: str
    columns: tuple[str, ...]
    """Arguments of the function, dataset columns included; not those for logging."""
    parameters: dict[str, str]
    """Option under reward.params.<name> -> its default."""


def summarize_rewards() -> list[RewardSummary]:
    """The built-in rewards, described from their source: importing them takes seconds."""
    folder = next(iter(importlib.import_module(REWARDS).__path__))
    return [_summary(name, Path(folder)) for name in plugins.builtin_names(REWARDS)]


def _summary(name: str, folder: Path) -> RewardSummary:
    tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    arguments = function.args
    defaults = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return RewardSummary(
        name=name,
        summary=(ast.get_docstring(function) or "").partition("\n")[0].replace("``", ""),
        columns=tuple(a.arg for a in arguments.args if not a.arg.startswith("log_")),
        parameters={a.arg: ast.unparse(default) for a, default in defaults if default is not None},
    )


def list_rewards() -> None:
    """Print the built-in rewards with their arguments and parameters."""
    from rich.console import Console
    from rich.table import Table

    table = Table("reward", "gives", "takes")
    table.add_column("reward.params", overflow="fold")
    for reward in summarize_rewards():
        settings = "\n".join(f"{key}={value}" for key, value in reward.parameters.items())
        table.add_row(reward.name, reward.summary, "\n".join(reward.columns), settings)
    Console().print(table)
