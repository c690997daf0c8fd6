"""The embedding of a frozen model in host memory (``model.offload_embeddings``)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rlsloth.errors import UserError
from rlsloth.kernels.host_rows.op import host_rows
from rlsloth.policy.page_lock import lock, unlock

EMBEDDING_STAYS = (
    "--model.offload-embeddings true: this model's embedding is also its output head, or no plain "
    "table, and must be on the GPU; pass false"
)
"""Message for a model of which ``can_offload`` is false."""


class HostEmbedding(nn.Module):
    """An embedding whose table the GPU reads row by row from page-locked host memory.

    The table is no parameter, so that ``to`` does not move it, and so that the model's first
    parameter, from which transformers reads the model's device, is on the GPU.
    """

    def __init__(self, table_VH: Tensor) -> None:
        """Wrap a contiguous table on the CPU; page-locked if the model is on a GPU."""
        super().__init__()
        self.weight = table_VH

    def forward(self, ids: Tensor) -> Tensor:
        """Look up tokens: [B, S] -> [B, S, H]."""
        return host_rows(self.weight, ids)


def can_offload(model: Any) -> bool:
    """Tell whether a model's embedding can be in host memory: a plain one, not tied to the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return (
        type(embedding) is nn.Embedding
        and head is not None
        and (head.weight is not embedding.weight)
    )


def offload_embeddings(model: Any, say: Callable[[str], None] = print) -> None:
    """Move a loaded model's embedding to host memory.

    If the system refuses to page-lock memory, the embedding stays on the GPU, and this is said.

    Raises:
        UserError: the model's embedding cannot be in host memory.
    """
    if not can_offload(model):
        raise UserError(EMBEDDING_STAYS)
    weight = model.get_input_embeddings().weight
    table = weight.detach().to("cpu", copy=True).contiguous()
    if weight.device.type == "cuda" and not lock(table):
        say(
            "the system refuses page-locked memory (limit: ulimit -l): the embedding stays on the "
            f"GPU, {table.nbytes / 2**30:.2f} GiB"
        )
        return
    made = HostEmbedding(table)
    if weight.device.type == "cuda":
        weakref.finalize(made, unlock, [table])
    model.set_input_embeddings(made)
