"""Plugins by name: a built-in one, a dotted path, or a file.

math_verify              rlsloth/rewards/math_verify.py, attribute math_verify
my_pkg.rewards:tidy      an importable module
./mine.py:reward         a file, relative to the working directory
python:tidy#3f2a9c015b7e an object that was passed from Python, see ``passing``
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import ismodule
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError, describe_exception, nearest

KINDS = {"rewards": "reward", "envs": "environment"}
"""Package to the word for its plugins in messages."""
PASSED = "python:"
"""Beginning of a name for an object that was passed from Python; its hash follows ``#``."""
_passed: ContextVar[Mapping[str, Any] | None] = ContextVar("_passed", default=None)


@contextmanager
def passing(objects: Mapping[str, Any]) -> Iterator[None]:
    """Let names that begin with PASSED refer to objects, in this context (thread) alone.

    So a configuration stays plain text: it names what was passed, and a later start without the
    object is refused.
    """
    token = _passed.set(objects)
    try:
        yield
    finally:
        _passed.reset(token)


def is_passed(spec: str) -> bool:
    """Whether a name refers to an object that was passed from Python."""
    return spec.startswith(PASSED)


def passed_name(spec: str) -> str:
    """Name of a passed object without its hash: ``tidy`` for ``python:tidy#3f2a9c015b7e``."""
    return spec.removeprefix(PASSED).partition("#")[0]


def passed(spec: str, what: str) -> Any:
    """Return the object that was passed from Python under ``spec``.

    Args:
        what: the object's kind in messages, such as reward.

    Raises:
        UserError: it was not passed to this run, as when a run is resumed by the command line.
    """
    objects = _passed.get() or {}
    if spec not in objects:
        raise UserError(
            f"{what} {spec} is a Python object, which no configuration file holds: make the call "
            "from Python, with that object; to resume a run, with run=RunConfig(dir=..., "
            "resume=True)"
        )
    return objects[spec]


def builtin_names(package: str) -> list[str]:
    """Names of the plugins that ship in a package such as ``rlsloth.rewards``, one a file,
    sorted."""
    paths = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(paths) if not m.name.startswith("_"))


def load(spec: str, package: str) -> Any:
    """The reward or environment that a spec names.

    Raises:
        UserError: no such plugin, file, module or attribute; the message says where it looked.
    """
    kind = KINDS[package.rsplit(".", 1)[-1]]
    if is_passed(spec):
        return passed(spec, kind)
    what = f"{kind} {spec!r}"
    place, _, attribute = spec.partition(":")
    names = builtin_names(package)
    if place not in names:
        return load_own(spec, what, names)
    return _attribute(_import(f"{package}.{place}", what), attribute or place, place, what)


def load_own(spec: str, what: str, builtin: Sequence[str]) -> Any:
    """The user's object that a dotted path or a file names.

    Args:
        what: the plugin in messages, with its spec.
        builtin: names that would have been found without a path.

    Raises:
        UserError: no such file, module or attribute, or a name that is not built in.
    """
    place, _, attribute = spec.partition(":")
    if place.endswith(".py"):
        return _attribute(_module_from_file(Path(place).expanduser(), what), attribute, place, what)
    if attribute and "." in place:
        return _attribute(_import(place, what), attribute, place, what)
    raise UserError(
        f"unknown {what}{nearest(place, builtin)} "
        f"(built in: {', '.join(builtin)}; or pkg.module:name, or ./file.py:name)"
    )


def _import(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: cannot import {name}: {describe_exception(error)}") from error


def _module_from_file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise UserError(f"{what}: no file {path} (looked from {Path.cwd()})")
    # A name of its own: a user's rewards.py must not shadow an importable module of that name.
    # A hash of the contents: a notebook that edits the file and trains again gets the new code.
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    name = f"rlsloth_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    source = importlib.util.spec_from_file_location(name, path)
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module
    try:
        source.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{what}: {path} raised {describe_exception(error)}") from error
    return module


def _attribute(module: Any, name: str, place: str, what: str) -> Any:
    if not name:
        raise UserError(f"{what}: name what to use, as in {place}:NAME")
    try:
        return getattr(module, name)
    except AttributeError:
        public = [n for n, found in vars(module).items() if n[0] != "_" and not ismodule(found)]
        raise UserError(f"{what}: {place} has no {name!r}{nearest(name, public)}") from None
