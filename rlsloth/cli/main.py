"""The command ``rlsloth``: run a command and return an exit status."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence

from rlsloth import __version__
from rlsloth.cli.table import COMMANDS, overview
from rlsloth.errors import UserError, nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 success, 1 a failed check, 2 bad input or a file that cannot be read or
        written, 130 interrupted, 141 the output was closed (``| head``).
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
        # The rest of the buffer would be flushed at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _has_lost_its_reader() -> bool:
    """Whether stdout is a pipe that was closed (``| head``): any other broken pipe is a bug."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(args: list[str]) -> int:
    if not args:
        print(overview(), end="", file=sys.stderr)
        return 2
    name, *rest = args
    if name in ("-h", "--help"):
        print(overview(), end="")
        return 0
    if name == "--version":
        print(f"rlsloth {__version__}")
        return 0
    try:
        return _run(name, rest)
    except UserError as error:
        print("error: " + str(error).replace("\n", "\nerror: "), file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except _file_errors() as error:
        print(f"error: {_file_error_text(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(name: str, argv: list[str]) -> int:
    commands = {command.name: command for command in COMMANDS}
    if name not in commands:
        raise UserError(f"no command {name!r}{nearest(name, commands)} (see rlsloth --help)")
    return commands[name].run(argv)


def _file_errors() -> tuple[type[Exception], ...]:
    """Exceptions about files; safetensors, if imported, has its own."""
    safetensors = sys.modules.get("safetensors")
    return (OSError, safetensors.SafetensorError) if safetensors else (OSError,)


def _file_error_text(error: Exception) -> str:
    """One line with the file, if it is known, and the system's message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
