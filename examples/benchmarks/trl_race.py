"""TRL's trainer in time_to_accuracy.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Ids = list[int]
Mark = Callable[[Any, dict[str, Any], Ids], float | None]
"""(Renderer, the row's columns, token ids of a completion) -> its reward."""


def run(cfg: Any, race: Any, mark: Mark) -> None:
    """Train until the target of ``race`` is reached."""
    from peft import LoraConfig
    from transformers import AutoTokenizer, GenerationConfig
    from trl import GRPOTrainer

    from rlsloth.data.renderer import Renderer
    from rlsloth.environments.loading import load_environment

    env = load_environment(cfg.env, cfg.seed)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    ends = GenerationConfig.from_pretrained(cfg.model.path).eos_token_id
    renderer = Renderer(tokenizer, cfg.env, ends if isinstance(ends, list) else [ends])
    race.set_questions(renderer, env.heldout)
    trainer = GRPOTrainer(
        model=cfg.model.path,
        processing_class=tokenizer,
        reward_funcs=reward(renderer, mark),
        args=arguments(cfg),
        train_dataset=dataset(cfg, env.train),
        peft_config=LoraConfig(
            r=cfg.lora.rank,
            lora_alpha=cfg.lora.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.add_callback(callback(trainer, race))
    trainer.train()


def reward(renderer: Any, mark: Mark) -> Callable[..., list[float | None]]:
    """The reward in the form in which TRL calls it."""

    def right_last_number(
        completion_ids: list[Ids], task: list[str], entry: list[str], **_: Any
    ) -> list[float | None]:
        rows = zip(completion_ids, task, entry, strict=True)
        return [mark(renderer, {"task": t, "entry": json.loads(e)}, ids) for ids, t, e in rows]

    return right_last_number


def arguments(cfg: Any) -> Any:
    """Settings of ``cfg`` under TRL's names. loss_type is dapo and scale_rewards group by
    default."""
    import torch
    from trl import GRPOConfig

    gpu = torch.cuda.is_available()
    beta1, beta2 = cfg.optim.betas
    return GRPOConfig(
        output_dir=str(cfg.run.dir),
        max_steps=cfg.steps,
        per_device_train_batch_size=cfg.prompts_per_step * cfg.group_size,
        num_generations=cfg.group_size,
        max_completion_length=cfg.rollout.max_tokens,
        shuffle_dataset=False,
        use_vllm=cfg.rollout.engine == "vllm",
        vllm_mode="colocate",
        # If on, as by default, every step makes one more forward pass.
        vllm_importance_sampling_correction=False,
        temperature=cfg.rollout.temperature,
        beta=cfg.loss.beta,
        learning_rate=cfg.optim.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_8bit" if gpu else "adamw_torch",  # as rlsloth with optim.name auto
        adam_beta1=beta1,
        adam_beta2=beta2,
        weight_decay=cfg.optim.weight_decay,
        max_grad_norm=cfg.optim.max_grad_norm,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "bfloat16" if gpu else "float32"},
        bf16=gpu,
        use_cpu=not gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=cfg.seed,
    )


def dataset(cfg: Any, prompts: Any) -> Any:
    """The prompts of all steps, in the order in which rlsloth takes them."""
    from datasets import Dataset

    from rlsloth.data.sampler import EpochSampler

    taken = EpochSampler(prompts, cfg.seed).take(cfg.steps * cfg.prompts_per_step)
    return Dataset.from_list(
        [
            {
                "prompt": list(prompt.messages),
                "task": prompt.columns["task"],
                "entry": json.dumps(prompt.columns["entry"]),
            }
            for prompt in taken
        ]
    )


def callback(trainer: Any, race: Any) -> Any:
    """A callback that evaluates with the trainer's own engine, and stops at the target."""
    from transformers import TrainerCallback

    def sample(prompts: list[Ids], n: int) -> list[list[Ids]]:
        repeated = [ids for ids in prompts for _ in range(n)]
        flat, _ = trainer._generate_single_turn(repeated, None, {}, n)
        # The next step then copies its weights to vLLM, and counts the time, as without evaluation.
        trainer._last_loaded_step = -1
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    class Evaluate(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            race.reached(0, sample)
            race.first_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            if race.reached(state.global_step, sample):
                control.should_training_stop = True

    return Evaluate()
