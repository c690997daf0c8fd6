"""The vLLM engine: samples in this process with vLLM, from the base that trains and a handed-over
adapter."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from rlsloth.errors import UserError, first_line
from rlsloth.memory.out_of_memory import free_memory
from rlsloth.records import Completion, SamplingParams, Weights
from rlsloth.rollout.engine import BASE_VERSION, most_tokens
from rlsloth.rollout.vllm.adapter import clear, fill
from rlsloth.rollout.vllm.start import start_vllm, stop_vllm
from rlsloth.seeding import derive_seed

COLDEST = 0.01
"""vLLM raises any temperature between 0 and this one to it."""


def check_temperature(temperature: float) -> None:
    """Raises UserError for one at which vLLM does not sample."""
    if 0 < temperature < COLDEST:
        raise UserError(
            f"vLLM samples at no temperature between 0 and {COLDEST}: pass 0 or at least "
            f"{COLDEST}, or --rollout.engine transformers"
        )


class VllmEngine:
    """vLLM behind the Engine protocol. Prefixes are cached and shared by whole blocks of tokens.

    With each adapter the cache begins anew: keys and values of one never serve another.
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
        """Start vLLM on ``model``'s base weights. Nothing samples before ``set_weights``.

        Args:
            model: a transformers causal LM wrapped by PEFT; its base is not quantised or in NF4.
            tokenizer: the model's, to look for stop strings. Without it there can be none.
            kv_cache: type of the key-value cache: auto (the model's), fp8, fp8_per_token_head.
            kv_bytes: its size.
            kv_stays: ``release`` keeps it.

        Raises:
            UserError: vLLM is not installed, or a release that this engine does not know; it cannot
                run the model.
        """
        self.version = 0
        self._finds_strings = tokenizer is not None
        self._stop_ids = sorted(stop_ids)
        self._context = context
        self._adapter: Weights | None = None
        """The adapter that samples."""
        self._sleeps = device.type == "cuda" and not kv_stays
        self._asleep = False
        self._interrupted = threading.Event()
        self._broken = False
        """Whether vLLM has failed: then it can only be closed."""
        self._llm, self._slots = start_vllm(
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
        """Copy the adapter into vLLM's layers, and drop prefixes computed with another.

        Raises:
            UserError: full weights, or vLLM has no place for some tensor.
        """
        if weights.kind == "all":
            raise UserError(
                "--rollout.engine vllm takes adapters, not full weights: pass --rollout.engine "
                "transformers"
            )
        self._adapter = None
        fill(self._slots, weights.tensors)
        self._forget()
        self._adapter = weights
        self.version = weights.version

    def _forget(self) -> None:
        if not self._asleep and not self._live().reset_prefix_cache():
            raise RuntimeError("vLLM did not let go of its cached prefixes")

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """See Engine.base_model."""
        adapter, version = self._adapter, self.version
        self._adapter, self.version = None, BASE_VERSION
        clear(self._slots)
        self._forget()
        try:
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
        """See Engine.generate."""
        check_temperature(sampling.temperature)
        if sampling.stop and not self._finds_strings:  # vLLM would not find them, and not say so
            raise RuntimeError("no stop strings without a tokenizer")
        self._live()
        if self._adapter is None and self.version != BASE_VERSION:
            raise RuntimeError("no adapter is loaded; the base samples only inside base_model()")
        self._wake()
        asked: dict[str, tuple[Sequence[int], Any]] = {}
        for p, prefix in enumerate(prefixes):
            wanted = sampling.max_tokens if limits is None else limits[p]
            limit = most_tokens(prefix, wanted, self._context)
            for i in range(n):
                # A request and a seed for each: vLLM's own n gives all prompts the same seeds.
                params = self._params(sampling, limit, derive_seed(sampling.seed, p, i))
                asked[f"{p} {i}"] = prefix, params
        groups: list[list[Completion]] = [[] for _ in prefixes]
        found: dict[str, Completion] = {}
        with torch.random.fork_rng(devices=[]):  # vLLM draws from the global generator as well
            for name, completion in self._run(asked, sampling.cut_tail):
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
        self, asked: Mapping[str, tuple[Sequence[int], Any]], cut_tail: float
    ) -> Iterator[tuple[str, Completion]]:
        """Sample all that is asked by name, and give each completion as it finishes."""
        from vllm.inputs import tokens_input

        engine = self._live().llm_engine
        going = {name: _Growing() for name in asked}
        try:
            for name, (prefix, params) in asked.items():
                prompt = tokens_input(list(prefix))
                engine.add_request(name, prompt, params)
            while going:
                if self._interrupted.is_set():
                    raise RuntimeError("sampling was interrupted")
                for output in self._step(engine):
                    growing = going[output.request_id]
                    growing.add(output.outputs[0])
                    if output.finished:
                        del going[output.request_id]
                        yield output.request_id, growing.completion(self.version)
                if len(asked) - len(going) >= cut_tail * len(asked):
                    cut = [name for name, growing in going.items() if growing.token_ids]
                    engine.abort_request(cut)
                    for name in cut:
                        yield name, going.pop(name).completion(self.version)
        finally:
            if not self._broken:
                engine.abort_request(list(going))

    def _step(self, engine: Any) -> Any:
        try:
            return engine.step()
        except Exception as error:
            self._broken = True
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"vLLM failed while sampling ({type(error).__name__}: {first_line(error)}); go on "
                "from the last checkpoint with --run.resume, or pass --rollout.engine transformers"
            ) from error

    def release(self) -> None:
        """See Engine.release: the key-value cache is freed, and with it what prefixes it held,
        unless it stays."""
        if not self._asleep and self._sleeps:
            self._live().sleep(level=1)
            self._asleep = True

    def interrupt(self) -> None:
        """See Engine.interrupt."""
        self._interrupted.set()

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # what the update has freed
            try:
                self._live().wake_up()
            except RuntimeError as error:
                raise torch.OutOfMemoryError(
                    f"vLLM's cache does not fit any more: {first_line(error)}"
                ) from error
            self._asleep = False

    def close(self) -> None:
        """Free weights and cache. The engine is of no use afterwards."""
        if self._llm is None:
            return
        with suppress(torch.OutOfMemoryError):
            self._wake()  # vLLM cannot free a cache that is asleep
        with suppress(Exception) if self._broken else nullcontext():
            stop_vllm(self._llm)
        self._llm = None
        self._slots.clear()
        with suppress(Exception) if self._broken else nullcontext():
            free_memory()

    def _live(self) -> Any:
        if self._llm is None:
            raise RuntimeError("this engine is closed")
        return self._llm

    def _check_used(self) -> None:
        """Refuse a model of which vLLM computes some adapted layer in a way of its own."""
        if unused := [slot for slot in self._slots if not slot.used]:
            raise UserError(
                f"vLLM takes no adapter on {unused[0].parts[0].adapted.path} ({len(unused)} "
                "layers); pass --rollout.engine transformers or other --lora.targets"
            )

    def _params(self, sampling: SamplingParams, limit: int, seed: int) -> Any:
        import vllm
        from vllm.sampling_params import RequestOutputKind

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
            # What is cut must be known by then; to hear of each token costs time.
            output_kind=RequestOutputKind.FINAL_ONLY
            if sampling.cut_tail == 1
            else RequestOutputKind.DELTA,
        )


@dataclass(slots=True)
class _Growing:
    """A completion of which vLLM tells in parts, or at the end."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Any = "length"
    """vLLM's reason; "length" until it has one."""

    def add(self, output: Any) -> None:
        """Append a part."""
        steps = zip(output.token_ids, output.logprobs, strict=True)
        self.token_ids += output.token_ids
        self.logprobs += [step[token].logprob for token, step in steps]
        self.finish = output.finish_reason or "length"

    def completion(self, version: int) -> Completion:
        """As far as it came; one that vLLM has not finished is cut off."""
        if not all(x is not None and math.isfinite(x) for x in self.logprobs):
            raise UserError(
                f"the model's log-probs are not finite (policy version {version}): its weights are "
                "damaged, or the policy has diverged; lower --optim.lr"
            )
        if self.finish not in ("stop", "length"):
            raise RuntimeError(f"vLLM gave a completion up: {self.finish}")
        return Completion(self.token_ids, self.logprobs, self.finish, version)
