"""Names of options in other trainers, and the options here that do their work."""

from __future__ import annotations

from collections.abc import Collection, Mapping

NAMES: Mapping[str, tuple[str, ...]] = {
    # TRL, transformers and Unsloth
    "learning_rate": ("optim.lr",),
    "num_generations": ("group_size",),
    "num_generations_eval": ("eval.samples",),
    "per_device_train_batch_size": ("samples_per_step", "prompts_per_step", "group_size"),
    "train_batch_size": ("samples_per_step", "prompts_per_step"),
    "batch_size": ("samples_per_step", "prompts_per_step"),
    "gradient_accumulation_steps": (
        "samples_per_step",
        "prompts_per_step",
        "tokens_per_microbatch",
    ),
    "generation_batch_size": ("prompts_per_step", "group_size"),
    "per_device_eval_batch_size": ("eval.problems",),
    "max_completion_length": ("rollout.max_tokens",),
    "max_new_tokens": ("rollout.max_tokens",),
    "max_prompt_length": ("model.max_context",),
    "max_length": ("data.max_tokens", "model.max_context"),
    "max_seq_length": ("data.max_tokens", "model.max_context"),
    "max_seq_len": ("data.max_tokens", "model.max_context"),
    "max_model_len": ("model.max_context",),
    "vllm_max_model_length": ("model.max_context",),
    "cutoff_len": ("data.max_tokens", "model.max_context"),
    "sequence_len": ("data.max_tokens", "model.max_context"),
    "num_train_epochs": ("epochs", "steps"),
    "num_epochs": ("epochs", "steps"),
    "total_epochs": ("epochs", "steps"),
    "max_steps": ("steps",),
    "total_training_steps": ("steps",),
    "num_iterations": ("updates_per_rollout",),
    "reward_funcs": ("rewards",),
    "reward_functions": ("rewards",),
    "reward_weights": ("reward.weights",),
    "model_name_or_path": ("model.path",),
    "model_name": ("model.path",),
    "model_id": ("model.path",),
    "base_model": ("model.path",),
    "adapter_name_or_path": ("model.adapter",),
    "dataset": ("data.train", "env.train"),
    "dataset_name": ("data.train", "env.train"),
    "dataset_path": ("data.train", "env.train"),
    "dataset_train_split": ("data.train_split", "env.train_split"),
    "train_files": ("data.train", "env.train"),
    "train_file": ("data.train", "env.train"),
    "val_files": ("data.validation", "env.validation"),
    "eval_dataset": ("data.validation", "env.validation"),
    "output_dir": ("run.dir",),
    "default_local_dir": ("run.dir",),
    "report_to": ("run.trackers",),
    "logger": ("run.trackers",),
    "save_steps": ("run.save_every",),
    "save_freq": ("run.save_every",),
    "save_total_limit": ("run.keep",),
    "eval_steps": ("eval.every",),
    "test_freq": ("eval.every",),
    "resume_from_checkpoint": ("run.resume",),
    "log_completions": ("run.show_samples",),
    "num_completions_to_print": ("run.show_samples",),
    "warmup_ratio": ("optim.warmup_steps",),
    "lr_scheduler_type": ("optim.schedule",),
    "lr_scheduler": ("optim.schedule",),
    "optimizer": ("optim.name",),
    "adam_beta1": ("optim.betas",),
    "adam_beta2": ("optim.betas",),
    "max_norm": ("optim.max_grad_norm",),
    "lora_r": ("lora.rank",),
    "r": ("lora.rank",),
    "lora_rank": ("lora.rank",),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    "use_rslora": ("lora.rslora",),
    "use_dora": ("lora.dora",),
    "target_modules": ("lora.targets",),
    "lora_target_modules": ("lora.targets",),
    "load_in_4bit": ("model.precision",),
    "bf16": ("model.precision",),
    "fp16": ("model.precision",),
    "dtype": ("model.precision",),
    "torch_dtype": ("model.precision",),
    "attn_implementation": ("model.attention",),
    "use_vllm": ("rollout.engine",),
    "vllm_mode": ("rollout.engine",),
    "fast_inference": ("rollout.engine",),
    "max_num_seqs": ("rollout.max_sequences",),
    "kv_cache_dtype": ("rollout.kv_cache",),
    "loss_type": ("loss.name",),
    "scale_rewards": ("advantage.normalize",),
    "adv_estimator": ("advantage.normalize",),
    "mask_truncated_completions": ("loss.mask_truncated",),
    "epsilon": ("loss.epsilon_low",),
    "clip_ratio": ("loss.epsilon_low",),
    "clip_ratio_low": ("loss.epsilon_low",),
    "clip_ratio_high": ("loss.epsilon_high",),
    "kl_coef": ("loss.beta",),
    "kl_loss_coef": ("loss.beta",),
    "importance_sampling_level": ("loss.ratio",),
    "vllm_importance_sampling_correction": ("loss.correction",),
    "system_message": ("env.system_prompt", "data.system_prompt"),
}
"""Name without its section -> options that replace it. Where a loop has several, all are named."""


def replacements(name: str, known: Collection[str]) -> list[str]:
    """Options of this loop for another trainer's name, such as ``learning_rate``; often empty.

    Args:
        name: the name that is not known here; dashes count as underscores, sections are ignored.
        known: dotted names of this loop's options, with dashes or underscores.
    """
    leaf = name.replace("-", "_").rpartition(".")[2].lower()
    spelling = {option.replace("-", "_"): option for option in known}
    return [spelling[option] for option in NAMES.get(leaf, ()) if option in spelling]
