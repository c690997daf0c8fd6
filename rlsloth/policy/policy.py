"""The trained model, a frozen base with a LoRA or its own weights, which scores micro-batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.kernels.linear_logprob.op import linear_logprob
from rlsloth.policy.activations.layers import Recomputed
from rlsloth.policy.activations.placement import Placements, uniform
from rlsloth.policy.attention.backends import choose_backend
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.head import HeadAdapter, before_final_norm, logit_transform
from rlsloth.policy.host_embedding import offload_embeddings
from rlsloth.policy.layers import decoder_layers
from rlsloth.policy.load import LoadedModel, load_model
from rlsloth.policy.lora import REFERENCE, TRAINED
from rlsloth.policy.loss_scale import LossScale
from rlsloth.policy.optimizer import (
    flatten_state,
    make_optimizer,
    park,
    restore_state,
    resume_schedule,
)
from rlsloth.policy.tokenizer import context_of
from rlsloth.policy.trainable import make_trainable
from rlsloth.policy.wrap.wrap import wrap
from rlsloth.records import MicroBatch, StepStats, TokenLogprobs, Weights


class Policy:
    """A causal language model that learns by a LoRA or by weights of its own, and its optimizer.

    ``version`` counts the optimizer updates that were made; every sampled token records it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: ModelConfig,
        lora: LoraConfig,
        optim: OptimConfig,
        *,
        temperature: float,
        total_updates: int,
        placements: Placements | None = None,
    ) -> None:
        self.tokenizer = loaded.tokenizer
        self.device = loaded.device
        self.dtype = loaded.dtype
        self.backend = choose_backend(
            model.attention,
            loaded.device,
            loaded.dtype,
            loaded.model.config.get_text_config(),
            loaded.model.num_parameters(),
        )
        self.model = make_trainable(loaded.model, lora, model)
        self._whole = not model.trains_adapter
        self._fresh = model.adapter is None
        self.wrapped = wrap(self.model) if model.fused_kernels else None
        base = self.model.get_base_model()
        self.config = base.config.get_text_config()
        self.context = context_of(model, int(self.config.max_position_embeddings))
        ends = base.generation_config.eos_token_id
        ends = [] if ends is None else ends
        self.eos_token_ids: list[int] = ends if isinstance(ends, list) else [ends]
        self._decoder = base.get_decoder()
        self._head = base.get_output_embeddings()
        if model.offload_embeddings is True:
            offload_embeddings(base)
        self.embeddings = int(base.get_input_embeddings().weight.shape[0])
        self.logit_transform = logit_transform(self.config)
        self._head_adapter = HeadAdapter(base, self.dtype)
        self.temperature = temperature or 1.0
        self._max_grad_norm = optim.max_grad_norm
        self.loss_scale = LossScale(self.dtype)
        self._recomputed: Recomputed | None = None
        self._layers = decoder_layers(self._decoder)
        self.place(placements or uniform(model.gradient_checkpointing, len(self._layers)))
        named = (base if self._whole else self.model).named_parameters()
        self.trained: dict[str, Parameter] = {n: p for n, p in named if p.requires_grad}
        self._trained = list(self.trained.values())
        self.optimizer, self.scheduler = make_optimizer(
            self._trained, optim, self.device, total_updates
        )
        self.version = 0

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        lora: LoraConfig,
        optim: OptimConfig,
        *,
        temperature: float,
        total_updates: int,
        placements: Placements | None = None,
    ) -> Policy:
        """Load the base model from ``model.path`` and put the adapter on it.

        Args:
            model: base model and starting adapter.
            lora: rank, alpha, dropout and targets of a new adapter.
            optim: optimizer and schedule.
            temperature: sampling temperature, at which tokens are scored; 0 means 1.
            total_updates: planned updates of the whole run.
            placements: placement of each layer's activations; None: as
                ``model.gradient_checkpointing`` says.

        Raises:
            UserError: the model or the adapter cannot be loaded.
        """
        return cls(
            load_model(model),
            model,
            lora,
            optim,
            temperature=temperature,
            total_updates=total_updates,
            placements=placements,
        )

    def place(self, placements: Placements) -> None:
        """Place the activations of each layer; no backward pass may be pending."""
        if self._recomputed is not None:
            self._recomputed.close()
        self.placements = placements
        self._recomputed = Recomputed(self._layers, placements, self.device)

    def logprobs(self, micro: MicroBatch) -> TokenLogprobs:
        """Score a micro-batch's tokens with gradients: log-probs and entropies [N] in nats.

        The log-probs are those at the sampling temperature. This is one packed forward, and
        linear_logprob applies the head, so that logits [N, V] never exist.
        """
        # Setting it in every module takes 1 ms a layer. PEFT's model may differ from its layers.
        if not (self.model.training and self._layers[0].training):
            self.model.train()
        return self._score(micro)

    def _score(self, micro: MicroBatch) -> TokenLogprobs:
        layout = PackedLayout(micro, self.backend)
        lora = self._head_adapter.read()
        # linear_logprob applies the final norm to the scored rows itself, unless the head has an
        # adapter, which needs normed rows too.
        with before_final_norm(self._decoder) if lora is None else nullcontext() as norm:
            hidden_TH = self._decoder(
                input_ids=micro.token_ids[None],
                position_ids=micro.positions[None],
                use_cache=False,
                packed=layout,
            ).last_hidden_state[0]
        out = linear_logprob(
            hidden_TH[micro.score_index],  # a copy, which may be overwritten
            self._head.weight,
            micro.target_ids,
            bias_V=self._head.bias,
            lora=lora,
            norm=norm,
            temperature=self.temperature,
            softcap=self.logit_transform.softcap,
            logit_scale=self.logit_transform.scale,
            overwrite_hidden=True,
        )
        return TokenLogprobs(out.logprob_N, out.entropy_N)

    @torch.no_grad()
    def reference_logprobs(self, micro: MicroBatch) -> Tensor:
        """Score a micro-batch under the policy before training: log-probs [N] in nats."""
        with self.starting_policy():
            return self.eval_logprobs(micro)

    @torch.no_grad()
    def eval_logprobs(self, micro: MicroBatch) -> Tensor:
        """Score a micro-batch without dropout and gradients: log-probs [N] in nats."""
        self.model.eval()
        return self._score(micro).logprobs

    @contextmanager
    def starting_policy(self) -> Iterator[None]:
        """Use the policy as it was before training, the reference of the KL term.

        A new adapter is switched off; in place of a starting adapter its frozen copy is used.
        """
        if self._fresh:
            with self.base_model():
                yield
            return
        self.model.set_adapter(REFERENCE)
        try:
            yield
        finally:
            self.model.set_adapter(TRAINED)

    def base_model(self) -> AbstractContextManager[None]:
        """Use the base model without any adapter, or as it was before its own weights learnt."""
        if self._whole and not self.version:
            return nullcontext()
        return self.model.disable_adapter()  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those of the trained weights; ``step`` takes them."""
        torch.autograd.backward(self.loss_scale.times(loss))

    def step(self) -> StepStats:
        """Clip the gradients, update the weights, and clear the gradients.

        A NaN or infinite gradient updates nothing; the schedule moves on in any case. An error
        before the version or the schedule has changed leaves everything as it was.
        """
        total = _norm([p.grad for p in self._trained if p.grad is not None])
        total = total / self.loss_scale.value
        lr = self.learning_rate
        skipped = not math.isfinite(norm := float(total))
        if not skipped:
            self.version += 1  # before: an update that fails halfway has changed weights
            self.loss_scale.divide(self._trained)
            torch.nn.utils.clip_grads_with_norm_(self._trained, self._max_grad_norm, total)
            self.optimizer.step()
        self.loss_scale.update(finite=not skipped)
        park(self.optimizer)  # an update that is skipped has fetched the states, too
        self._advance_schedule()
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(norm, lr, skipped)

    def idle(self) -> StepStats:
        """Count an update that has no gradients: only the schedule moves on."""
        stats = StepStats(0.0, self.learning_rate, skipped=False)
        self._advance_schedule()
        return stats

    def _advance_schedule(self) -> None:
        """Move the schedule on by one planned update, so that it ends when the run does."""
        with warnings.catch_warnings():  # torch warns if the optimizer did not step
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.scheduler.get_last_lr()[0])

    def weights(self) -> Weights:
        """Return the weights for a rollout engine (live, not copies) with the current version."""
        if not self._whole:
            return Weights(self.version, "adapter", self.trained)
        named = self.model.get_base_model().named_parameters()
        return Weights(self.version, "all", dict(named))

    @property
    def _stem(self) -> str:
        """Name of the trained weights' file in a checkpoint."""
        return "weights" if self._whole else "adapter"

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the state that a checkpoint stores.

        Returns:
            File name -> tensor's name -> tensor (live: write it before the next update), and
            values for JSON.
        """
        if self._whole:
            self.model.restore()
        tensors, scalars = flatten_state(self.optimizer)
        json = {
            "version": self.version,
            "optimizer": scalars,
            "planned_updates": self.scheduler.last_epoch,
            "loss_scale": self.loss_scale.state(),
        }
        weights = {n: p.detach() for n, p in self.trained.items()}
        return {self._stem: weights, "optimizer": tensors}, json

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], json: Mapping[str, Any]) -> None:
        """Load the result of ``state`` into a policy with the same configuration."""
        with torch.no_grad():
            for name, value in tensors[self._stem].items():
                self.trained[name].copy_(value)
        restore_state(self.optimizer, tensors["optimizer"], json["optimizer"])
        self.loss_scale.restore(json.get("loss_scale", {}))
        self.version = int(json["version"])
        resume_schedule(self.scheduler, int(json["planned_updates"]))


def _norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients; torch would round that of 16-bit ones to three digits."""
    if all(x.dtype == torch.float32 for x in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    each = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in gradients]
    return torch.stack(each).square().sum().sqrt()
