"""Reading configuration: files, flags, and which value wins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.reading import read
from rlsloth.cli.read_config import read_config
from rlsloth.config import GrpoConfig, Section
from rlsloth.config.distill import DistillConfig
from rlsloth.config.export import ExportConfig
from rlsloth.config.sft import SftConfig
from rlsloth.losses.preference.methods import DpoConfig


def test_no_arguments_are_the_defaults() -> None:
    assert read() == GrpoConfig()


def test_files_merge_deeply_and_flags_win(yaml_file: Path) -> None:
    yaml_file.write_text(
        "steps: 5\noptim: {lr: 1e-4, warmup_steps: 3}\nenv: {params: {a: 1, b: 2}}\n"
    )
    Path("more.yaml").write_text("optim:\n  warmup_steps: 4\nenv: {params: {b: 3}}\n")
    config = read("--seed", "7", "run.yaml", "--steps=6", "more.yaml", "--steps", "8")
    assert (config.seed, config.steps) == (7, 8)
    assert (config.optim.lr, config.optim.warmup_steps) == (1e-4, 4)
    assert config.env.params == {"a": 1, "b": 3}


def test_a_flag_before_a_file_still_wins(yaml_file: Path) -> None:
    yaml_file.write_text("steps: 5")
    assert read("--steps", "9", "run.yaml").steps == 9


def test_validation_waits_until_everything_is_merged(yaml_file: Path) -> None:
    yaml_file.write_text("reward: {weights: [1, 0.5]}\ngroup_size: 1\n")
    config = read("run.yaml", "--rewards", "a", "b", "--group-size", "4")
    assert config.reward.weights == [1, 0.5]


def test_saved_config_reads_back_equal(yaml_file: Path) -> None:
    import yaml

    config = read("--rewards", "math_verify", "./mine.py:reward", "--run.dir", "runs/x")
    yaml_file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert read("run.yaml") == config


@pytest.mark.parametrize("flag", ["--prompts-per-step", "--prompts_per_step"])
def test_dashes_and_underscores(flag: str) -> None:
    assert read(flag, "3").prompts_per_step == 3
    assert read(f"{flag}=3").prompts_per_step == 3


def test_lists(yaml_file: Path) -> None:
    yaml_file.write_text("steps: 5")
    config = read("--rewards", "a", "b", "run.yaml", "--optim.betas", "0.8", "0.95")
    assert config.rewards == ["a", "b"]
    assert config.optim.betas == (0.8, 0.95)
    assert config.steps == 5
    assert read("--rollout.stop=--- end").rollout.stop == ["--- end"]
    assert read("--rewards", "--reward.weights", "none").rewards == []


def test_mappings_are_typed() -> None:
    params = read(
        *("--env.params", "min_terms", "2", "rate", "3e-5", "half", "0.5", "strict", "true"),
        *("name", "a: b", "day", "2020-01-01", "--env.params.min-digits", "-1"),
    ).env.params
    assert params == {
        "min_terms": 2,
        "rate": 3e-5,
        "half": 0.5,
        "strict": True,
        "name": "a: b",
        "day": "2020-01-01",
        "min-digits": -1,
    }
    assert [type(value) for value in params.values()] == [int, float, float, bool, str, str, int]


def test_a_mapping_is_set_whole_or_by_key(yaml_file: Path) -> None:
    yaml_file.write_text("env: {params: {a: 1, b: 2}}")
    assert read("run.yaml", "--env.params.b", "3").env.params == {"a": 1, "b": 3}
    assert read("run.yaml", "--env.params", "b", "3").env.params == {"b": 3}
    assert read("run.yaml", "--env.params").env.params == {}
    both = read("run.yaml", "--env.params.c", "4", "--env.params", "b", "3", "--env.params.d", "5")
    assert both.env.params == {"b": 3, "d": 5}


def test_nested_mappings() -> None:
    config = read("--reward.params.length", "target", "200", "--reward.params.tags.strict", "false")
    assert config.reward.params == {"length": {"target": 200}, "tags": {"strict": False}}


def test_bools_and_none(yaml_file: Path) -> None:
    yaml_file.write_text("loss: {ratio: token}\nmodel: {revision: main}\nrun: {dir: runs/x}")
    config = read(
        "run.yaml", "--run.resume", "--model.gradient-checkpointing", "false", "--steps", "2"
    )
    assert config.run.resume is True
    assert config.model.gradient_checkpointing is False
    assert config.run.dir == Path("runs/x")
    none = read(
        "run.yaml", *["--loss.ratio", "none", "--model.revision", "None", "--run.dir", "null"]
    )
    assert none.loss.ratio is None
    assert none.model.revision is None
    assert none.run.dir is None
    assert read("--advantage.normalize", "none").advantage.normalize == "none"


def test_text_is_not_mistaken_for_numbers() -> None:
    assert read("--model.path", "360").model.path == "360"
    assert read("--model.revision", "1e5").model.revision == "1e5"


def test_negative_numbers_are_values() -> None:
    assert read("--eval.correct-at", "-1e-3").eval.correct_at == -1e-3


def test_exponents_in_yaml_are_numbers(yaml_file: Path) -> None:
    yaml_file.write_text("optim: {lr: 3e-5}\nenv: {params: {p: 1E-3, q: -2e4, r: e5, s: 1.5e+3}}")
    config = read("run.yaml")
    assert config.optim.lr == 3e-5
    assert config.env.params == {"p": 1e-3, "q": -2e4, "r": "e5", "s": 1.5e3}


def test_the_saved_config_of_a_run_means_its_folder(
    yaml_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("moved").mkdir()
    saved = Path("moved/config.yaml")
    saved.write_text("run: {dir: runs/x}")
    assert read("moved/config.yaml").run.dir == Path("runs/x"), "no run lies there"
    Path("moved/metrics.jsonl").touch()
    assert read("moved/config.yaml").run.dir == Path("moved")
    assert read("moved/config.yaml", "--run.dir", "runs/y").run.dir == Path("runs/y")
    Path("moved/next.yaml").write_text("run: {dir: runs/z}")
    assert read("moved/config.yaml", "moved/next.yaml").run.dir == Path("runs/z")
    monkeypatch.chdir("moved")
    assert read("config.yaml").run.dir == Path()


def test_sections_with_everything_commented_out(yaml_file: Path) -> None:
    yaml_file.write_text("optim:\n  # lr: 3e-5\nsteps: 4\n")
    assert read("run.yaml").steps == 4
    yaml_file.write_text("# nothing\n")
    assert read("run.yaml") == GrpoConfig()


# --- help ----------------------------------------------------------------------------------------


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--bogus", "--help")
    assert caught.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", printed.out).split())
    for section, field in GrpoConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for option in [f"{section}.{key}" for key in inner] if inner else [section]:
            assert f"--{option.replace('_', '-')} " in text
    for expected in ("model options", "optim options", "--steps INT", "(default: 100)"):
        assert expected in text
    assert (
        "Weight of the KL term to the starting policy; 0 skips the reference pass. (default: 0.0)"
        in text
    )


# --- the shipped files ---------------------------------------------------------------------------

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_configs_are_there() -> None:
    assert {"gsm8k.yaml", "reasoning_gym.yaml", "calculator.yaml"} <= {p.name for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_says_why(path: Path) -> None:
    config = read(str(path))
    assert config != GrpoConfig()
    assert path.read_text().startswith("# "), "begin with a comment: what it is for"


R1 = Path(__file__).parents[2] / "configs" / "r1.yaml"
COMMANDS: dict[str, type[Section]] = {
    "sft": SftConfig, "grpo": GrpoConfig, "distill": DistillConfig, "dpo": DpoConfig,
    "export": ExportConfig,
}  # fmt: skip


def test_commands_of_the_pipeline_are_understood() -> None:
    """Every command that configs/r1.yaml documents, with the file itself."""
    lines = re.findall(r"rlsloth (\w+) ([^#\n]*)", R1.read_text())
    assert {name for name, _ in lines} == set(COMMANDS)
    for name, words in lines:
        argv = [str(R1) if word == "configs/r1.yaml" else word for word in words.split()]
        argv = ["--source", *argv] if name == "export" else argv
        config: Any = read_config(COMMANDS[name], argv)
        if "configs/r1.yaml" in words:
            assert config.model.path == "Qwen/Qwen2.5-1.5B-Instruct"
