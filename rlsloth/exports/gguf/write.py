"""Write a GGUF file from a Hugging Face model folder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rlsloth.errors import UserError, first_line
from rlsloth.exports.gguf.families import add_hyperparameters, family_of, read_config
from rlsloth.exports.gguf.tensors import Kind, data, plan
from rlsloth.exports.gguf.vocab import add_vocabulary, read_vocabulary
from rlsloth.exports.stored import Weights
from rlsloth.files import replacing_file

FILE_TYPES = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""--gguf -> name in gguf.LlamaFileType."""


def write_gguf(folder: Path, out: Path, kind: Kind, name: str | None = None) -> None:
    """Write the model in ``folder`` (config.json, safetensors, tokenizer) to the file ``out``.

    Matrices get the type ``kind``, norms and biases float32. Q8_0 stores blocks of 32 weights with
    one float16 scale. Memory holds one tensor at a time, in float32 and in ``kind``.

    Args:
        folder: the model's folder.
        out: the file.
        kind: type of the matrices.
        name: the model's name; the folder's by default.

    Raises:
        UserError: llama.cpp would run the model or its tokenizer differently from transformers, or
            the file cannot be written; ``out`` is then left as it was.
    """
    from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, LlamaFileType, Metadata, size_label

    config = read_config(folder)
    vocabulary = read_vocabulary(folder, config)
    weights = Weights(folder)
    entries = plan(folder, config, weights, kind)
    with whole_file(out) as temporary:
        writer = GGUFWriter(temporary, family_of(config).arch)
        for entry in entries:
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.type
            )
        total, *counts = writer.get_total_parameter_count()
        writer.add_type(GGUFType.MODEL)
        about = Metadata.load(None, folder, None, total)
        if name is not None:  # what gguf made of the folder's name is no name
            about = Metadata(name=name)
        about.name = about.name or folder.resolve().name
        about.size_label = about.size_label or size_label(total, *counts)
        about.set_gguf_meta_model(writer)
        add_hyperparameters(writer, config)
        writer.add_file_type(LlamaFileType[FILE_TYPES[kind]])
        add_vocabulary(writer, vocabulary)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, array in data(entries, config, weights):
                writer.write_tensor_data(array)
        finally:
            writer.close()


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``out`` that is renamed to ``out`` at the end.

    After a failure the temporary file is removed and ``out`` is left as it was.

    Raises:
        UserError: the file system refuses to write.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(out) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {first_line(error)}; make room or pass another --out"
        ) from error
