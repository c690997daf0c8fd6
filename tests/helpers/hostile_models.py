"""Damaged and hostile model folders and GGUF files, and a process that tries to load them.

``python -m helpers.hostile_models FOLDER SEED FIRST COUNT`` makes COUNT cases in FOLDER, from the
sound models ``sound`` and ``sound.gguf`` there, loads each, and prints one line of JSON for each.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

JSON_FILES = (
    "config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json",
    "model.safetensors.index.json",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, -1, 0, 1, 3, 10**7, 2**40, 2**70, 1e308, True, "", "x", "../outside/canary",
    "/etc/passwd", [], {}, [[]], ["x"] * 3, {"a": {"b": [1]}}, "\x00", "a" * 5000, "owner/kernel",
    [1] * 1000,
)  # fmt: skip
HOSTILE: dict[str, dict[str, Any]] = {
    "config.json": {
        "attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel@v1:f",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "num_hidden_layers": 10**7, "model_type": "no_such", "dtype": "load",
        "text_config": {"num_hidden_layers": 10**9}, "rope_parameters": {"rope_type": "evil"},
        "layer_types": ["full_attention"] * 10**6, "base_model_name_or_path": "../outside",
    },
    "tokenizer_config.json": {
        "tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.T", None]},
        "tokenizer_file": "../outside/canary.json", "vocab_file": "/etc/passwd",
        "fast_tokenizer_files": ["../outside/tokenizer.9.json", "tokenizer.json"],
        "added_tokens_decoder": {"0": {"content": "x"}}, "chat_template": {"default": 3},
        "model_max_length": -5, "init_inputs": ["../outside/canary"], "bos_token": {"a": 1},
    },
    "generation_config.json": {"eos_token_id": [2**70, -1, "x"], "custom_generate": "owner/code"},
    "model.safetensors.index.json": {
        "weight_map": {"lm_head.weight": "../outside/canary.safetensors"}
    },
}  # fmt: skip
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}"
    "{% endfor %}{% endfor %}",
    "{{ 10**10**10 }}", "{{ 'x' * 10**11 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}",
    "{% for %}", "{{ 1/0 }}", "{{ raise_exception(messages) }}", "",
)  # fmt: skip


def flip(path: Path, rng: random.Random, limit: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 20))):
        data[rng.randrange(min(len(data), limit))] = rng.randrange(256)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def overwrite(path: Path, rng: random.Random, limit: int) -> None:
    """Put a huge count somewhere into the first bytes."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(min(len(data), limit))
    data[at : at + 8] = rng.choice((2**63, 2**32, 2**40, 255)).to_bytes(8, "little")
    path.write_bytes(data)


def mutate_json(path: Path, rng: random.Random) -> None:
    """Replace, remove or add a value somewhere in a JSON file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.5:
            at = at[key]
            continue
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice(ODD)
        break
    path.write_text(json.dumps(value), encoding="utf-8")


def add_hostile(folder: Path, rng: random.Random) -> None:
    name = rng.choice(list(HOSTILE))
    key = rng.choice(list(HOSTILE[name]))
    path = folder / name
    value = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(value | {key: HOSTILE[name][key]}))
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()


def add_adapter(folder: Path, rng: random.Random) -> None:
    base = rng.choice(("../outside", "owner/name", None))
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def pickled(folder: Path, rng: random.Random) -> None:
    payload = b"cos\nsystem\n(S'touch ran'\ntR."
    (folder / "model.safetensors").unlink()
    (folder / rng.choice(("pytorch_model.bin", "model.pt"))).write_bytes(payload)


def template(folder: Path, rng: random.Random) -> None:
    (folder / "chat_template.jinja").write_text(rng.choice(TEMPLATES))


def damage_folder(folder: Path, rng: random.Random) -> str:
    names = [name for name in (*JSON_FILES, "model.safetensors") if (folder / name).is_file()]
    file = folder / rng.choice(names)
    tries: list[tuple[str, Callable[[], None]]] = [
        (f"flip {file.name}", lambda: flip(file, rng, 4000)),
        (f"cut {file.name}", lambda: cut(file, rng)),
        ("huge", lambda: overwrite(folder / "model.safetensors", rng, 600)),
        *[("json", lambda: mutate_json(folder / rng.choice(JSON_FILES[:2]), rng))] * 4,
        ("tokenizer", lambda: mutate_json(folder / "tokenizer.json", rng)),
        *[("hostile", lambda: add_hostile(folder, rng))] * 4,
        ("adapter", lambda: add_adapter(folder, rng)),
        ("pickled", lambda: pickled(folder, rng)),
        ("template", lambda: template(folder, rng)),
    ]
    name, change = rng.choice(tries)
    change()
    return name


def damage_gguf(file: Path, rng: random.Random) -> str:
    name, change = rng.choice(
        [
            ("flip", lambda: flip(file, rng, 30_000)),
            ("flip the beginning", lambda: flip(file, rng, 900)),
            ("cut", lambda: cut(file, rng)),
            ("huge", lambda: overwrite(file, rng, 30_000)),
            ("huge at the beginning", lambda: overwrite(file, rng, 900)),
        ]
    )
    change()
    return f"gguf {name}"


def watch(allowed: list[str], seen: list[str]) -> None:
    """Record what is opened outside the allowed places, and what is run or connected."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "os.system", "subprocess.Popen"):
            seen.append(f"{event} {args[0]!s:.80}")
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith(tuple(allowed)):
                seen.append(f"open {path}")

    sys.addaudithook(hook)


def attempt(path: Path) -> str:
    """Load a model as training does. Returns ok, the refusal, or what went wrong."""
    from rlsloth.config import EnvConfig, ModelConfig
    from rlsloth.data.renderer import Renderer
    from rlsloth.errors import UserError
    from rlsloth.policy.load import load_model
    from rlsloth.policy.tokenizer import load_tokenizer, read_limits
    from rlsloth.records import Prompt

    cfg = ModelConfig(path=str(path), device="cpu")
    try:
        tokenizer = load_tokenizer(cfg)
        read_limits(cfg)
        renderer = Renderer(tokenizer, EnvConfig())
        renderer.check([Prompt(0, ({"role": "user", "content": "hi"},), {})])
        load_model(cfg)
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"TWO LINES {error!r:.300}"
    except BaseException as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(last))
        return f"TRACEBACK {type(error).__name__} {error!s:.150} at {where}"
    return "ok"


def main() -> None:
    place, seed, first, count = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    seen: list[str] = []
    attempt(place / "sound")  # imports
    allowed = [sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/usr", "/proc", "/sys"]
    case = place / f"case-{first}"
    watch([*map(os.path.realpath, allowed), "/dev", str(case)], seen)
    for number in range(first, first + count):
        rng = random.Random(seed * 100_003 + number)
        shutil.rmtree(case, ignore_errors=True)
        if number % 4 == 3:
            case.mkdir()
            path = Path(shutil.copy(place / "sound.gguf", case / "model.gguf"))
            name = damage_gguf(path, rng)
        else:
            path = Path(shutil.copytree(place / "sound", case))
            name = damage_folder(path, rng)
        seen.clear()
        started = time.monotonic()
        print(json.dumps({"begins": number, "damage": name}), flush=True)
        outcome = attempt(path)
        row = {"case": number, "damage": name, "outcome": outcome, "seen": sorted(set(seen))[:5]}
        print(json.dumps(row | {"seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
