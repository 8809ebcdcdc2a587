"""What a command shows: progress on stderr, one result on stdout, and nothing else on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from commvq_core.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import RenderableType

_TABLE_WIDTH = 120  # columns where the output goes to a file or a pipe
# Libraries draw bars of their own, which would fight with ours and fill log files.
_NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
_NO_NEWS = {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}


class Session:
    """What a command body talks to: `progress`, and the one result it hands over at the end."""

    def __init__(self, *, as_json: bool, progress: Progress, stdout: TextIO) -> None:
        self.as_json = as_json
        self.progress = progress
        self.stdout = stdout
        self._finish: Callable[[], None] = lambda: None

    def result(self, value: Mapping[str, Any], view: Callable[[], RenderableType] | None) -> None:
        """Set the result: `value` is printed with --json, else what `view()` returns, if given."""
        self._finish = lambda: self._show(value, view)

    def write(self, text: str) -> None:
        """Write a piece of the result to stdout at once: a text that grows."""
        self.stdout.write(text)
        self.stdout.flush()

    def finish(self) -> None:
        """Print the result, if the command body set one."""
        self._finish()

    def _show(self, value: Mapping[str, Any], view: Callable[[], RenderableType] | None) -> None:
        if self.as_json:
            self.stdout.write(json.dumps(value, allow_nan=False) + "\n")
        elif view is not None:
            table_console(self.stdout).print(view())
        self.stdout.flush()


def table_console(stream: TextIO) -> Any:
    """A rich console that does not squeeze tables when its output is piped."""
    from rich.console import Console

    width = None if stream.isatty() or os.environ.get("COLUMNS") else _TABLE_WIDTH
    return Console(file=stream, width=width, highlight=False)


@contextlib.contextmanager
def session(*, as_json: bool, quiet: bool, debug: bool) -> Iterator[Session]:
    """Run a command body: whatever it prints by accident goes to stderr (nowhere with `quiet`)."""
    stdout, stderr = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(_settings(stderr, quiet=quiet, debug=debug)))
        if not debug:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        if quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            progress: Progress = Silent()
        else:
            stack.enter_context(contextlib.redirect_stdout(stderr))
            progress = stack.enter_context(_progress_on(stderr))
        body = Session(as_json=as_json, progress=progress, stdout=stdout)
        yield body
    # After the bars are gone, so that they don't draw over the result.
    body.finish()


@contextlib.contextmanager
def _progress_on(stream: TextIO) -> Iterator[Progress]:
    if stream.isatty():
        from commvq_cli.bars import Bars

        with Bars(stream) as bars:
            yield bars
    else:
        from commvq_cli.lines import Lines

        yield Lines(stream)


def _settings(stderr: TextIO, *, quiet: bool, debug: bool) -> dict[str, str]:
    settings = {} if debug else dict(_NO_NEWS)
    if quiet or not stderr.isatty():
        settings |= _NO_BARS
    return {name: value for name, value in settings.items() if name not in os.environ}


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)
