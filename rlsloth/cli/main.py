"""The command ``rlsloth``: arguments to a config, then one call. Torch waits for a command."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from rlsloth import __version__
from rlsloth.cli.read_config import holds, read_config
from rlsloth.config import GrpoConfig, PlanConfig
from rlsloth.config.distill import DistillConfig
from rlsloth.config.export import ChatConfig, ExportConfig
from rlsloth.config.preference import (
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PreferenceConfig,
    SimpoConfig,
)
from rlsloth.config.sft import Planned, SftConfig, SupervisedConfig
from rlsloth.errors import UserError, nearest
from rlsloth.run.folder import CONFIG, METRICS

Parsed = TypeVar("Parsed")
Training = TypeVar("Training", GrpoConfig, SftConfig, PreferenceConfig)
GIVEN: dict[str, type[SupervisedConfig]] = {
    "sft": SftConfig,
    "dpo": DpoConfig,
    "orpo": OrpoConfig,
    "simpo": SimpoConfig,
    "kto": KtoConfig,
}
"""Commands that train on given answers."""

HELP = """\
usage: rlsloth COMMAND [FILE.yaml ...] [--section.key VALUE ...]

Train reasoning models from reward scripts on one GPU.

commands:
  grpo      reinforcement learning from rewards      rlsloth grpo --rewards math_verify
  sft       learn given answers (warm start)         rlsloth sft --data.train answers.jsonl
  dpo, orpo, simpo
            learn from preferred answers             rlsloth dpo --data.train pairs.jsonl
  kto       learn from answers marked good or bad    rlsloth kto --data.train marked.jsonl
  distill   a teacher's verified traces, a student   rlsloth distill --teacher runs/x
  eval      avg@k, pass@k, maj@k of a model          rlsloth eval runs/x/config.yaml
  export    adapter, merged weights or GGUF          rlsloth export runs/x --to merged --out DIR
  chat      talk to a run, an adapter or a model     rlsloth chat runs/x
  rewards   list the rewards, or test one            rlsloth rewards test ./mine.py:reward
  plan      whether a run fits the GPU's memory      rlsloth plan my.yaml --memory-gb 24
  doctor    what this machine has, and what it lacks; --model X: what of X is accelerated

options:
  -h, --help   this text; rlsloth COMMAND --help lists a command's options
  --version    print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns the exit status: 0, 1 a failed check, 2 bad input or a file that cannot be read or
    written, 130 interrupted, 141 nobody reads the output.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():
            raise
        # What is still buffered would be flushed at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _unread() -> bool:
    """Whether stdout is a pipe that has lost its reader (``| head``): other pipes are bugs."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(args: list[str]) -> int:
    if not args:
        print(HELP, end="", file=sys.stderr)
        return 2
    if args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        print(f"rlsloth {__version__}")
        return 0
    try:
        return _command(args[0])(args[1:])
    except UserError as error:
        print("error: " + str(error).replace("\n", "\nerror: "), file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except _file_errors() as error:
        print(f"error: {_said(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _file_errors() -> tuple[type[Exception], ...]:
    """What goes wrong with files; safetensors has an exception of its own, once it is imported."""
    safetensors = sys.modules.get("safetensors")
    return (OSError, safetensors.SafetensorError) if safetensors else (OSError,)


def _said(error: Exception) -> str:
    """One line: the file, where it is known, and what the system said."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _command(name: str) -> Callable[[list[str]], int]:
    commands = {
        "grpo": grpo,
        "sft": sft,
        "dpo": dpo,
        "orpo": orpo,
        "simpo": simpo,
        "kto": kto,
        "distill": distill,
        "eval": evaluate,
        "export": export,
        "chat": chat,
        "rewards": rewards,
        "plan": plan,
        "doctor": doctor,
    }
    if name not in commands:
        raise UserError(f"no command {name!r}{nearest(name, list(commands))} (see rlsloth --help)")
    return commands[name]


