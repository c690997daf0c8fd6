"""GRPO trainers of TRL and Unsloth on the work of full_step.py, with hooks for its meter."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import GIB, Meter, need, need_gpu
from reward import checksum
from work import LEARNING_RATE, completions, context, micro_rows, texts

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trl(args: argparse.Namespace) -> Meter:
    """Run GRPOTrainer with vLLM in the same process, and LoRA on a bf16 base or all its weights."""
    need("trl", "vllm", "peft", "bitsandbytes")
    need_gpu("trl")
    set_cache_size(args)
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=args.model,
            processing_class=tokenizer,
            reward_funcs=checksum,
            args=GRPOConfig(
                **settings(args, folder),
                model_init_kwargs={"dtype": "bfloat16"},
                vllm_mode="colocate",
                vllm_max_model_length=context(args),
                vllm_enable_sleep_mode=args.sleep,
            ),
            train_dataset=dataset(tokenizer, args),
            peft_config=lora if args.trained == "adapter" else None,
        )
        return train(trainer)


def unsloth(args: argparse.Namespace) -> Meter:
    """Run Unsloth as its GRPO notebooks do: fast_inference, and TRL's trainer as Unsloth rewrites
    it."""
    need("unsloth", "trl", "vllm", "peft", "bitsandbytes")
    if args.sleep:
        os.environ["UNSLOTH_VLLM_STANDBY"] = "1"  # read at import
    try:  # before torch, trl and transformers, which it changes
        from unsloth import FastLanguageModel
    except NotImplementedError as error:
        sys.exit(f"unsloth: {error}")
    need_gpu("unsloth")
    set_cache_size(args)
    # vLLM's warm-up mistakes Unsloth's empty stand-in for FlashInfer.
    import vllm.model_executor.warmup.kernel_warmup as warmup

    warmup.has_flashinfer = lambda: False
    from trl import GRPOConfig, GRPOTrainer

    # Unsloth's own choice: checkpointed activations are kept in the host's memory.
    checkpointing = "unsloth" if args.gradient_checkpointing else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(Path(args.model).resolve()),
        max_seq_length=context(args),
        load_in_4bit=args.precision == "nf4",
        fast_inference=True,
        float8_kv_cache=args.kv_cache == "fp8",
        max_lora_rank=args.rank,
        max_num_seqs=completions(args),  # its default is 80 to 128
        use_gradient_checkpointing=checkpointing,
        unsloth_vllm_standby=args.sleep,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=LINEARS,
        use_gradient_checkpointing=checkpointing,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=checksum,
            # loss_type is not set, which is dapo, too. If dapo is set by name, Unsloth masks
            # completions that reach the limit, and here all do.
            args=GRPOConfig(**settings(args, folder)),
            train_dataset=dataset(tokenizer, args),
        )
        return train(trainer)


def settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Arguments of GRPOConfig for TRL and Unsloth. The loss is dapo by default, as in rlsloth."""
    rows = micro_rows(args)
    return {
        "output_dir": folder,
        "max_steps": 1 + args.steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": completions(args) // rows,
        "num_generations": args.group,
        "max_completion_length": args.new_tokens,
        "shuffle_dataset": False,
        "gradient_checkpointing": args.gradient_checkpointing,
        "use_vllm": True,
        # Sampled ids may not be in the tokenizer, so vLLM must not decode them. The trainers
        # decode them anyway; vLLM saves a little time.
        "generation_kwargs": {"ignore_eos": True, "detokenize": False},
        # TRL's default needs one more forward pass than the defaults of rlsloth and Unsloth.
        "vllm_importance_sampling_correction": False,
        "temperature": 1.0,
        "beta": 0.0,
        "optim": "adamw_8bit",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def dataset(tokenizer: Any, args: argparse.Namespace) -> Any:
    """The prompts as plain text, to which no chat template adds tokens."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": text} for text in texts(tokenizer, args)])


def set_cache_size(args: argparse.Namespace) -> None:
    """Fix the bytes of vLLM's key-value cache, for which neither trainer has an option."""
    import vllm

    plain: Any = vllm.LLM

    class LLM(plain):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(
                *positional, **named | {"kv_cache_memory_bytes": int(args.kv_gb * GIB)}
            )

    vllm.LLM = LLM


def train(trainer: Any) -> Meter:
    """Train with the meter in the trainer's own functions."""
    meter = Meter()
    engine = trainer.vllm_generation
    generate = engine.generate

    def counted(*positional: Any, **named: Any) -> Any:
        with meter.phase("rollout"):
            made = generate(*positional, **named)
        meter.count(sum(map(len, made[0])), sum(map(len, made[1])))
        return made

    engine.generate = counted
    engine.sync_weights = meter.timed("hand-over", engine.sync_weights)
    # Unsloth calls this in place of sync_weights; in bf16 it merges weights elsewhere.
    if hasattr(engine, "_unsloth_load_lora"):
        engine._unsloth_load_lora = meter.timed("hand-over", engine._unsloth_load_lora)
    trainer._calculate_rewards = meter.timed("reward", trainer._calculate_rewards)
    trainer.add_callback(steps_callback(meter))
    trainer.train()
    return meter


def steps_callback(meter: Meter) -> Any:
    """A callback that marks the beginning and end of steps in the meter."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            meter.begin()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            meter.step_done()

    return Steps()
