"""Trainers of TRL and Unsloth on the work of supervised.py, with its clock in their loop."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import need, need_gpu
from peers import LINEARS
from supervised_work import PAIRS, Clock, lengths, per_step, rows
from work import LEARNING_RATE

CHECKPOINTING = {"ckpt": True, "nockpt": False}


def trl(args: argparse.Namespace, clock: Clock) -> None:
    """Run TRL's trainer with plain transformers, bitsandbytes and PEFT."""
    need("trl", "peft", "datasets")
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = without_bos(AutoTokenizer.from_pretrained(args.model))
    options: dict[str, Any] = {"dtype": torch.float32}
    if torch.cuda.is_available():
        need("bitsandbytes")
        options = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    if torch.cuda.is_available() and args.trained == "adapter":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    attention = "sdpa" if "sdpa" in args.variant else best_attention()
    print(f"attention {attention}")
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation=attention, **options
    )
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapter = {"peft_config": lora} if args.trained == "adapter" else {}
    with tempfile.TemporaryDirectory() as folder:
        given = settings(args, folder, checkpointed(args, True))
        train(make_trainer(args, model, tokenizer, given, **adapter), clock)


def checkpointed(args: argparse.Namespace, default: Any) -> Any:
    """Setting of gradient checkpointing: a variant's, or the default."""
    return next((on for name, on in CHECKPOINTING.items() if name in args.variant), default)


def best_attention() -> str:
    """Name of the newest flash attention that is installed, else torch's."""
    from transformers.utils import import_utils

    for version in (4, 3, 2):
        if getattr(import_utils, f"is_flash_attn_{version}_available")():
            return f"flash_attention_{version}"
    return "sdpa"


def unsloth(args: argparse.Namespace, clock: Clock) -> None:
    """Run Unsloth as its notebooks do: its model under TRL's trainers, which it rewrites at
    import."""
    need("unsloth", "trl", "peft", "bitsandbytes")
    if "fused" in args.variant:
        # Off by default: the head of ORPO in chunks. Its DPO gets that from TRL in any case.
        os.environ["UNSLOTH_FUSED_PREFERENCE_LOSS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(folder) / "compiled"))
        try:  # before torch, trl and transformers, which it changes
            from unsloth import FastLanguageModel, PatchDPOTrainer
        except NotImplementedError as error:
            sys.exit(f"unsloth: {error}")
        need_gpu("unsloth")
        if args.task in PAIRS:
            PatchDPOTrainer()
        # Unsloth's own choice: checkpointed activations are kept in the host's memory.
        checkpointing = checkpointed(args, "unsloth")
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=str(Path(args.model).resolve()),
            max_seq_length=args.tokens,
            load_in_4bit=args.trained == "adapter",
            full_finetuning=args.trained == "all",
            use_gradient_checkpointing=checkpointing,
        )
        if args.trained == "adapter":
            model = FastLanguageModel.get_peft_model(
                model,
                r=args.rank,
                lora_alpha=2 * args.rank,
                target_modules=LINEARS,
                use_gradient_checkpointing=checkpointing,
            )
        given = settings(args, folder, bool(checkpointing))
        train(make_trainer(args, model, without_bos(tokenizer), given), clock)


def without_bos(tokenizer: Any) -> Any:
    """The tokenizer without a first token, which only the trainer of ORPO would add."""
    tokenizer.bos_token = None
    return tokenizer


def settings(args: argparse.Namespace, folder: str, checkpointing: bool) -> dict[str, Any]:
    """Arguments of every trainer."""
    import torch

    gpu = torch.cuda.is_available()
    at_once, forwards = batches(args)
    return {
        "output_dir": folder,
        "max_steps": args.warmup + args.steps,
        "max_length": args.tokens,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": forwards,
        "gradient_checkpointing": checkpointing,
        "train_sampling_strategy": "sequential",  # the data are random
        "dataloader_drop_last": True,
        "optim": "adamw_8bit" if gpu and "adamw" not in args.variant else "adamw_torch",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": gpu,
        "use_cpu": not gpu,
        "logging_first_step": True,
        "logging_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def batches(args: argparse.Namespace) -> tuple[int, int]:
    """Rows of a forward pass, and forward passes of a step. A step is one pass, except in the
    packed task, whose passes have at most ``micro_tokens`` tokens, padding included."""
    total = per_step(args)
    at_once = args.rows or (total if args.task != "packed" else args.micro_tokens // args.tokens)
    at_once = max(min(at_once, total), 1)
    if args.task == "packed" and "packing" in args.variant:
        # A row then has ``tokens`` tokens, and several samples, also of other steps.
        total = math.ceil(sum(lengths(args)) / args.tokens)
    return at_once, math.ceil(total / at_once)


def make_trainer(
    args: argparse.Namespace, model: Any, tokenizer: Any, given: dict[str, Any], **more: Any
) -> Any:
    """The trainer of the task, with data and configuration: TRL's, or Unsloth's replacement for
    it."""
    from datasets import Dataset

    more |= {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(rows(tokenizer, args)),
    }
    if args.task == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(ref_model=None, args=DPOConfig(**given), **more)
    if args.task == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(args=ORPOConfig(**given), **more)
    from trl import SFTConfig, SFTTrainer

    if "packing" in args.variant:
        given["packing"] = True
    if "padfree" in args.variant:
        given |= {"padding_free": True, "max_length": None}  # TRL allows it only without a limit
    if "padded" in args.variant:
        given["padding_free"] = False  # else Unsloth decides
    return SFTTrainer(args=SFTConfig(**given), **more)


def train(trainer: Any, clock: Clock) -> None:
    """Train with the trainer's own loop, and mark its steps in the clock."""
    from transformers import TrainerCallback

    step = trainer.training_step

    def counted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        clock.count(real_tokens(inputs))
        return step(model, inputs, *rest, **named)

    class Steps(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            clock.begin()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            clock.step_done()

    trainer.training_step = counted
    trainer.add_callback(Steps())
    trainer.train()
    clock.first_loss = float(trainer.state.log_history[0]["loss"])


def real_tokens(inputs: dict[str, Any]) -> Any:
    """Tokens of a batch without padding: a number, or a tensor on the device."""
    masks = [
        value
        for name, value in inputs.items()
        if name.endswith("attention_mask") and not name.startswith("prompt")
    ]
    # Without a mask there is no padding. ORPO's prompt is in its two sequences already.
    return sum(mask.sum() for mask in masks) if masks else inputs["input_ids"].numel()
