"""An embedding in page-locked host memory, read by a GPU, also inside a CUDA graph."""

from __future__ import annotations

import torch
from torch import nn

from rlsloth.policy.host_embedding import HostEmbedding, offload_embeddings


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 4096)
        self.head = nn.Linear(4096, 1000, bias=False)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def set_input_embeddings(self, module):
        self.embedding = module


def test_rows_of_host_memory():
    model = Model().to("cuda", torch.bfloat16)
    ids = torch.randint(1000, (2, 777), device="cuda")
    wanted = model.embedding(ids).detach()
    before = torch.cuda.memory_allocated()
    offload_embeddings(model)
    assert isinstance(model.embedding, HostEmbedding)
    assert torch.cuda.memory_allocated() < before - 8_000_000
    assert model.embedding.weight.is_pinned()
    assert torch.equal(model.embedding(ids), wanted)
    graph = torch.cuda.CUDAGraph()
    static = ids.clone()
    model.embedding(static)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = model.embedding(static)
    static.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(out, wanted.flip(0))
    table = model.embedding.weight
    del model, graph, out
    torch.cuda.synchronize()
    assert not table.is_pinned()
