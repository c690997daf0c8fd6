"""Finding a policy loss by name or in a file, and what is refused before a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.micro_batches import make_micro
from rlsloth.cli import main as cli
from rlsloth.config import LossConfig
from rlsloth.errors import UserError
from rlsloth.losses.base import OPTIONS, PolicyLoss, ScoredTokens, token_budget
from rlsloth.losses.opening import open_loss
from rlsloth.losses.policy_loss import policy_loss
from rlsloth.losses.variants import EQUALS, VARIANTS

CHANGED: dict[str, Any] = {
    "ratio": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 9.0,
}  # fmt: skip
"""A value of each option that is not its default."""
MINE = """
import torch
from rlsloth.losses.base import PolicyLoss, Surrogate, token_budget

def loss(tokens, cfg):
    return -tokens.ratio * tokens.advantages

entry = PolicyLoss(loss, normalizer=token_budget, reads=frozenset({"ratio"}))
"""


def refusal(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_loss(LossConfig(**options))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for losses, called mine.py, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("name", VARIANTS)
def test_built_in_losses_are_found_with_a_source(name: str) -> None:
    assert open_loss(LossConfig(name=name)) is VARIANTS[name]
    assert "arXiv:" in VARIANTS[name].about


def test_a_mistyped_name_gets_the_nearest_and_all_names() -> None:
    text = refusal(name="grop")
    assert "loss.name 'grop'; did you mean 'grpo'?" in text
    assert ", ".join(VARIANTS) in text
    assert "./file.py:name" in text


@pytest.mark.parametrize("command", ["grpo", "plan"])
def test_the_command_refuses_a_name_at_once(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--loss.name", "grop"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'grop'; did you mean 'grpo'?" in line


def test_bnpo_is_named_as_equal_to_dapo() -> None:
    text = refusal(name="bnpo")
    assert "bnpo equals dapo" in text
    assert "tokens of the whole step" in text
    assert "--loss.name dapo" in text
    assert not EQUALS.keys() & VARIANTS.keys()
    assert {name for name, _ in EQUALS.values()} <= VARIANTS.keys()


class Spy:
    """A configuration that notes which options of OPTIONS are read."""

    def __init__(self, cfg: LossConfig) -> None:
        self._cfg = cfg
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONS:
            self.read.add(name)
        return getattr(self._cfg, name)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loss_reads_just_the_options_that_it_declares(name: str) -> None:
    micro = make_micro([2, 1], torch.tensor([1.0, 1.0, -2.0]), torch.zeros(3))
    spy: Any = Spy(LossConfig(name=name))
    loss = VARIANTS[name]
    policy_loss(loss, -torch.ones(3), micro, spy, old_logprobs_N=None, reference_logprobs_N=None)
    assert spy.read == loss.reads


@pytest.mark.parametrize("option", sorted(OPTIONS))
@pytest.mark.parametrize("name", VARIANTS)
def test_an_option_without_effect_is_refused(name: str, option: str) -> None:
    if option in VARIANTS[name].reads:
        assert open_loss(LossConfig(name=name, **{option: CHANGED[option]}))
        return
    text = refusal(name=name, **{option: CHANGED[option]})
    assert f"loss.{option} {CHANGED[option]} has no effect with loss.name {name}" in text
    default = LossConfig.model_fields[option].default  # as a saved config.yaml writes it out
    assert open_loss(LossConfig(name=name, **{option: default}))


def test_cispo_ignores_the_lower_epsilon_and_delta() -> None:
    assert {"epsilon_low", "delta"} == OPTIONS - VARIANTS["cispo"].reads


def test_the_table_is_read_without_torch() -> None:
    code = (
        "import sys; from rlsloth.losses.opening import open_loss; "
        "from rlsloth.config import LossConfig; open_loss(LossConfig()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_more_entry_is_a_loss_like_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line in the table is all: it opens, has its options checked, and is in the help."""

    def reinforce(tokens: ScoredTokens, cfg: LossConfig) -> Tensor:
        return -tokens.advantages * tokens.logprobs

    entry = PolicyLoss(reinforce, "REINFORCE (Williams 1992)", reads=frozenset({"ratio"}))
    monkeypatch.setitem(VARIANTS, "reinforce", entry)
    loss = open_loss(LossConfig(name="reinforce"))
    logprobs_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    micro = make_micro([1, 1], torch.tensor([1.0, -3.0]), torch.zeros(2))
    output = policy_loss(
        loss, logprobs_N, micro, LossConfig(), old_logprobs_N=None, reference_logprobs_N=None
    )
    assert output.total.item() == 1.0 - 6.0
    assert (output.stats.clipped_low, output.stats.clipped_high) == (0, 0)
    assert "loss.delta 2.0 has no effect" in refusal(name="reinforce", delta=2.0)
    with pytest.raises(SystemExit):
        cli.main(["grpo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "reinforce: REINFORCE (Williams 1992)" in shown
    assert "--loss.name {grpo,dr_grpo,dapo,gspo,cispo,reinforce}|" in shown


# A user's own


def test_a_function_or_an_entry_from_a_file(mine: Path) -> None:
    mine.write_text(MINE)
    plain, entry = (open_loss(LossConfig(name=f"./mine.py:{n}")) for n in ("loss", "entry"))
    assert plain.normalizer is VARIANTS["dapo"].normalizer
    assert plain.reads == OPTIONS
    assert entry.normalizer is token_budget
    assert entry.reads == {"ratio"}
    text = refusal(name="./mine.py:entry", epsilon_low=0.1)
    assert "loss.epsilon_low 0.1 has no effect with loss.name ./mine.py:entry" in text


def test_an_edited_file_is_read_again_in_the_same_process(mine: Path) -> None:
    mine.write_text(MINE)
    first = open_loss(LossConfig(name="./mine.py:loss"))
    mine.write_text(MINE + "\n# edited\n")
    assert open_loss(LossConfig(name="./mine.py:loss")).surrogate is not first.surrogate


def test_a_loss_from_a_module(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(mine.parent)
    package = mine.parent / "own_losses"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "first.py").write_text(MINE)
    assert open_loss(LossConfig(name="own_losses.first:entry")).normalizer is token_budget
    assert "has no 'entri'; did you mean 'entry'?" in refusal(name="own_losses.first:entri")


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("x = 1", ["has no 'loss'"]),
        ("loss = 3", ["is a int, not a function or a PolicyLoss"]),
        ("def loss(tokens): ...", ["is called with (tokens, cfg)", "it takes (tokens)"]),
        ("def loss(tokens, cfg, more): ...", ["is called with (tokens, cfg)", "more"]),
        ("def loss(tokens, cfg): return 1 / 0", ["raised ZeroDivisionError", "mine.py:1"]),
        ("def loss(tokens, cfg): return tokens.logprob", ["raised AttributeError", "logprob"]),
        ("def loss(tokens, cfg): return 0.5", ["returned a float, not a tensor", "6 tokens"]),
        ("def loss(tokens, cfg): return tokens.ratio.sum()", ["shape []", "each of the 6 tokens"]),
        ("def loss(tokens, cfg): return tokens.ratio[None]", ["shape [1, 6]", "not yet summed"]),
        ("def loss(tokens, cfg): return tokens.ratio * float('nan')", ["6 of 6", "not finite"]),
        ("def loss(tokens, cfg): return (tokens.advantages * tokens.logprobs).log()",
         ["4 of 6 losses are not finite", "log-prob -0.5, advantage 1"]),
        ("def loss(tokens, cfg): return tokens.ratio.detach()", ["has no gradient", "detach()"]),
        ("def loss(tokens, cfg): return (tokens.ratio - tokens.ratio).sqrt()",
         ["gradient that is not finite"]),
        ("from rlsloth.losses.base import *\n"
         "loss = PolicyLoss(lambda tokens, cfg: tokens.ratio, reads=frozenset({'tau'}))",
         ["reads ['tau']", "epsilon_low"]),
        ("from rlsloth.losses.base import *\n"
         "loss = PolicyLoss(lambda tokens, cfg: tokens.ratio, total=lambda values: values.sum())",
         ["raised TypeError", "takes 1 positional argument"]),
    ],
)  # fmt: skip
def test_mistakes_of_a_users_loss(mine: Path, code: str, facts: list[str]) -> None:
    mine.write_text(code)
    text = refusal(name="./mine.py:loss")
    assert text.startswith("loss.name './mine.py:loss'")
    for fact in facts:
        assert fact in text


def test_a_missing_file(mine: Path) -> None:
    assert "no file mine.py" in refusal(name="./mine.py:loss")
    assert str(mine.parent) in refusal(name="./mine.py:loss")


def test_nan_on_real_tokens_is_the_losss_mistake_only_where_the_log_probs_are_sound(
    mine: Path,
) -> None:
    mine.write_text("def loss(tokens, cfg): return (tokens.logprobs + 4).sqrt()")
    loss = open_loss(LossConfig(name="./mine.py:loss"))

    def compute(logprobs_N: Tensor) -> float:
        micro = make_micro([2], torch.ones(2), torch.zeros(2))
        cfg = LossConfig()
        return policy_loss(
            loss, logprobs_N, micro, cfg, old_logprobs_N=None, reference_logprobs_N=None
        ).total.item()

    with pytest.raises(UserError, match=r"1 of 2 losses are not finite.*log-prob -9"):
        compute(torch.tensor([-1.0, -9.0]))
    assert compute(torch.tensor([-1.0, float("nan")])) != 0  # NaN: the loop skips the step
