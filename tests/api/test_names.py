"""The public names of the package: loaded on first use, known to type checkers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rlsloth
from helpers.source import ROOT
from rlsloth.losses.preference import methods


def test_every_name_is_found_and_listed() -> None:
    for name in rlsloth.__all__:
        assert getattr(rlsloth, name).__name__.split(".")[-1] == name or name == "Message"
    assert set(rlsloth.__all__) <= set(dir(rlsloth))
    assert rlsloth.__all__ == sorted(rlsloth.__all__)


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse((ROOT / "rlsloth" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == rlsloth._MODULES
    assert sorted(typed) == rlsloth.__all__


def test_every_command_that_trains_has_a_function() -> None:
    for name in ("grpo", "sft", *methods.METHODS):
        parameters = inspect.signature(getattr(rlsloth, name)).parameters
        assert {"config", "rewards", "data", "validation", "environment"} == set(parameters)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'grpoo'"):
        rlsloth.grpoo  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="grpoo"):
        from rlsloth import grpoo  # type: ignore[attr-defined]  # noqa: F401


def test_functions_and_configurations_load_no_torch() -> None:
    code = (
        "import sys, rlsloth\n"
        "for name in rlsloth.__all__:\n    getattr(rlsloth, name)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_pyright_sees_the_defaults_of_settings() -> None:
    """It takes a setting for required whose default is not passed by keyword."""
    for path in [*(ROOT / "rlsloth/config").glob("*.py"), Path(methods.__file__)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field":
                assert not node.args, f"{path}:{node.lineno}"