def grpo(argv: list[str]) -> int:
    """Train."""
    _refuse_examples_config(argv, "grpo")
    config = read_config(GrpoConfig, argv, "rlsloth grpo")
    from rlsloth.training.grpo import train

    return _trained("grpo", train, config)


def sft(argv: list[str]) -> int:
    """Learn given answers."""
    config = read_config(SftConfig, argv, "rlsloth sft")
    from rlsloth.training.sft import train

    return _trained("sft", train, config)


def dpo(argv: list[str]) -> int:
    """Learn from pairs, against the starting policy."""
    return _preference("dpo", DpoConfig, argv)


def orpo(argv: list[str]) -> int:
    """Learn from pairs, likelihood and preference at once."""
    return _preference("orpo", OrpoConfig, argv)


def simpo(argv: list[str]) -> int:
    """Learn from pairs, by mean log-probs with a margin."""
    return _preference("simpo", SimpoConfig, argv)


def kto(argv: list[str]) -> int:
    """Learn from single answers marked good or bad."""
    return _preference("kto", KtoConfig, argv)


def _preference(name: str, kind: type[PreferenceConfig], argv: list[str]) -> int:
    config = read_config(kind, argv, f"rlsloth {name}")
    from rlsloth.training.preference import train

    return _trained(name, train, config)


def _trained(name: str, train: Callable[[Training], Path], config: Training) -> int:
    """Run a loop; an interrupted one says how it goes on."""
    try:
        train(config)
    except KeyboardInterrupt:
        folder = config.run.dir or "FOLDER"
        where = "" if config.run.dir else " (FOLDER: the run folder named in the first line)"
        print(
            "interrupted; to continue from the last checkpoint: "
            f"rlsloth {name} {folder}/config.yaml --run.dir {folder} --run.resume{where}",
            file=sys.stderr,
        )
        return 130
    return 0


def distill(argv: list[str]) -> int:
    """Sample a teacher, keep what the rewards verify, train a student on it."""
    config = read_config(DistillConfig, argv, "rlsloth distill")
    from rlsloth.distillation.pipeline import distill as run_distill

    run_distill(config)
    return 0


def evaluate(argv: list[str]) -> int:
    """Measure a model. Takes a training config, so that a run's config.yaml can be passed."""
    about = (
        "Measure avg@k, pass@k and maj@k of a model, and of the adapter of a run, on held-out "
        "problems.\n\nThe options are those of training: pass a run's config.yaml."
    )
    _refuse_examples_config(argv, "eval")
    config = read_config(GrpoConfig, argv, "rlsloth eval", about)
    from rlsloth.cli.commands.evaluate import run_eval

    run_eval(config)
    return 0


def export(argv: list[str]) -> int:
    """Write what was trained in forms that others run."""
    config = read_config(ExportConfig, _with_source(argv), "rlsloth export SOURCE")
    from rlsloth.exports.export import run_export

    run_export(config)
    return 0


def chat(argv: list[str]) -> int:
    """Talk to a model."""
    config = read_config(ChatConfig, _with_source(argv), "rlsloth chat SOURCE")
    from rlsloth.cli.commands.chat import run_chat

    run_chat(config)
    return 0


def _refuse_examples_config(argv: list[str], name: str) -> None:
    """The config.yaml of a run that learnt given answers is not one of reinforcement learning: one
    line, instead of one for each of its keys. Raises UserError."""
    for word in argv:
        file = Path(word)
        if file.name == CONFIG and (file.parent / METRICS).is_file() and holds(file, "data"):
            raise UserError(
                f"{word} is of a run on given answers, which rlsloth {name} does not read; pass "
                f"what it trained: --model.path MODEL --model.adapter {file.parent / 'adapter'}"
            )


def _with_source(argv: list[str]) -> list[str]:
    """The first word stands for ``--source`` and its value."""
    return ["--source", *argv] if argv and not argv[0].startswith("-") else argv


