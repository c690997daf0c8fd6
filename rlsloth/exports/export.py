"""``rlsloth export``: write a trained adapter as a PEFT folder, whole weights or GGUF files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.config.export import ExportConfig
from rlsloth.errors import UserError
from rlsloth.exports.adapter import write_adapter
from rlsloth.exports.card import Card, write_card
from rlsloth.exports.carried import learnt_ends, template_flag
from rlsloth.exports.check import USUAL, check_merged, sample_ids, score
from rlsloth.exports.compressed.export import compress
from rlsloth.exports.compressed.scheme import plan_scheme
from rlsloth.exports.merged import DTYPES, checksums, merge
from rlsloth.exports.tokenizer import copy_processors, export_tokenizer, save_tokenizer
from rlsloth.exports.transformers4 import add_old_keys
from rlsloth.exports.writing import check_out, whole_folder
from rlsloth.policy.device import available_precision, pick_device
from rlsloth.policy.files import locate
from rlsloth.policy.identity import write_identity
from rlsloth.policy.load import LoadedModel, load_model
from rlsloth.policy.lora import dora_setting, load_adapter
from rlsloth.training.source import Source, find_source

VLLM_KWARGS = "--default-chat-template-kwargs"
LLAMA_KWARGS = "--chat-template-kwargs"
K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")


def run_export(cfg: ExportConfig) -> None:
    """Write the folder ``cfg.out``, reopen and check it, and print what it contains.

    Raises:
        UserError: the input is bad or a check failed; ``cfg.out`` is then left as it was.
    """
    assert cfg.source is not None
    assert cfg.out is not None
    # Below errors, bitsandbytes reports that an optional package is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    out = cfg.out.expanduser()
    source = find_source(
        str(cfg.source),
        base=cfg.base,
        device=cfg.device,
        trust_remote_code=cfg.trust_remote_code,
    )
    _refuse(cfg, source)
    keep = [cfg.source.expanduser(), Path(source.base.path).expanduser()]
    check_out(out, overwrite=cfg.overwrite, keep=keep)
    with whole_folder(out) as folder:
        card = _WRITERS[cfg.to](cfg, source, folder, out.resolve().name)
        write_card(folder, card, source)
        more = {"prompts": dict(source.prompts)} if source.prompts else {}
        write_identity(source.identity, folder, export=cfg.to, **more)
    print(f"wrote {out}: {card.about}")


def _refuse(cfg: ExportConfig, source: Source) -> None:
    """Refuse a format that a source does not have."""
    if source.adapter is not None:
        return
    if source.run is None and cfg.to != "gguf":
        raise UserError(
            f"{cfg.source} is neither a run's folder (with config.yaml and adapter/) nor an "
            "adapter's (with adapter_config.json); pass one of these"
        )
    if source.run is not None and cfg.to == "adapter":
        raise UserError(
            f"{cfg.source} trained the model's own weights, not an adapter; pass --to merged (or "
            "fp8, w4a16, gguf)"
        )
    if source.run is not None and cfg.onto == "original":
        raise UserError(
            f"--onto original: {cfg.source} trained the model's own weights, there is no adapter "
            "to merge; leave it out"
        )


def _adapter(_: ExportConfig, source: Source, folder: Path, name: str) -> Card:
    tensors = write_adapter(source, export_tokenizer(source), folder)
    base, usage = source.base.path, f"rlsloth chat ./{name}"
    if not dora_setting(LoraConfig(), source.base.model_copy(update={"adapter": source.adapter})):
        usage = (
            f"vllm serve {base} --enable-lora --max-lora-rank {_rank(source)} "
            f"--lora-modules {name}=./{name}{template_flag(source.prompts, VLLM_KWARGS)}\n{usage}"
        )
    return Card(
        title=name,
        about=f"A LoRA adapter with its tokenizer and chat template. Its {tensors} tensors were "
        "read back unchanged and fit the base model.",
        library="peft",
        usage=usage,
    )


def _rank(source: Source) -> int:
    """Return the smallest ``--max-lora-rank`` of vLLM that holds the adapter's rank."""
    import peft

    assert source.adapter is not None
    rank = int(peft.PeftConfig.from_pretrained(str(source.adapter)).r)
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def _merged(cfg: ExportConfig, source: Source, folder: Path, name: str) -> Card:
    about = write_merged(cfg, source, folder)
    return Card(name, about, "transformers", f"{_serve(source, name)}\nrlsloth chat ./{name}")


def _compressed(cfg: ExportConfig, source: Source, folder: Path, name: str) -> Card:
    assert cfg.to == "fp8" or cfg.to == "w4a16"
    scheme = plan_scheme(source.base, cfg.to, cfg.group_size)
    work = folder / ".merged"
    work.mkdir()
    about = write_merged(cfg, source, work)
    about += f" {compress(work, folder, scheme, source, cfg.dtype)}"
    shutil.rmtree(work)  # a folder that stayed would be a part of the export
    return Card(name, about, "transformers", _serve(source, name))


def _serve(source: Source, name: str) -> str:
    return f"vllm serve ./{name}{template_flag(source.prompts, VLLM_KWARGS)}"


