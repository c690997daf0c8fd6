"""Train, evaluate and export from Python, with a lambda as the reward.

python examples/python_api.py FOLDER_OR_GGUF [STEPS]
"""

import sys

import rlsloth as rl

sums = [(a, b) for a in range(10) for b in range(10)]
rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
right = [
    lambda completions, answer, **_: [
        float(gold in text[0]["content"]) for text, gold in zip(completions, answer, strict=True)
    ]
]
config = rl.GrpoConfig(
    model=rl.ModelConfig(path=sys.argv[1]),
    steps=int(sys.argv[2]) if len(sys.argv) > 2 else 20,
    prompts_per_step=8,
    rollout=rl.RolloutConfig(max_tokens=32),
    env=rl.EnvConfig(heldout=20),
    eval=rl.EvalConfig(samples=4),
    run=rl.RunConfig(dir="runs/python_api"),
)
run = rl.grpo(config, rewards=right, data=rows)
print(f"accuracy {run.accuracy_before:.2f} -> {run.accuracy_after:.2f}, report in {run.report}")
print(rl.evaluate(config, rewards=right, data=rows).summary["difference"])  # with its interval
print(rl.export(rl.ExportConfig(source=run.folder, to="merged", out="runs/python_api_merged")))
