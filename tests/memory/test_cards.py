"""Cards by name: their memory, and the bus to the host."""

from __future__ import annotations

import re

import pytest

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli
from rlsloth.errors import UserError
from rlsloth.memory.cards import CARDS, UNKNOWN, card_of_device, find_card


@pytest.mark.parametrize(
    ("name", "bus"),
    [
        ("RTX 3090", 25e9), ("RTX 4090", 25e9), ("A100 80GB", 25e9), ("RTX 4060", 12.5e9),
        ("H100", 50e9), ("H200", 50e9), ("RTX 5090", 50e9), ("T4", 12e9), ("V100 32GB", 12e9),
    ],
)  # fmt: skip
def test_the_bus_of_a_card(name: str, bus: float) -> None:
    assert find_card(name).bus == bus


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 8GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_a_device_has_the_speeds_of_its_card(device: str, card: str) -> None:
    found, named = card_of_device(device), CARDS[card]
    assert (found.tflops, found.bus) == (named.tflops, named.bus)


@pytest.mark.parametrize("device", ["NVIDIA T400 4GB", "AMD Instinct MI300X", ""])
def test_other_devices_are_unknown(device: str) -> None:
    assert card_of_device(device) is UNKNOWN


def test_a_name_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu 'RTX 4091'.*RTX 4090.*--memory-gb"):
        find_card("RTX 4091")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("V100", "did you mean 'V100 16GB' or 'V100 32GB'?"),
        ("A100", "did you mean 'A100 40GB' or 'A100 80GB'?"),
        ("RTX 4060 Ti", "did you mean 'RTX 4060 Ti 8GB' or 'RTX 4060 Ti 16GB'?"),
        ("NVIDIA H100 80GB HBM3", "did you mean 'H100'?"),
        ("NVIDIA A100-SXM4-80GB", "did you mean 'A100 40GB' or 'A100 80GB'?"),
        ("4090", "did you mean 'RTX 4090'?"),
        ("RTX 3060 12GB", "did you mean 'RTX 3060'?"),
        ("H100 PCIe", "did you mean 'H100'?"),
        ("RTX 4900", "did you mean 'RTX 4090'?"),
    ],
)
def test_a_cards_name_that_is_not_in_the_table_leads_to_it(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=re.escape(meant)):
        find_card(typed)


def test_a_laptops_card_is_named_as_its_driver_names_it() -> None:
    assert find_card("NVIDIA GeForce RTX 4090 Laptop GPU").mib == 16376
    assert card_of_device("NVIDIA GeForce RTX 4060 Laptop GPU") is CARDS["RTX 4060 Laptop"]


def test_no_card_is_named_by_nothing() -> None:
    with pytest.raises(UserError, match=r"no such card \("):
        find_card("")


def test_a_card_without_bf16_is_planned_in_fp16(capsys, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    command = ["plan", "sft", "--model.path", str(tmp_path), "--gpu", "T4", "--data.heldout", "1"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "abc"}\n{"text": "def"}\n')
    command += ["--data.train", str(rows)]
    assert cli.main(command) == 0
    assert "base: linears, fp16" in capsys.readouterr().out
    assert cli.main([*command, "--model.precision", "nf4"]) == 0
    assert "base: embeddings, 16 bits" in capsys.readouterr().out
    assert cli.main([*command, "--model.precision", "bf16"]) == 2
    assert "bf16: this card has no bf16" in capsys.readouterr().err
    assert cli.main([*command, "--model.attention", "fa4"]) == 2
    assert "--model.attention fa4: this card has none of it" in capsys.readouterr().err
    command[command.index("T4")] = "RTX 3060"
    assert cli.main(command) == 0
    assert "base: linears, bf16" in capsys.readouterr().out
