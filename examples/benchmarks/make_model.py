"""Make a model folder with random weights in the shape of a real model, for timing.

    python examples/benchmarks/make_model.py --tokenizer FOLDER_OR_GGUF --out DIR
    python examples/benchmarks/make_model.py --tokenizer FOLDER_OR_GGUF --out DIR --shape tiny
    python examples/benchmarks/make_model.py --unpack SmolLM2-135M-Instruct.Q4_1.gguf --out DIR

Weights are bf16, normal with a standard deviation of 0.02, norms 1; trainers quantise them when
they load them. They are made on a GPU if there is one. The tokenizer may have fewer tokens than the
shape, since samples need not be text. --unpack writes the weights and the tokenizer of a GGUF file
in bf16 instead, for trainers that read only folders."""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import need, set_environment

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "llama-3.3-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    # For trying the scripts without a GPU.
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
COMMON = {
    "model_type": "qwen3",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "tie_word_embeddings": False,
}
STD = 0.02
SHARD_BYTES = 2 * 2**30
WRITERS = 4
"""Shards that are made and written in parallel."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument(
        "--layers", type=int, help="number of layers, to save time; default: the shape's"
    )
    parser.add_argument("--context", type=int, help="largest context; default: 40960")
    parser.add_argument(
        "--precision", choices=["bf16", "nf4"], default="bf16",
        help="nf4: linear layers as bitsandbytes stores them, in a quarter of the space",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", help="a folder or a GGUF file")
    source.add_argument("--unpack", help="a GGUF file to write as a folder")
    args = parser.parse_args(argv)
    set_environment()
    need("torch", "transformers", "safetensors", "rlsloth")
    from rlsloth.errors import UserError

    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        count = unpack(args) if args.unpack else make(args)
    except UserError as error:
        sys.exit(str(error))
    print(f"{count / 1e9:.2f}e9 weights in {args.out}, {time.perf_counter() - start:.0f} s")


def unpack(args: argparse.Namespace) -> int:
    """Write a GGUF file as a folder; return the number of weights."""
    from rlsloth.config import ModelConfig
    from rlsloth.policy.load import load_model

    loaded = load_model(ModelConfig(path=args.unpack, precision="bf16", device="cpu"))
    model = loaded.model
    model.hf_quantizer = None  # the weights are unpacked, but some releases refuse to save them
    model.save_pretrained(args.out)
    loaded.tokenizer.save_pretrained(args.out)
    return sum(p.numel() for p in model.parameters())


def make(args: argparse.Namespace) -> int:
    """Write configuration, tokenizer and random weights; return the number of weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from rlsloth.policy.load import nf4_config

    tokenizer = read_tokenizer(args.tokenizer)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = COMMON | SHAPES[args.shape]
    shape |= {
        name: value
        for name, value in (
            ("num_hidden_layers", args.layers),
            ("max_position_embeddings", args.context),
        )
        if value
    }
    config = AutoConfig.for_model(**shape, **ids)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    if args.precision == "nf4":
        import bitsandbytes.functional  # noqa: F401 -- not by several writers at once

        config.quantization_config = nf4_config(torch.bfloat16).to_dict()
    config.save_pretrained(args.out)
    GenerationConfig(**ids).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # A file with a tied head's own weights would untie it.
    tensors = {name: t for name, t in model.state_dict().items() if name not in tied(model)}
    return write_weights(tensors, args.out, args.seed, args.precision)


def tied(model: Any) -> set[str]:
    """Names of the model's tensors that are others under a second name."""
    kept = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - kept


def read_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or a GGUF file, with different pad and end tokens: if they were the
    same, Unsloth would add a token."""
    from transformers import AutoTokenizer

    from rlsloth.policy.gguf_tokenizer import restore_tokenizer

    file = Path(path)
    if not file.exists():
        sys.exit(f"--tokenizer {path}: no such folder or file")
    if file.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        restore_tokenizer(tokenizer, file)
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = [t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token]
        tokenizer.pad_token = others[-1] if others else tokenizer.eos_token
    return tokenizer


def write_weights(tensors: dict[str, Any], folder: Path, seed: int, precision: str) -> int:
    """Write random values in the shapes of ``tensors``, as safetensors shards with their index."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = cut(tensors)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]

    def write(i: int) -> dict[str, str]:
        generator = torch.Generator(device).manual_seed(seed * len(shards) + i)
        made: dict[str, Any] = {}
        for name in shards[i]:
            value = torch.ones(tensors[name].shape, dtype=torch.bfloat16, device=device)
            if value.dim() > 1:
                value.normal_(0, STD, generator=generator)
            elif name.endswith("bias"):
                value.zero_()
            packed = precision == "nf4" and ".layers." in name and value.dim() == 2
            made |= pack_nf4(name, value) if packed else {name: value}
        save_file(
            {name: value.cpu() for name, value in made.items()},
            folder / names[i],
            metadata={"format": "pt"},
        )
        return dict.fromkeys(made, names[i])

    with ThreadPoolExecutor(WRITERS) as pool:
        written = list(pool.map(write, range(len(shards))))
    total = sum(t.numel() for t in tensors.values())
    where = {name: file for files in written for name, file in files.items()}
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def pack_nf4(name: str, value: Any) -> dict[str, Any]:
    """Quantise a weight; return its tensors under the names of bitsandbytes' checkpoints."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(value, quant_type="nf4", compress_statistics=True)
    return {name: codes} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}


def cut(tensors: dict[str, Any]) -> list[list[str]]:
    """Names of the tensors of each shard, which has at most SHARD_BYTES or one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + 2 * tensor.numel() > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * tensor.numel()
    return shards


if __name__ == "__main__":
    main()
