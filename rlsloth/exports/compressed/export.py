"""Compress a merged folder, check the result, and describe it for the model card."""

from __future__ import annotations

from pathlib import Path

from rlsloth.exports.compressed.check import Compared, check_compressed, sample_prompts
from rlsloth.exports.compressed.scheme import Scheme
from rlsloth.exports.compressed.write import write_compressed
from rlsloth.exports.stored import Weights
from rlsloth.policy.device import pick_device
from rlsloth.training.source import Source


def compress(merged: Path, folder: Path, scheme: Scheme, source: Source, dtype: str) -> str:
    """Write the merged folder's model to ``folder`` in fewer bits, and check what was written.

    Args:
        merged: the folder of 16-bit weights.
        folder: an existing folder.
        scheme: the layers to compress, and how.
        source: the trained model.
        dtype: name of the merged weights' type.

    Returns:
        Sentences for the model card about the form and the check.

    Raises:
        UserError: the model cannot be compressed, or the check failed.
    """
    from transformers import AutoConfig, AutoTokenizer

    sums = write_compressed(merged, folder, scheme, pick_device(source.base.device))
    trust = source.base.trust_remote_code
    config = AutoConfig.from_pretrained(merged, trust_remote_code=trust)
    context = int(config.get_text_config().max_position_embeddings)
    prompts = sample_prompts(AutoTokenizer.from_pretrained(merged), context, source.prompts)
    found = check_compressed(folder, merged, scheme, sums, prompts, trust_remote_code=trust)
    sizes = [_gigabytes(place) for place in (merged, folder)]
    return _about(scheme, found, sizes, dtype)


def _gigabytes(folder: Path) -> float:
    return sum((folder / file).stat().st_size for file in Weights(folder).files) / 1e9


def _about(scheme: Scheme, found: Compared, sizes: list[float], dtype: str) -> str:
    if scheme.to == "fp8":
        form = (
            "FP8 (float8_e4m3fn) with one scale an output channel; engines round these layers' "
            "inputs to FP8, too, with one scale a token"
        )
    else:
        form = (
            f"4 bits (int4) with one scale for {scheme.group} weights, the one of smallest squared "
            "error; inputs keep 16 bits"
        )
    uneven = ""
    if scheme.uneven:
        kinds = sorted({name.rpartition(".")[2] for name in scheme.uneven})
        uneven = (
            f" {len(scheme.uneven)} linear layers ({', '.join(kinds)}), whose input size is no "
            f"multiple of {scheme.group}, stay in {dtype}."
        )
    return (
        f"Compressed once from these merged weights, in the form of compressed-tensors: "
        f"{len(scheme.linears)} linear layers have {form}. Embeddings and output head stay in "
        f"{dtype}.{uneven} The weights take {sizes[1]:.3g} GB in place of {sizes[0]:.3g}. Read "
        f"back, they predict the next token with a divergence (KL) of {found.divergence:.2g} nats "
        f"a token from the merged weights, mean of {found.tokens} tokens in {found.prompts} "
        f"prompts; the most likely token is the same at {found.agree:.0%}."
    )
