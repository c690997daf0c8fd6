"""Run every loop on a tiny model and print a fingerprint of each.

    python tests/golden/loops.py > before.json

Figures and weights go in bit by bit (times do not), so that two checkouts on one machine compare
with `diff`. Only the command line is used: the script runs on any version.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
with contextlib.suppress(ImportError):
    import helpers  # noqa: F401

REWARD = """
LETTERS = range(67, 93)  # the ids of a to z

def letters(completion_ids, **_):
    return [sum(t in LETTERS for t in ids) / len(ids) for ids in completion_ids]
"""
GRPO: dict[str, Any] = {
    "steps": 4,
    "prompts_per_step": 4,
    "group_size": 4,
    "tokens_per_microbatch": 200,
    "rewards": ["./reward.py:letters"],
    "model": {"path": "model", "device": "cpu"},
    "lora": {"rank": 4},
    "env": {"train": "data.jsonl", "heldout": 6},
    "rollout": {"max_tokens": 16, "temperature": 0.9, "engine": "transformers"},
    "reward": {"workers": 1},
    "optim": {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.01},
    "eval": {"samples": 4, "correct_at": 0.2},
    "run": {"save_every": 2, "show_samples": 0},
}
GIVEN: dict[str, Any] = {
    "steps": 4,
    "samples_per_step": 5,
    "tokens_per_microbatch": 150,
    "model": {"path": "model", "device": "cpu"},
    "lora": {"rank": 4, "alpha": 8},
    "data": {"heldout": 3},
    "optim": {"lr": 0.01, "schedule": "constant"},
    "run": {"save_every": 2},
}
DISTILL: dict[str, Any] = {
    "rewards": ["./reward.py:letters"],
    "model": {"path": "model", "device": "cpu"},
    "env": {"train": "data.jsonl", "heldout": 4},
    "rollout": {"max_tokens": 16, "temperature": 0.9, "engine": "transformers"},
    "reward": {"workers": 1},
    "traces": {"samples": 4, "chunk": 4, "correct_at": 0.05},
}
# fmt: off
RUNS = {
    "grpo": "grpo grpo.yaml",
    "grpo_two_updates":
        "grpo grpo.yaml --updates-per-rollout 2 --loss.name gspo --lora.dropout 0.1",
    "grpo_cispo_kl":
        "grpo grpo.yaml --loss.name cispo --loss.beta 0.05 --advantage.normalize batch",
    "grpo_game": "grpo grpo.yaml --env.name reasoning_gym:chain_sum --tokens-per-microbatch 400",
    "grpo_tools": "grpo grpo.yaml --env.name calculator --tokens-per-microbatch 1000",
    "sft": "sft given.yaml --data.train sft.jsonl",
    "dpo": "dpo given.yaml --data.train pairs.jsonl",
    "dpo_before": "dpo given.yaml --data.train pairs.jsonl --precompute-reference",
    "orpo": "orpo given.yaml --data.train pairs.jsonl",
    "simpo": "simpo given.yaml --data.train pairs.jsonl",
    "kto": "kto given.yaml --data.train marked.jsonl",
}
# fmt: on


def make_workplace() -> None:
    """Write a model, data, a reward and configurations into the working directory."""
    import yaml

    from helpers.tiny import tiny_llama, tiny_tokenizer

    model = tiny_llama(context=1024)
    model.lm_head.weight.data *= 4
    model.generation_config.eos_token_id = [2, *range(40, 60)]
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    words = [chr(97 + i) for i in range(16)]
    pairs = [
        {"question": f"say {w}", "chosen": w * (3 + i % 4), "rejected": f"no {w}" * (1 + i % 3)}
        for i, w in enumerate(words)
    ]
    tables: dict[str, list[dict[str, Any]]] = {
        "data": [{"question": f"Question {i}?", "answer": str(i)} for i in range(40)],
        "sft": [{"question": f"say {w}", "answer": w * (3 + i % 4)} for i, w in enumerate(words)],
        "pairs": pairs,
        "marked": [
            {"question": row["question"], "completion": row[side], "label": side == "chosen"}
            for i, row in enumerate(pairs)
            for side in (["chosen"] if i % 2 else ["rejected"])
        ],
    }
    for name, rows in tables.items():
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("reward.py").write_text(REWARD)
    for name, config in {"grpo": GRPO, "given": GIVEN, "distill": DISTILL}.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config))


def fingerprint(folder: Path) -> dict[str, Any]:
    """Figures of every step but times, and a hash of each weight file of a run folder."""
    from safetensors.torch import load_file

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [
        {k: v for k, v in json.loads(line).items() if "time" not in k and "memory" not in k}
        for line in lines
    ]
    hashes = {}
    for file in sorted(folder.rglob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.contiguous().view(-1).numpy().tobytes())
        hashes[str(file.relative_to(folder))] = digest.hexdigest()[:16]
    return {"steps": steps, "weights": hashes}


def main() -> None:
    """Print the fingerprints as JSON."""
    command = [sys.executable, "-m", "rlsloth"]
    import subprocess

    here = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    found = {}
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        with contextlib.redirect_stdout(io.StringIO()):
            make_workplace()

        def run(*words: str) -> None:
            done = subprocess.run([*command, *words], env=env, capture_output=True, text=True)
            if done.returncode:
                print(" ".join(words), done.stdout, done.stderr, file=sys.stderr)

        for name, words in RUNS.items():
            run(*words.split(), "--run.dir", name)
            found[name] = fingerprint(Path(name))
        run("distill", "distill.yaml", "--out", "distilled", "--train-student", "--student.steps",
            "3", "--student.samples-per-step", "4", "--student.model.path", "model",
            "--student.data.heldout", "4")  # fmt: skip
        rows = [json.loads(x) for x in Path("distilled/train.jsonl").read_text().splitlines()]
        traces = json.dumps([{k: row[k] for k in ("prompt", "completion")} for row in rows])
        found["distill"] = {"traces": hashlib.sha256(traces.encode()).hexdigest()[:16]}
        found["student"] = fingerprint(Path("distilled/student"))
        for form in ("adapter", "merged"):
            run("export", "grpo", "--to", form, "--out", form)
            files = sorted(Path(form).glob("*.safetensors"))
            sums = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
            found[f"export_{form}"] = {"files": sums}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
