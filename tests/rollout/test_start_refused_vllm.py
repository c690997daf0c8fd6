"""Models and releases with which vLLM is not started."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from helpers.vllm_weights import make, start  # noqa: F401
from rlsloth.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def policy(make: Any) -> Any:
    return make()


def test_a_model_that_vllm_does_not_know_is_refused(policy, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm.ModelRegistry, "get_supported_archs", lambda: set())
    refused = pytest.raises(UserError, match="vLLM does not support LlamaForCausalLM")
    with refused, start(policy):
        pass


@pytest.mark.parametrize("version", ["0.25.3", "0.33.0", "1.0"])
def test_other_releases_are_refused(policy, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with (
        pytest.raises(UserError, match=rf"vllm {version} .*0\.26 to 0\.32.*pip install"),
        start(policy),
    ):
        pass


def test_without_vllm_the_error_says_how_to_install_it(policy, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    refused = pytest.raises(UserError, match=r"not installed: run pip install")
    with refused, start(policy):
        pass