def rewards(argv: list[str]) -> int:
    """List the rewards, or run one on its examples or on a data file."""
    actions = {"list": _rewards_list, "test": _rewards_test}
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action in ("-h", "--help"):
        print("usage: rlsloth rewards list")
        print("       rlsloth rewards test SPEC [--data FILE] [--limit N]")
        return 0
    if action not in actions:
        raise UserError(
            f"rlsloth rewards {action}: no such action{nearest(action, list(actions))} "
            "(rlsloth rewards list, or rlsloth rewards test SPEC)"
        )
    return actions[action](rest)


def _rewards_list(argv: list[str]) -> int:
    def options() -> None:
        """List the rewards that ship with rlsloth."""

    _options(options, argv, "rlsloth rewards list")
    from rlsloth.cli.commands.rewards import list_rewards

    list_rewards()
    return 0


def _rewards_test(argv: list[str]) -> int:
    def options(
        spec: tyro.conf.Positional[str], data: Path | None = None, limit: int = 100
    ) -> tuple[str, Path | None, int]:
        """Score a reward's own examples, or the rows of a file.

        Args:
            spec: Name (math_verify), dotted path (pkg.module:function) or file (./mine.py:reward).
            data: File with rows to score; default: the reward's examples.
            limit: Rows read from the file at most.
        """
        return spec, data, limit

    chosen = _options(options, argv, "rlsloth rewards test")
    from rlsloth.cli.commands.rewards import test_reward

    return test_reward(*chosen)


def plan(argv: list[str]) -> int:
    """Say whether a run fits a GPU; exit status 1 when it does not."""
    about = (
        "Say what a training run needs of a GPU's memory, and whether it fits: from the model's "
        "configuration, without a GPU and without weights.\n\nThe options are those of training, "
        "--memory-gb, --longest-prompt, and --json to print JSON instead of a table. `rlsloth plan "
        "sft` and the like plan training on given answers."
    )
    if argv and argv[0] in GIVEN:
        return _plan_given(argv[0], argv[1:])
    _refuse_examples_config(argv, "plan")
    as_json = "--json" in argv
    config = read_config(
        PlanConfig, [word for word in argv if word != "--json"], "rlsloth plan", about
    )
    from rlsloth.cli.commands.plan import plan_grpo

    return plan_grpo(
        config,
        memory_gb=config.memory_gb,
        longest_prompt=config.longest_prompt,
        as_json=as_json,
    )


def _plan_given(name: str, argv: list[str]) -> int:
    """Of a run on given answers."""
    about = (
        f"Say what `rlsloth {name}` needs of a GPU's memory, and whether it fits: from the model's "
        "configuration and the data, without a GPU and without weights.\n\nThe options are those "
        "of training, --memory-gb, and --json to print JSON instead of a table."
    )
    kind: type[Any] = type("Plan", (Planned, GIVEN[name]), {"__module__": __name__})
    words = [word for word in argv if word != "--json"]
    config = read_config(kind, words, f"rlsloth plan {name}", about)
    from rlsloth.cli.commands.plan import plan_examples
    from rlsloth.data.preference import reader

    as_json = "--json" in argv
    return plan_examples(config, reader(config), memory_gb=config.memory_gb, as_json=as_json)


def doctor(argv: list[str]) -> int:
    """Say what this machine has, and what it lacks."""

    def options(json: bool = False, model: str | None = None) -> tuple[bool, str | None]:
        """Versions, GPU, memory, disk; exit status 1 when training cannot run here.

        Args:
            json: Print JSON instead of a table.
            model: Hub id, folder or GGUF file: also say which of its modules run on rlsloth's
                kernels. Only its configuration is read.
        """
        return json, model

    chosen = _options(options, argv, "rlsloth doctor")
    from rlsloth.cli.commands.doctor import run_doctor

    return run_doctor(*chosen)


def _options(function: Callable[..., Parsed], argv: list[str], prog: str) -> Parsed:
    return tyro.cli(function, args=argv, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
