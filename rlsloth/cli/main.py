"""The command ``rlsloth``: run a command and return an exit status."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Sequence

from rlsloth import __version__
from rlsloth.cli.table import COMMANDS, overview
from rlsloth.errors import UserError, nearest, visible


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 success, 1 a failed check, 2 bad input or a file that cannot be read or
        written, 130 interrupted, 143 or 129 ended by SIGTERM or SIGHUP, 141 the output was closed
        (``| head``). A training run whose output was closed goes on to its end.
    """
    status = 1
    try:
        try:
            status = _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
        _turn_off_stdout()
        return 141
    except OSError:  # of the flush: a closed terminal, a full disk
        _turn_off_stdout()
    console = sys.modules.get("rlsloth.run.console")  # imported by runs
    return 141 if console is not None and console.reader_lost() else status


def _turn_off_stdout() -> None:
    """Point stdout at the null device: the rest of its buffer would be flushed at exit, and fail
    again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        _complain("error: " + str(error).replace("\n", "\nerror: "))
        return 2
    except BrokenPipeError:
        raise
    except _file_errors() as error:
        _complain(f"error: {_file_error_text(error)}")
        return 2
    except KeyboardInterrupt as stop:
        _complain("interrupted")
        return int(getattr(stop, "status", 130))


def _complain(text: str) -> None:
    """Print on stderr, if it is still there; text of models and servers cannot move the cursor."""
    with contextlib.suppress(OSError):
        print(visible(text), file=sys.stderr)


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
