"""What an exception means on the command line: one line on stderr and an exit status."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from commvq_core.errors import InputError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
RESUMABLE = ("calibrate", "train-codebook", "eval", "lm-eval")
_LONGEST = 600  # characters of an unexpected error's text: some libraries put a page in there


class Interrupted(Exception):  # noqa: N818 - not an error but the user's wish
    """Ctrl-C. Typer would turn a bare KeyboardInterrupt into a silent exit."""


def explain(
    error: BaseException, *, command: str | None, known: tuple[str, ...]
) -> tuple[int, str]:
    """Exit status, and the line that follows ``error: ``, for what a command raised.

    `command` is the subcommand's name, if one was given; `known` are all of them.
    """
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return INTERRUPTED, _explain_interrupt(command)
    if isinstance(error, InputError):
        return BAD_INPUT, str(error)
    if _is_usage_error(error):
        return BAD_INPUT, _explain_usage(error, command, known)
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return FAILED, f"{what}: run again with --debug for the traceback"


def report(
    error: BaseException, *, command: str | None, known: tuple[str, ...], debug: bool
) -> int:
    """Print `error` to stderr, after its traceback with `debug`, and return the exit status."""
    status, line = explain(error, command=command, known=known)
    if debug and not _is_usage_error(error):
        traceback.print_exception(error, file=sys.stderr)
    print(f"error: {line}", file=sys.stderr, flush=True)
    return status


def _explain_interrupt(command: str | None) -> str:
    if command in RESUMABLE:
        return "interrupted: run the same command with --resume (not --overwrite) to continue"
    return "interrupted: run the command again"


def _is_usage_error(error: BaseException) -> bool:
    # By shape, not by class: Typer brings its own copy of click or uses the one that is installed.
    return callable(getattr(error, "format_message", None)) and hasattr(error, "exit_code")


def _explain_usage(error: Any, command: str | None, known: tuple[str, ...]) -> str:
    what = " ".join(str(error.format_message()).split()).rstrip(".")
    subject = f"commvq {command}" if command in known else "commvq"
    if what == "Missing command":
        # Raised by the group that lacks one, which knows what it has.
        choices = ", ".join(error.ctx.command.commands)
        return f"no command was given: choose one of {choices} (see {subject} --help)"
    return f"{what[:1].lower()}{what[1:]}: see {subject} --help"
