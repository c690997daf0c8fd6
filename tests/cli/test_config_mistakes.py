"""Mistakes in configuration: one clear line for each, with the value and its source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ConfigDict, Field

from helpers.reading import mistakes
from rlsloth.cli.read_config import read_config
from rlsloth.config import Section
from rlsloth.errors import UserError

# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--optim.lrr 3", "--optim.lrr: unknown option; did you mean '--optim.lr'?"),
        ("--stepz=3", "--stepz: unknown option; did you mean '--steps'?"),
        ("--lr 3", "--lr: unknown option; did you mean '--optim.lr'?"),
        ("--optimizer.lr 3", "--optimizer.lr: unknown option; did you mean '--optim.lr'?"),
        ("--learning_rate 3", "--learning_rate: unknown option; did you mean '--optim.lr'?"),
        ("--learning-rate=3", "did you mean '--optim.lr'?"),
        ("--num_generations 4", "did you mean '--group-size'?"),
        (
            "--per_device_train_batch_size 4",
            "did you mean '--prompts-per-step' or '--group-size'?",
        ),
        ("--max_completion_length 4", "did you mean '--rollout.max-tokens'?"),
        ("--actor.kl_loss_coef 4", "did you mean '--loss.beta'?"),
        ("--rewards a --rewards b", "--rewards is passed twice: pass it once, --rewards a b"),
        ("--rollout.stop=x --rollout.stop=y", "pass it once, --rollout.stop x y"),
        ("--xyzzy", "--xyzzy: unknown option (see rlsloth grpo --help)"),
        (
            "--steps abc",
            "--steps abc: must be a valid integer, unable to parse string as an integer",
        ),
        ("--optim.lr -3", "--optim.lr -3: must be greater than or equal to 0"),
        ("--optim.lr nan", "--optim.lr nan: must be a finite number"),
        ("--eval.correct-at=-inf", "--eval.correct-at -inf: must be a finite number"),
        ("--optim.betas 0.9 1", "--optim.betas 1: must be less than 1"),
        ("--reward.wall-seconds 1e9", "must be less than or equal to 86400"),
        ("--reward.memory-gb 1e9", "must be less than or equal to 65536"),
        ("--rollout.stop=", "--rollout.stop '': must not be empty"),
        ("--run.dir=", "--run.dir '': must not be empty"),
        ("--warmup_steps 3", "did you mean '--optim.warmup-steps'?"),
        ("--advantage.normalize bach", "; did you mean 'batch'?"),
        ("--advantage.normalize bach", "--advantage.normalize bach: must be 'group', 'batch', "),
        ("--optim.betas 0.9", "--optim.betas ['0.9']: has too few values"),
        ("--steps", "--steps needs a value"),
        ("--steps --seed 3", "--steps needs a value"),
        ("--steps 3 4", "unexpected argument '4'"),
        ("-steps 3", "unexpected argument '-steps'"),
        ("--optim 3", "--optim is a section"),
        ("--env.params a", "--env.params needs pairs of key and value, but got 1 words: ['a']"),
        ("--reward.params a b", "--reward.params needs REWARD NAME VALUE"),
        ("--steps.more 3", "--steps.more"),
        ("--reward.weights 1 2 --rewards a", "reward.weights has 2 numbers for 1 rewards"),
        ("--loss.correction token_mask --rollout.top-p 0.9", "leave out rollout.top_p"),
        ("--loss.gap-action correct --rollout.top-k 5", "leave out rollout.top_p"),
        ("--loss.gap-action stop --rollout.min-p 0.1", "leave out rollout.top_p"),
        ("--loss.gap-action correct --loss.correction token_mask", "leave out one of them"),
        ("--rollout.cut-tail 0", "--rollout.cut-tail 0: must be greater than 0"),
        ("--rollout.cut-tail 1.1", "--rollout.cut-tail 1.1: must be less than or equal to 1"),
        ("absent.yaml", "absent.yaml: cannot be read: No such file or directory"),
    ],
)
def test_mistakes_in_flags(argv: str, line: str) -> None:
    assert any(line in found for found in mistakes(*argv.split())), mistakes(*argv.split())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lrr: 3}", "run.yaml: unknown key optim.lrr; did you mean 'optim.lr'?"),
        ("lr: 3", "run.yaml: unknown key lr; did you mean 'optim.lr'?"),
        ("output_dir: x", "run.yaml: unknown key output_dir; did you mean 'run.dir'?"),
        ("temperature: 3", "did you mean 'rollout.temperature' or 'eval.temperature'?"),
        ("groupsize: 4", "run.yaml: unknown key groupsize; did you mean 'group_size'?"),
        ("steps: 0", "run.yaml: steps = 0: must be greater than or equal to 1"),
        ("steps: true", "run.yaml: steps = True: must be a number, not true"),
        ("optim: {lr: yes}", "run.yaml: optim.lr = True: must be a number, not true"),
        ("optim: {betas: [off, 0.9]}", "must be a number, not false"),
        ("optim: {lr: .inf}", "run.yaml: optim.lr = inf: must be a finite number"),
        ("run: {dir: ''}", "run.yaml: run.dir = '': must not be empty"),
        ("steps: [1]", "run.yaml: steps = [1]: must be a valid integer"),
        ("optim: 3", "run.yaml: optim = 3: must be a section, with its keys indented below it"),
        ("rewards: math_verify", "run.yaml: rewards = 'math_verify': must be a valid list"),
        ("rewards: [a, 3]", "run.yaml: rewards = 3: must be a valid string"),
        ("env: {params: {a: [1]}}", "run.yaml: env.params.a = [1]: must be true or false or "),
        ("steps: 3\noptim: {lr: 3", "run.yaml, line 2: expected ',' or '}'"),
        ("steps: 3\n\tseed: 3", "run.yaml, line 2: found character '\\t'"),
        ("steps: 3\nseed: 1\nsteps: 4", "run.yaml, line 3: duplicate key 'steps'"),
        ("steps: 3\non: 1", "run.yaml, line 2: key True is not text; put it in quotes"),
        ("- steps", "run.yaml: contains a list, not keys"),
        ("steps", "run.yaml: contains text, not keys"),
        (
            "run: !!python/object/apply:os.getcwd []",
            "could not determine a constructor for the tag",
        ),
    ],
)
def test_mistakes_in_files(yaml_file: Path, text: str, line: str) -> None:
    yaml_file.write_text(text)
    found = mistakes("run.yaml")
    assert len(found) == 1
    assert line in found[0]


def test_binary_file_is_named(yaml_file: Path) -> None:
    yaml_file.write_bytes(b"\x00\xff\xfe\x00steps")
    assert mistakes("run.yaml")[0].startswith("run.yaml: not YAML: ")


def test_all_mistakes_at_once(yaml_file: Path) -> None:
    yaml_file.write_text("steps: 0\noptim: {lrr: 1}\nrun: {keep: 0}\n")
    found = mistakes("run.yaml", "absent.yaml", "--seed", "x", "--bogus", "1", "--eval.samples")
    assert [re.split(r"[: ]", line)[0] for line in sorted(found)] == [
        *("--bogus", "--eval.samples", "--seed", "absent.yaml"),
        *["run.yaml"] * 3,
    ]


def test_the_source_of_a_mistake_is_the_last_that_gave_the_value(yaml_file: Path) -> None:
    yaml_file.write_text("steps: 0\nseed: x\n")
    Path("more.yaml").write_text("seed: y\n")
    first, second = sorted(mistakes("run.yaml", "more.yaml", "--steps", "-1"))
    assert first.startswith("--steps -1: must be greater than or equal to 1")
    assert second.startswith("more.yaml: seed = 'y': must be a valid integer")


def test_a_group_of_one_is_refused_with_the_limit() -> None:
    (line,) = mistakes("--group-size", "1")
    assert line.startswith("--group-size 1: must be greater than or equal to 2")


def test_a_refused_value_comes_with_the_docstring_of_its_field() -> None:
    class Toy(Section):
        model_config = ConfigDict(use_attribute_docstrings=True)
        group_size: int = Field(8, ge=2)
        """Advantages compare completions with
        each other, so at least 2."""

    with pytest.raises(UserError) as caught:
        read_config(Toy, ["--group-size", "1"])
    assert str(caught.value) == (
        "--group-size 1: must be greater than or equal to 2 "
        "(Advantages compare completions with each other, so at least 2.)"
    )


def test_long_values_are_cut() -> None:
    (line,) = mistakes("--steps", "9" * 50 + "x" * 500)
    assert len(line) < 200


def test_settings_of_a_section_that_contradict_each_other(yaml_file: Path) -> None:
    wrong = "loss: correction_min 5.0 exceeds correction_max 2.0"
    assert mistakes("--loss.correction-min", "5", "--loss.correction-max", "2") == [wrong]
    yaml_file.write_text("loss: {correction_min: 5, correction_max: 2}\n")
    assert mistakes("run.yaml") == [f"run.yaml: {wrong}"]
