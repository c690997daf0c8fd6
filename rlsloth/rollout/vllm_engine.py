"""The vLLM engine: samples in this process with vLLM, from a copy of the base and a handed-over
adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlsloth.records import Adapter, Completion, SamplingParams, UserError
from rlsloth.rollout.engine import BASE_VERSION, most_tokens
from rlsloth.rollout.vllm_start import first_line, start_vllm, stop_vllm
from rlsloth.seeding import derive_seed

COLDEST = 0.01
"""vLLM raises any temperature between 0 and this one to it."""


class VllmEngine:
    """vLLM behind the Engine protocol. Prefixes are cached and shared by whole blocks of tokens.

    Each loaded adapter has an identity of its own, which is part of vLLM's prefix-cache keys, so
    that keys and values of one adapter never serve another. A request whose adapter is gone fails.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        peft_config: Any,
        stop_ids: Sequence[int],
        context: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Start vLLM with a copy of ``model``'s base weights. Nothing samples before ``load``.

        Args:
            model: a transformers causal LM wrapped by PEFT; its base must not be quantised.
            peft_config: the LoraConfig of the adapters to come.

        Raises:
            UserError: vLLM is not installed, or a release that this engine does not know; it cannot
                run the model or such adapters.
        """
        self.version = 0
        self._stop_ids = sorted(stop_ids)
        self._context = context
        self._peft_config = peft_config.to_dict()
        self._request: Any = None
        """vLLM's name for the adapter that samples; None: for no adapter."""
        self._loads = 0
        self._llm = start_vllm(
            model.get_base_model(),
            tokenizer,
            peft_config=self._peft_config,
            context=context,
            max_sequences=max_sequences,
            dtype=dtype,
            device=device,
        )

    def load(self, adapter: Adapter) -> None:
        """Copy the adapter into vLLM under a new identity; the one before is removed.

        Raises:
            UserError: vLLM knows no module for some tensor, or a kind of adapter it cannot apply.
        """
        from vllm.lora.request import LoRARequest

        llm = self._live()
        self._request = None
        self._loads += 1
        # A copy: vLLM scales what it is given in place, and these are the live parameters.
        tensors = {_plain_name(n): p.detach().clone() for n, p in adapter.tensors.items()}
        try:
            llm.collective_rpc(_replace_adapter, args=(self._loads, tensors, self._peft_config))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"vLLM does not take the adapter: {first_line(error)}") from error
        name = f"version {adapter.version}, load {self._loads}"
        self._request = LoRARequest(name, self._loads, lora_path=f"in memory only: {name}")
        self.version = adapter.version

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """See Engine.base_model."""
        before = self.version, self._request
        self.version, self._request = BASE_VERSION, None
        try:
            yield
        finally:
            self.version, self._request = before

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See Engine.generate."""
        if 0 < sampling.temperature < COLDEST:
            raise UserError(
                f"vLLM samples at no temperature between 0 and {COLDEST}: pass 0 or at least "
                f"{COLDEST}, or --rollout.engine transformers"
            )
        llm = self._live()
        self._check_adapter()
        prompts, params = [], []
        for p, prefix in enumerate(prefixes):
            wanted = sampling.max_tokens if limits is None else limits[p]
            limit = most_tokens(prefix, wanted, self._context)
            for i in range(n):
                # A request and a seed for each: vLLM's own n gives all prompts the same seeds.
                prompts.append({"prompt_token_ids": list(prefix)})
                params.append(self._params(sampling, limit, derive_seed(sampling.seed, p, i)))
        with torch.random.fork_rng(devices=[]):  # vLLM draws from the global generator as well
            outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=self._request)
        completions = [self._completion(output.outputs[0]) for output in outputs]
        return [completions[p * n : (p + 1) * n] for p in range(len(prefixes))]

    def close(self) -> None:
        """Free weights and cache. The engine is of no use afterwards."""
        llm, self._llm, self._request = self._llm, None, None
        if llm is not None:
            stop_vllm(llm)

    def _live(self) -> Any:
        if self._llm is None:
            raise RuntimeError("this engine is closed")
        return self._llm

    def _check_adapter(self) -> None:
        """Refuse to sample from the base by mistake, or from an adapter that is gone."""
        if self.version == BASE_VERSION:
            return
        if self._request is None:
            raise RuntimeError("no adapter is loaded; the base samples only inside base_model()")
        if self._request.lora_int_id not in self._llm.llm_engine.list_loras():
            raise RuntimeError(f"the adapter of {self._request.lora_name} is no longer in vLLM")

    def _params(self, sampling: SamplingParams, limit: int, seed: int) -> Any:
        import vllm

        return vllm.SamplingParams(
            max_tokens=limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            ignore_eos=True,  # these ids, and no others of the model's
            stop_token_ids=self._stop_ids,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )

    def _completion(self, output: Any) -> Completion:
        token_ids = list(output.token_ids)
        steps = zip(token_ids, output.logprobs, strict=True)
        logprobs = [step[token].logprob for token, step in steps]
        if not all(x is not None and math.isfinite(x) for x in logprobs):
            raise UserError(
                f"the model's log-probs are not finite (policy version {self.version}): its "
                "weights are damaged, or the policy has diverged; lower --optim.lr"
            )
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM gave a completion up: {output.finish_reason}")
        return Completion(token_ids, logprobs, output.finish_reason, self.version)


def _plain_name(name: str) -> str:
    """The name a tensor has in a saved adapter: without the adapter's own name."""
    return re.sub(r"\.(lora_(?:embedding_)?[AB])\.[^.]+", r".\1", name)


def _replace_adapter(worker: Any, number: int, tensors: Any, peft_config: Any) -> None:
    """Runs on vLLM's worker: put the adapter where its own loader puts one it has read from disk.

    vLLM takes adapters from files only, so this reaches for one private name, _adapter_manager.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    outer = worker.model_runner.lora_manager
    manager = outer._adapter_manager
    outer.remove_all_adapters()
    helper = PEFTHelper.from_dict(peft_config)
    helper.validate_legal(outer.lora_config)
    mapper: Any = getattr(manager.model, "hf_to_vllm_mapper", None)
    if hasattr(mapper, "get_rename_mapper"):
        mapper = mapper.get_rename_mapper()
    lora = LoRAModel.from_lora_tensors(
        number,
        tensors,
        helper,
        device="cpu",
        dtype=outer.lora_config.lora_dtype,
        weights_mapper=mapper,
    )
    parts = {part for parts in manager.packed_modules.values() for part in parts}
    if unknown := sorted(set(lora.loras) - parts - set(manager.modules)):
        raise ValueError(f"it has no place for {unknown[0]} ({len(unknown)} modules)")
    widest = outer.lora_config.max_lora_rank
    if wide := [name for name, weights in lora.loras.items() if len(weights.lora_a) > widest]:
        raise ValueError(f"the rank of {wide[0]} exceeds {widest}")
    manager.add_adapter(lora)
    manager.activate_adapter(number)
