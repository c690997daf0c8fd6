"""Quantising a GGUF file with llama.cpp's k-quants."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rlsloth.errors import UserError
from rlsloth.exports.gguf.write import whole_file

KQuant = Literal["q6_k", "q5_k_m", "q4_k_m"]
FILE_TYPES = {
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
}
_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h


def quantize(source: Path, out: Path, kind: KQuant) -> None:
    """Quantise the f16 or bf16 GGUF file ``source`` to ``out``.

    llama.cpp gives each tensor its own type: in q4_k_m and q5_k_m some of the value and down
    projections and the head take Q6_K. Rows that 256 does not divide take Q8_0, Q5_1 or Q5_0.

    Raises:
        UserError: llama-cpp-python is missing, or llama.cpp fails; then nothing is left of ``out``.
    """
    library = load_llama_cpp()
    options = library.llama_model_quantize_default_params()
    options.ftype = getattr(library, FILE_TYPES[kind])
    options.nthread = os.cpu_count() or 1
    with quiet(library) as errors, whole_file(out) as temporary:
        failed = library.llama_model_quantize(
            os.fsencode(source), os.fsencode(temporary), ctypes.byref(options)
        )
        if failed:
            reason = errors[-1] if errors else f"status {failed}"
            raise UserError(f"llama.cpp cannot quantise {source} to {out}: {reason}")


def load_llama_cpp() -> Any:
    """The module llama_cpp.

    Raises:
        UserError: it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise UserError(
            "k-quants need llama.cpp: pip install 'rlsloth[gguf]' (it is compiled for some minutes "
            "and needs a C++ compiler and cmake)"
        ) from error
    return llama_cpp


@contextmanager
def quiet(library: Any) -> Iterator[list[str]]:
    """Keep llama.cpp's lines off standard error; its errors are in the list."""
    errors: list[str] = []

    def keep(level: int, text: bytes, _: Any) -> None:
        if level == _LOG_LEVEL_ERROR:
            errors.append(text.decode(errors="replace").strip())

    callback = library.llama_log_callback(keep)  # the library holds only a pointer to it
    before, data = library.llama_log_callback(), ctypes.c_void_p()
    library.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    library.llama_log_set(callback, None)
    try:
        yield errors
    finally:
        library.llama_log_set(before, data)
