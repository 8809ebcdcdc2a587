"""The journal: a line an example, and what a kill or a full disk leaves of the last one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.journal import Journal, partial_path

KEY = {"task": "niah"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A result whose evaluation stopped after two examples of one codec and one of the next."""
    out = tmp_path / "result.json"
    journal = Journal(out, KEY, resume=False)
    journal.add(0, [{"n": 1}])
    journal.add(0, [{"n": 2}])
    journal.add(1, [{"n": 3}])
    return out


def test_records_come_back_by_codec(out: Path) -> None:
    journal = Journal(out, KEY, resume=True)
    assert journal.records(0) == [{"n": 1}, {"n": 2}]
    assert journal.records(1) == [{"n": 3}]
    assert journal.records(2) == []


def test_an_example_is_a_line_as_soon_as_it_is_done(out: Path) -> None:
    lines = partial_path(out).read_text().splitlines()
    assert [json.loads(line) for line in lines[1:3]] == [
        {"codec": 0, "records": [{"n": 1}]},
        {"codec": 0, "records": [{"n": 2}]},
    ]


def test_half_a_line_is_dropped_and_its_example_done_again(out: Path) -> None:
    whole = partial_path(out).read_bytes()
    for end in range(whole.rstrip(b"\n").rfind(b"\n") + 1, len(whole)):
        partial_path(out).write_bytes(whole[:end])
        journal = Journal(out, KEY, resume=True)
        assert journal.records(1) == []
        journal.add(1, [{"n": 3}])
        assert partial_path(out).read_bytes() == whole


def test_a_journal_of_other_settings_or_a_damaged_one_is_refused(out: Path) -> None:
    with pytest.raises(InputError, match="other settings"):
        Journal(out, {"task": "kv"}, resume=True)
    path = partial_path(out)
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ("", "\n", *("".join([*lines[:at], "{}\n", *lines[at:]]) for at in (0, 2))):
        path.write_text(damaged)
        with pytest.raises(InputError, match="is damaged"):
            Journal(out, KEY, resume=True)


def test_starting_again_forgets_what_was_there(out: Path) -> None:
    journal = Journal(out, KEY, resume=False)
    journal.add(0, [{"n": 9}, {"n": 10}])
    assert Journal(out, KEY, resume=True).records(0) == [{"n": 9}, {"n": 10}]
    journal.remove()
    assert not partial_path(out).exists()