def write_merged(cfg: ExportConfig, source: Source, folder: Path) -> str:
    """Merge what ``source`` trained, write the weights to ``folder``, reopen and check them.

    Returns:
        Two sentences for the model card about the merge and its checks.

    Raises:
        UserError: the adapter cannot be merged, or the check failed.
    """
    tokenizer = export_tokenizer(source)
    base = source.base if cfg.onto == "trained" else _original(source.base)
    loaded = load_model(base)
    adapted: Any = loaded.model
    if source.adapter is not None:
        adapted = load_adapter(loaded.model, source.adapter, base.path, to_train=False)
    context = int(loaded.model.config.get_text_config().max_position_embeddings)
    onto = "original" if cfg.onto == "original" else _held_in(loaded)
    generation = loaded.model.generation_config
    generation.eos_token_id = learnt_ends(tokenizer, generation.eos_token_id, source.prompts)
    del loaded
    ids = sample_ids(tokenizer, context)
    wanted = score(adapted, ids)
    dtype = DTYPES[cfg.dtype]
    merged = merge(adapted, dtype)
    del adapted
    sums = dict(checksums(merged.state))
    merged.save(folder)
    del merged
    add_old_keys(folder)
    save_tokenizer(tokenizer, source, folder)
    copy_processors(source.base, folder)
    found = check_merged(
        folder, dtype, sums, ids, wanted, trust_remote_code=source.base.trust_remote_code
    )
    if source.adapter is None:
        merged_from, trained = "the run trained the model's own weights", "the trained model"
    else:
        merged_from = f"the adapter was added in float32 to the {onto} weights of the base model"
        trained = "the base model with its adapter"
    return (
        f"Merged weights in {cfg.dtype}: {merged_from}. All {found.tensors} tensors were read back "
        f"unchanged. Over {found.tokens} tokens, log-probs differ from those of {trained} by "
        f"{found.gap:.2g} nats on average{_hint(found.gap, cfg.dtype)}."
    )


def _hint(gap: float, dtype: str) -> str:
    """Explain a gap (nats a token) that is larger than rounding to 16 bits usually causes."""
    if gap <= USUAL:
        return ""
    remedy = "; --dtype f16 keeps three more bits of each weight" if dtype == "bf16" else ""
    return f", more than the {USUAL:g} that rounding usually causes{remedy}"


def _held_in(loaded: LoadedModel) -> str:
    """Name the form in which training kept the base model's weights."""
    if loaded.precision == "nf4":
        return "dequantised NF4"
    return loaded.precision


def _original(base: ModelConfig) -> ModelConfig:
    """Configure the base model in the precision in which its files store it.

    Raises:
        UserError: the files store quantised weights.
    """
    files = locate(base)
    if files.gguf is not None:
        return base.model_copy(update={"precision": "fp32"})
    config = files.read_config()
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"--onto original: {base.path} stores quantised weights only, so there are no 16-bit "
            "ones to merge onto; leave --onto out"
        )
    stored = config.get_text_config().dtype
    precision = available_precision(
        "bf16" if stored == torch.bfloat16 else "fp32", pick_device(base.device)
    )
    return base.model_copy(update={"precision": precision})


def _gguf(cfg: ExportConfig, source: Source, folder: Path, name: str) -> Card:
    from rlsloth.exports.gguf.check import check_gguf
    from rlsloth.exports.gguf.quantize import load_llama_cpp, quantize
    from rlsloth.exports.gguf.write import write_gguf

    if any(kind in K_QUANTS for kind in cfg.gguf):
        load_llama_cpp()  # fails now, not after minutes of work, if it is not installed
    whole, about = Path(source.base.path).expanduser(), ""
    work = folder / ".merged"
    if source.adapter is not None or source.run is not None:
        work.mkdir()
        whole, about = work, write_merged(cfg, source, work) + " "
    elif not (whole / "config.json").is_file():
        raise UserError(
            f"{cfg.source} is neither a run's folder (with config.yaml), nor an adapter's "
            "(adapter_config.json), nor a model's (config.json); pass one of these"
        )
    lines = []
    for kind in dict.fromkeys(cfg.gguf):
        path = folder / _file(name, kind)
        if kind == "f16" or kind == "bf16" or kind == "q8_0":
            write_gguf(whole, path, kind, name)
        else:
            work.mkdir(exist_ok=True)
            full = work / "bf16.gguf"
            if not full.is_file():
                write_gguf(whole, full, "bf16", name)
            quantize(full, path, kind)
        found = check_gguf(whole, path)
        line = f"{path.name} ({found.tensors} tensors read back"
        if found.tokens:
            gap = abs(found.nll - found.nll_gguf)
            line += f", mean NLL over {found.tokens} tokens {gap:.2g} nats from transformers'"
        line += ")"
        lines.append(line)
    first = _file(name, cfg.gguf[0])
    _write_modelfile(source, whole, folder, first)
    if work.exists():
        shutil.rmtree(work)  # a folder that stayed would be a part of the export
    return Card(
        title=name,
        about=f"{about}GGUF files for llama.cpp: {'; '.join(lines)}.",
        library="gguf",
        usage=f"llama-server -m {first} --jinja"
        f"{template_flag(source.prompts, LLAMA_KWARGS)}\nollama create {name} -f Modelfile",
    )


def _file(name: str, kind: str) -> str:
    return f"{name}-{kind.upper()}.gguf"


def _write_modelfile(source: Source, whole: Path, folder: Path, file: str) -> None:
    from rlsloth.exports.gguf.ollama import modelfile

    options = source.prompts.get("chat_template_kwargs") or {}
    try:
        text = modelfile(whole, f"./{file}", options, source.prompts.get("system_prompt"))
    except UserError as error:  # llama.cpp runs the GGUF files without a Modelfile
        print(f"no Modelfile: {str(error).replace(str(whole), source.base.path)}")
        return
    (folder / "Modelfile").write_text(text, encoding="utf-8")


_WRITERS: dict[str, Callable[[ExportConfig, Source, Path, str], Card]] = {
    "adapter": _adapter,
    "merged": _merged,
    "fp8": _compressed,
    "w4a16": _compressed,
    "gguf": _gguf,
}
