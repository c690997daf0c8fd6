"""Hashes of Python objects by which a resumed run notices that one has changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any

DIGITS = 12
SIMPLE = (type(None), bool, int, float, complex, str, bytes, re.Pattern)


def hash_code(item: Any) -> str:
    """Hash a function, a class or a callable object: its byte code, constants and defaults, what it
    closes over, and the functions and constants of its module that it uses.

    Comments and line numbers do not count. Another version of Python gives another hash.
    """
    return _digest([_describe(item, set())])


def hash_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash the contents of rows, in their order."""
    return _digest(
        repr(sorted((str(key), repr(value)) for key, value in row.items())) for row in rows
    )


def _digest(texts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode("utf-8", "backslashreplace") + b"\n")
    return total.hexdigest()[:DIGITS]


def _describe(item: Any, seen: set[int]) -> str:
    """Describe an object; ``seen``: those being described, and functions described before."""
    if isinstance(item, SIMPLE):
        return repr(item)
    if id(item) in seen:
        return "again"
    seen.add(id(item))
    text = " ".join(_parts(item, seen))
    if not isinstance(item, FunctionType | type):  # others may be gone, their ids in use again
        seen.remove(id(item))
    return text


def _parts(item: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(item, list | tuple):
        yield f"[{', '.join(_describe(part, seen) for part in item)}]"
    elif isinstance(item, set | frozenset):  # their order differs between processes
        yield f"{{{', '.join(sorted(_describe(part, seen) for part in item))}}}"
    elif isinstance(item, Mapping):
        yield f"{{{', '.join(f'{k!r}: {_describe(v, seen)}' for k, v in item.items())}}}"
    elif isinstance(item, CodeType):
        yield item.co_code.hex()
        yield repr((item.co_names, item.co_varnames, item.co_freevars))
        yield _describe(item.co_consts, seen)
    elif isinstance(item, FunctionType):
        yield _describe(item.__code__, seen)
        yield _describe([item.__defaults__, item.__kwdefaults__], seen)
        for cell in item.__closure__ or ():
            yield _describe(_content(cell), seen)
        for name in sorted(_names(item.__code__)):
            value = item.__globals__.get(name)
            if isinstance(value, SIMPLE) or getattr(value, "__module__", 0) == item.__module__:
                yield f"{name}={_describe(value, seen)}"
    elif isinstance(item, staticmethod | classmethod):
        yield _describe(item.__func__, seen)
    elif isinstance(item, property):
        yield _describe([item.fget, item.fset], seen)
    elif isinstance(item, partial):
        yield _describe([item.func, item.args, item.keywords], seen)
    elif isinstance(item, type):
        yield repr([base.__qualname__ for base in item.__bases__])
        for name, value in sorted(vars(item).items()):
            if callable(value) or not name.startswith("__"):
                yield f"{name}={_describe(value, seen)}"
    elif hasattr(item, "__func__"):  # a bound method
        yield _describe([item.__func__, item.__self__], seen)
    else:
        kind = type(item)
        yield f"{kind.__module__}.{kind.__qualname__}"
        if kind.__module__ != "builtins" and callable(item):
            yield _describe([kind, vars(item) if hasattr(item, "__dict__") else None], seen)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _names(code: CodeType) -> set[str]:
    """Global names in a function and in the functions within it."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))
