"""Quantise a GGUF file with llama.cpp's k-quants."""

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

    llama.cpp chooses a type for each tensor: with q4_k_m and q5_k_m, the head and some of the value
    and down projections become Q6_K. Tensors whose rows are not a multiple of 256 long become Q8_0,
    Q5_1 or Q5_0.

    Raises:
        UserError: llama-cpp-python is not installed, or llama.cpp fails; ``out`` is then not
            written.
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
            raise UserError(
                f"llama.cpp cannot quantise {source} to {out}: {reason}; pass another --gguf, such "
                "as q8_0, which needs no llama.cpp"
            )


def load_llama_cpp() -> Any:
    """Import llama_cpp, the module of llama-cpp-python.

    Raises:
        UserError: llama-cpp-python is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise UserError(
            "--gguf q6_k, q5_k_m and q4_k_m need llama-cpp-python: pip install 'rlsloth[gguf]' "
            "(compiling it takes some minutes, a C++ compiler and cmake)"
        ) from error
    return llama_cpp


@contextmanager
def quiet(library: Any) -> Iterator[list[str]]:
    """Keep llama.cpp from printing to standard error; its errors are appended to the list."""
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
