"""The kernel bench: its measurements, table, file and refused arguments."""

import subprocess
import sys

import pytest
import torch

from rlsloth.kernels import bench
from rlsloth.kernels.measure import Case, Result, measure

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def working():
    return lambda: torch.ones(1000).exp()


def missing():
    raise ImportError("no such project")


def broken():
    raise RuntimeError  # without a message


def failing():
    def run():
        raise AttributeError("renamed")

    return run


def test_a_peer_that_fails_is_named_and_left_out(capsys):
    peers = {"works": working, "missing": missing, "broken": broken, "failing": failing}
    case = Case("op", "T 1", working(), working(), "a copy", peers, lambda: 0.5)
    results = measure(case, CPU, peers=True, seconds=0.01)
    assert [r.name for r in results] == ["floor: a copy", "ours", "works"]
    assert [r.error for r in results] == [None, 0.5, None]
    assert all(r.time > 0 and r.memory > 0 for r in results)
    assert results[0].share == 1.0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()] == [
        f"op T 1: no {name}".split(":")[0] for name in ("missing", "broken", "failing")
    ]
    assert [r.name for r in measure(case, CPU, peers=False, seconds=0.01)][-1] == "ours"


def test_the_table_is_written_between_its_marks(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{bench.START}\nold\n{bench.END}\nafter\n")
    monkeypatch.setattr(bench, "README", readme)
    results = [
        Result("rope", "T 1", "floor: copy", 1.0, 1.0, 0.0, None),
        Result("rope", "T 1", "ours", 2.0, 0.5, 3.0, 1e-3),
    ]
    base = [Result("rope", "T 1", "ours", 4.0, 0.25, 3.0, 1e-3)]
    lines = bench.table(bench.with_base_rows(results, base))
    bench.write(lines)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{bench.END}\nafter\n")
    assert "old" not in text
    assert "| rope | T 1 | **ours** | 2.000 | 50% | 3 | 1.0e-03 |" in text
    assert "| rope | T 1 | base | 4.000 | 25% | 3 | 1.0e-03 |" in text


def test_every_op_has_cases():
    results = bench.run(["glu", "rope"], CPU, peers=False)
    assert {r.op for r in results} == {"glu", "rope"}
    assert sum(r.name == "ours" for r in results) >= 4


@pytest.mark.parametrize("argument", ["ropes", "--bases"])
def test_what_it_does_not_know_is_refused(argument):
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "rlsloth.kernels.bench", argument],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert argument in ran.stderr.splitlines()[-1]
