"""Speed of rollouts on an 8B shape with random weights, and times of hand-over, release and start.

    python examples/benchmarks/rollout_speed.py rlsloth --precision nf4
    python examples/benchmarks/rollout_speed.py vllm --adapter DIR    # plain vLLM, in bf16

Each prints lines of JSON. ``rlsloth`` starts the engine on the weights of a policy and writes the
adapter to --adapter; ``vllm`` then samples with the same adapter. Completions have --new tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=["rlsloth", "vllm"])
    parser.add_argument("--precision", choices=["bf16", "nf4"], default="bf16")
    parser.add_argument("--kv-cache", default="fp8")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=192)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokenizer", required=True, help="a folder with any tokenizer")
    parser.add_argument("--adapter", type=Path, required=True)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("rollout_speed.py needs a GPU")
    run_rlsloth(args) if args.engine == "rlsloth" else run_vllm(args)


def say(**row: Any) -> None:
    print(
        json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
        flush=True,
    )


def config(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**LLAMA_8B, num_hidden_layers=args.layers)


def prompts(args: argparse.Namespace, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1000, 100000, (count, args.prompt), generator=generator).tolist()


def kv_bytes(args: argparse.Namespace) -> int:
    """Bytes of cache for the largest number of sequences, without shared prompts."""
    tokens = max(args.sequences) * (args.prompt + args.new + 16)
    width = 2 * 8 * 128 * args.layers
    return tokens * width * (2 if args.kv_cache == "auto" else 1)


def seconds(action: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


# --- rlsloth -------------------------------------------------------------------------------------


def make_policy(args: argparse.Namespace) -> Any:
    """A policy on random weights, which are made on the GPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
    from rlsloth.policy.attention.interface import NAME, register
    from rlsloth.policy.load import LoadedModel
    from rlsloth.policy.policy import Policy

    register()
    torch.manual_seed(0)
    with torch.device("cuda"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config(args), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0, 0.02)
    if args.precision == "nf4":
        quantise(model)
    model.requires_grad_(False)
    model.set_attn_implementation(NAME)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    loaded = LoadedModel(model, tokenizer, torch.device("cuda", 0), torch.bfloat16)
    policy = Policy(
        loaded,
        ModelConfig(path="random"),
        LoraConfig(rank=args.rank, alpha=2 * args.rank),
        OptimConfig(),
        temperature=1.0,
        total_updates=1,
    )
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-3)
    torch.cuda.empty_cache()
    return policy


def quantise(model: Any) -> None:
    """Quantise like transformers' loader: every linear but the head, with double quantisation."""
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            made = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            made.weight = type(made.weight)(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to("cuda")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
    model.is_loaded_in_4bit = True


def checksums(policy: Any) -> dict[str, int]:
    return {
        name: int(torch.hash_tensor(p.detach().view(-1)).view(torch.int64))
        for name, p in policy.model.named_parameters()
        if ".lora_" not in name
    }


def run_rlsloth(args: argparse.Namespace) -> None:
    from rlsloth.policy.lora import save_adapter
    from rlsloth.policy.plain_logprobs import plain_logprobs
    from rlsloth.records import SamplingParams
    from rlsloth.rollout.vllm.engine import VllmEngine

    policy = make_policy(args)
    save_adapter(policy.model, args.adapter)
    before, weights = checksums(policy), used_gib()
    start = time.perf_counter()
    engine = VllmEngine(
        policy.model,
        policy.tokenizer,
        stop_ids=[],
        context=args.prompt + args.new,
        max_sequences=max(args.sequences),
        dtype=policy.dtype,
        device=policy.device,
        kv_cache=args.kv_cache,
        kv_bytes=kv_bytes(args),
    )
    started = time.perf_counter() - start
    torch.cuda.empty_cache()
    kv = kv_bytes(args) / 2**30
    say(start_s=started, weights_gib=weights, kv_gib=kv, over_gib=used_gib() - weights - kv)
    hand_over = [seconds(lambda: engine.set_weights(policy.weights())) for _ in range(6)]
    say(hand_over_ms=[1e3 * s for s in hand_over])
    sampling = SamplingParams(max_tokens=args.new, temperature=1.0, seed=1)
    for count in args.sequences:
        batch = prompts(args, count // args.group)
        made: list[Any] = []

        def generate(batch: Any = batch, made: Any = made) -> None:
            made[:] = engine.generate(batch, args.group, sampling)

        times = [seconds(generate) for _ in range(3)]
        tokens = sum(len(completion.token_ids) for group in made for completion in group)
        report(args, "rlsloth", count, times, tokens)
    switches = []
    for _ in range(4):
        away = seconds(engine.release)
        gib = used_gib()
        switches.append([1e3 * away, 1e3 * seconds(engine._wake), gib])
    say(release_wake_ms_gib=[[round(x, 2) for x in s] for s in switches])
    prompt = prompts(args, 1)
    [[completion]] = engine.generate(prompt, 1, sampling)
    trained = plain_logprobs(policy, prompt[0], completion.token_ids)
    gap = (trained - torch.tensor(completion.logprobs)).abs()
    say(gap_mean=float(gap.mean()), gap_max=float(gap.max()), base_same=checksums(policy) == before)
    start = time.perf_counter()
    engine.close()
    say(close_s=time.perf_counter() - start, left_gib=used_gib())


def report(
    args: argparse.Namespace, name: str, count: int, times: list[float], tokens: int
) -> None:
    rate = tokens / statistics.median(times[1:])
    say(engine=name, precision=args.precision, sequences=count, tokens=tokens,
        tokens_per_s=rate, times_s=[round(t, 3) for t in times])  # fmt: skip


# --- plain vLLM ----------------------------------------------------------------------------------


def run_vllm(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = config(args)
        made.architectures = ["LlamaForCausalLM"]
        made.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(folder)
        llm = LLM(
            folder,
            load_format="dummy",
            dtype="bfloat16",
            kv_cache_dtype=args.kv_cache,
            kv_cache_memory_bytes=kv_bytes(args),
            max_model_len=args.prompt + args.new,
            max_num_seqs=max(args.sequences),
            enable_prefix_caching=True,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=args.rank,
            logprobs_mode="processed_logprobs",
        )
    say(start_s=time.perf_counter() - start)
    adapter = LoRARequest("adapter", 1, lora_path=str(args.adapter))
    for count in args.sequences:
        batch = [{"prompt_token_ids": p} for p in prompts(args, count // args.group)]
        batch = [p for p in batch for _ in range(args.group)]
        params = [
            SamplingParams(max_tokens=args.new, temperature=1.0, seed=i, logprobs=0,
                           ignore_eos=True, detokenize=False)
            for i in range(count)
        ]  # fmt: skip
        outputs: list[Any] = []
        times = []
        for _ in range(3):
            start = time.perf_counter()
            outputs = llm.generate(batch, params, use_tqdm=False, lora_request=adapter)
            times.append(time.perf_counter() - start)
        tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
        report(args, "vllm", count, times, tokens)


if __name__ == "__main__":
    main()
