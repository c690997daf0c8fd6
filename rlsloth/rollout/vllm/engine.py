"""The vLLM engine: samples in the trainer's process from the trainer's base model and a copy of its
adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from rlsloth.errors import UserError, first_line
from rlsloth.memory.out_of_memory import free_memory
from rlsloth.policy.gpu_limit import raise_limit
from rlsloth.policy.whole import WholeModel
from rlsloth.records import Completion, SamplingParams, Weights
from rlsloth.rollout.engine import BASE_VERSION, most_tokens
from rlsloth.rollout.vllm.adapter import clear, fill
from rlsloth.rollout.vllm.requests import PartialCompletion, check_temperature, request_params
from rlsloth.rollout.vllm.start import start_vllm, stop_vllm
from rlsloth.seeding import derive_seed


class VllmEngine:
    """vLLM behind the Engine protocol. Prefixes are cached and shared by whole blocks of tokens.

    ``set_weights`` empties the cache: keys and values of one adapter never serve another.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        context: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache: str,
        kv_bytes: int,
        kv_stays: bool = False,
    ) -> None:
        """Start vLLM on ``model``'s base weights. Call ``set_weights`` before ``generate``.

        Args:
            model: a transformers causal LM wrapped by PEFT; its base is in NF4 or not quantised.
            tokenizer: the model's, to find stop strings; None if no call has any.
            stop_ids: tokens that end a completion.
            context: tokens of the longest prompt with its completion.
            max_sequences: sequences that are decoded in one step at most.
            dtype: compute type.
            device: the model's device.
            kv_cache: type of the key-value cache: auto (the model's), fp8, fp8_per_token_head.
            kv_bytes: size of the key-value cache in bytes.
            kv_stays: whether ``release`` keeps the key-value cache.

        Raises:
            UserError: vLLM is not installed or of an unsupported release, or it cannot run the
                model.
        """
        self.version = 0
        self.max_sequences = max_sequences
        self._finds_strings = tokenizer is not None
        self._stop_ids = sorted(stop_ids)
        self._context = context
        self._adapter: Weights | None = None
        """The adapter in use; None: none is loaded, or the base model samples."""
        self._device, self._kv_bytes = device, kv_bytes
        self._sleeps = device.type == "cuda" and not kv_stays
        self._asleep = False
        self._interrupted = threading.Event()
        self._broken = False
        """Whether vLLM has failed; the engine can then only be closed."""
        self._whole = model if isinstance(model, WholeModel) else None
        self._llm, self._loaded = start_vllm(
            model,
            tokenizer,
            context=context,
            max_sequences=max_sequences,
            dtype=dtype,
            device=device,
            kv_cache=kv_cache,
            kv_bytes=kv_bytes,
        )

    def set_weights(self, weights: Weights) -> None:
        """Copy the adapter into vLLM's layers, and drop prefixes cached under the last one.

        Weights of a model that trains them are shared already; only norms and biases are copied.

        Raises:
            UserError: the weights are of another model, or vLLM cannot apply one of its tensors.
        """
        if weights.kind == "all" and self._whole is None:
            raise UserError(
                "--rollout.engine vllm takes adapters, or the weights of the model that it was "
                "started on: pass --rollout.engine transformers"
            )
        self._adapter = None
        self._fill(weights)
        self._forget()
        self._adapter = weights
        self.version = weights.version

    def _fill(self, weights: Weights) -> None:
        if self._loaded.copy_rest is not None:
            self._loaded.copy_rest()
        else:
            fill(self._loaded.slots, weights.tensors)

    def _forget(self) -> None:
        if not self._asleep and not self._live().reset_prefix_cache():
            raise RuntimeError(
                "a bug in rlsloth: vLLM kept cached prefixes, since a request is still running"
            )

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """See Engine.base_model."""
        adapter, version = self._adapter, self.version
        self._adapter, self.version = None, BASE_VERSION
        try:
            with nullcontext() if self._whole is None else self._whole.disable_adapter():
                if self._loaded.copy_rest is not None:
                    self._loaded.copy_rest()
                else:
                    clear(self._loaded.slots)
                self._forget()
                yield
        finally:
            self.version = version
            if adapter is not None and not self._broken:
                self.set_weights(adapter)

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """See Engine.generate.

        An error of vLLM is not tried again: its requests and cache are then in an unknown state.
        """
        check_temperature(sampling.temperature)
        if sampling.stop and not self._finds_strings:  # vLLM would ignore them silently
            raise RuntimeError(
                "a bug in rlsloth: this engine was opened without a tokenizer, which stop strings "
                "need"
            )
        self._live()
        if self._adapter is None and self.version != BASE_VERSION:
            raise RuntimeError(
                "a bug in rlsloth: no adapter is loaded; call set_weights, or generate inside "
                "base_model()"
            )
        self._wake()
        requests: dict[str, tuple[Sequence[int], Any]] = {}
        for p, prefix in enumerate(prefixes):
            wanted = sampling.max_tokens if limits is None else limits[p]
            limit = most_tokens(prefix, wanted, self._context)
            for i in range(n):
                # One request and seed for each: vLLM's n gives all prompts the same seeds.
                seed = derive_seed(sampling.seed, p, i)
                params = request_params(sampling, limit, seed, self._stop_ids)
                requests[f"{p} {i}"] = prefix, params
        groups: list[list[Completion]] = [[] for _ in prefixes]
        found: dict[str, Completion] = {}
        with torch.random.fork_rng(devices=[]):  # vLLM also uses the global generator
            for name, completion in self._run(requests, sampling.cut_tail):
                found[name] = completion
                p = int(name.split()[0])
                names = [f"{p} {i}" for i in range(n)]
                if all(name in found for name in names):
                    groups[p] = [found[name] for name in names]
                    if done is not None:
                        done(p, groups[p])
        self._check_used()
        return groups

    def _run(
        self, requests: Mapping[str, tuple[Sequence[int], Any]], cut_tail: float
    ) -> Iterator[tuple[str, Completion]]:
        """Run requests by name, and yield each completion as it finishes."""
        from vllm.inputs import tokens_input

        engine = self._live().llm_engine
        running = {name: PartialCompletion() for name in requests}
        try:
            for name, (prefix, params) in requests.items():
                prompt = tokens_input(list(prefix))
                engine.add_request(name, prompt, params)
            while running:
                if self._interrupted.is_set():
                    raise RuntimeError("sampling was interrupted")
                for output in self._step(engine):
                    partial = running[output.request_id]
                    partial.add(output.outputs[0])
                    if output.finished:
                        del running[output.request_id]
                        yield output.request_id, partial.completion(self.version)
                if len(requests) - len(running) >= cut_tail * len(requests):
                    cut = [name for name, partial in running.items() if partial.token_ids]
                    engine.abort_request(cut)
                    for name in cut:
                        yield name, running.pop(name).completion(self.version)
        finally:
            if not self._broken:
                engine.abort_request(list(running))

    def _step(self, engine: Any) -> Any:
        try:
            return engine.step()
        except Exception as error:
            self._broken = True
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"vLLM failed while sampling ({type(error).__name__}: {first_line(error)}); "
                "continue from the last checkpoint with --run.resume, or pass --rollout.engine "
                "transformers"
            ) from error

    def release(self) -> None:
        """Free the key-value cache with its prefixes, unless it stays. See Engine.release."""
        if not self._asleep and self._sleeps:
            self._live().sleep(level=1)
            raise_limit(self._kv_bytes, self._device)
            self._asleep = True

    def interrupt(self) -> None:
        """See Engine.interrupt."""
        self._interrupted.set()

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # memory that the update has freed
            try:
                self._live().wake_up()
            except RuntimeError as error:
                raise torch.OutOfMemoryError(
                    f"not enough free memory for vLLM's key-value cache: {first_line(error)}"
                ) from error
            raise_limit(-self._kv_bytes, self._device)
            self._asleep = False

    def close(self) -> None:
        """Stop vLLM and free its memory. The engine cannot be used afterwards."""
        if self._llm is None:
            return
        with suppress(torch.OutOfMemoryError):
            self._wake()  # vLLM cannot free the cache while it sleeps
        with suppress(Exception) if self._broken else nullcontext():
            stop_vllm(self._llm)
        self._llm = self._whole = None
        self._loaded.clear()
        with suppress(Exception) if self._broken else nullcontext():
            free_memory()

    def _live(self) -> Any:
        if self._llm is None:
            raise RuntimeError("a bug in rlsloth: this engine is closed")
        return self._llm

    def _check_used(self) -> None:
        """Refuse a model if vLLM computes an adapted layer without calling it."""
        if unused := [slot for slot in self._loaded.slots if not slot.used]:
            raise UserError(
                f"vLLM ignores the adapter on {unused[0].parts[0].adapted.path} ({len(unused)} "
                "layers); pass --rollout.engine transformers or other --lora.targets"
            )
