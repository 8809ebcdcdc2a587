"""Progress: plain lines with rate and time left, bars on terminals, and a clean stdout."""

from __future__ import annotations

import io
import json
import sys

import pytest
from commvq_cli.bars import Bars
from commvq_cli.console import session
from commvq_cli.lines import Lines, duration, rate
from commvq_cli.tables import facts, rows, size
from rich.console import Console


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_few_seconds_with_rate_and_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock).task("fitting", total=100, unit="codebooks", done=40) as task:
        for _ in range(60):
            clock.now += 0.5
            task.advance()
    assert stream.getvalue().splitlines() == [
        "fitting: 50/100 codebooks, 2.0 codebooks/s, 25 s left",
        "fitting: 60/100 codebooks, 2.0 codebooks/s, 20 s left",
        "fitting: 70/100 codebooks, 2.0 codebooks/s, 15 s left",
        "fitting: 80/100 codebooks, 2.0 codebooks/s, 10 s left",
        "fitting: 90/100 codebooks, 2.0 codebooks/s, 5 s left",
        "fitting: 100/100 codebooks in 30 s",
    ]


def test_a_task_that_fails_does_not_claim_to_be_done() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Lines(stream, Clock()).task("work", total=2):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_rates_and_durations_in_words() -> None:
    assert rate(1234.5, "tokens") == "1,234 tokens/s"
    assert rate(3.14, "windows") == "3.1 windows/s"
    assert rate(0.25, "windows") == "4.0 s each"
    assert rate(None, "windows") == ""
    assert [duration(seconds) for seconds in (9.4, 125, 3723)] == ["9 s", "2:05", "1:02:03"]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_bars_show_count_and_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Bars(stream) as bars:
        bars.message("loading [a] model")
        with bars.task("calibrating", total=4, unit="windows", done=1) as task:
            task.advance(3)
    shown = stream.getvalue()
    assert "loading [a] model" in shown
    assert "calibrating" in shown
    assert "4/4 windows" in shown


def test_stray_output_of_libraries_never_reaches_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with session(as_json=True, quiet=False, debug=False) as ui:
        print("a library says hello")
        ui.result({"a": 1}, lambda: "unused")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == "a library says hello\n"


def test_quiet_silences_everything_but_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with session(as_json=False, quiet=True, debug=False) as ui:
        print("noise")
        print("noise", file=sys.stderr)
        ui.progress.message("noise")
        with ui.progress.task("noise", total=1) as task:
            task.advance()
        ui.result({"a": 1}, lambda: facts("title", {"a": 1}))
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "noise" not in captured.out
    assert "title" in captured.out


def test_nothing_is_printed_when_a_command_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with session(as_json=True, quiet=True, debug=False) as ui:
            ui.result({"a": 1}, None)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().out == ""


def shown(table: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(table)
    return stream.getvalue()


def test_tables_show_every_kind_of_value() -> None:
    text = shown(
        facts("t", {"a": 12345, "b": 0.12345, "c": None, "d": True, "e": [1, 2], "f": {"k": 2.5}})
    )
    for word in ("12,345", "0.1235", "-", "yes", "1, 2", "k 2.5"):
        assert word in text
    assert "[red]" in shown(rows("t", ["name"], [["[red]"]]))


def test_sizes_in_words() -> None:
    assert [size(n) for n in (532, 1_400_000, 3e9)] == ["532 B", "1.4 MB", "3.0 GB"]
