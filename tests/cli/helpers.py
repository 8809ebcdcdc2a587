"""Running the command line in this process and in another one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

SCRIPT = [sys.executable, "-m", "commvq_cli.main"]


def commvq(*arguments: object, stdin: str | None = None) -> Result:
    """Run a command in this process."""
    from commvq_cli.main import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def succeed(*arguments: object, stdin: str | None = None) -> str:
    """Run a command that must succeed; returns its stdout."""
    result = commvq(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def succeed_json(*arguments: object) -> dict[str, Any]:
    """Run a command with --json that must succeed; its stdout must be one line, one object."""
    stdout = succeed(*arguments, "--json")
    assert stdout.count("\n") == 1
    assert stdout.endswith("\n")
    value = json.loads(stdout)
    assert isinstance(value, dict)
    return value


def refusal(*arguments: object, stdin: str | None = None) -> str:
    """Run a command that must be refused as bad input; returns the one line of stderr.

    That is: status 2, nothing on stdout, no traceback, and exactly ``error: what: how to mend``.
    """
    result = commvq(*arguments, "--quiet", stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = only_line(result.stderr)
    what, _, mend = line.removeprefix("error: ").partition(": ")
    assert what
    assert mend
    return line


def only_line(stderr: str) -> str:
    """The line that `stderr` consists of; it must be an error."""
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("error: "), stderr
    return stderr.strip()


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, as a terminal does."""
    prepare = options.pop("preexec_fn", None)

    def begin() -> None:
        # A suite run in the background inherits an ignored SIGINT, and would pass it on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if prepare is not None:
            prepare()

    return subprocess.Popen(
        [*SCRIPT, *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=begin,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `condition()` holds; fails when the process ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with its contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
