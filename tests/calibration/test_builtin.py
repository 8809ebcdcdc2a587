"""The text that every CPython carries."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from commvq_core.calibration import builtin
from commvq_core.calibration.builtin import builtin_documents, split_of
from commvq_core.errors import InputError


def use_library(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Make `root` the standard library, all of it training text, and leave out the topics."""
    monkeypatch.setattr(builtin, "_topics", list)
    monkeypatch.setattr(builtin, "split_of", lambda name: "train")
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(root))


@pytest.fixture(scope="module")
def both_sides() -> tuple[list[str], list[str]]:
    return list(builtin_documents("train")), list(builtin_documents("heldout"))


def test_training_and_held_out_text_never_meet(both_sides: tuple[list[str], list[str]]) -> None:
    train, heldout = (set(side) for side in both_sides)
    assert train
    assert heldout
    assert train.isdisjoint(heldout)


def test_about_fifteen_percent_of_the_text_is_held_out(
    both_sides: tuple[list[str], list[str]],
) -> None:
    train, heldout = (sum(len(text) for text in side) for side in both_sides)
    assert 0.08 < heldout / (train + heldout) < 0.25
    assert train > 4 * 65_536, "the default --tokens would not be served"


def test_a_package_stays_on_one_side() -> None:
    root = Path(builtin.sysconfig.get_path("stdlib"))
    entries = [entry for entry in builtin._modules(root) if entry.name.startswith("asyncio.")]
    assert len(entries) > 5
    assert {entry.family for entry in entries} == {"asyncio"}


def test_the_split_of_a_name_never_changes() -> None:
    # Fixed by a hash: a figure measured on held-out text today must mean the same next year.
    assert [split_of(name) for name in ("asyncio", "json", "topic integers")] == [
        "heldout",
        "train",
        "train",
    ]


def test_every_run_gives_the_same_documents_in_the_same_order() -> None:
    program = (
        "import hashlib; from itertools import islice\n"
        "from commvq_core.calibration.builtin import builtin_documents\n"
        "text = chr(0).join(islice(builtin_documents('train'), 40))\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_documents_are_prose_of_some_length() -> None:
    for text in islice(builtin_documents("train"), 30):
        assert len(text) >= 200
        assert {" ", "\n"} <= set(text)


def test_a_file_that_only_looks_like_a_module_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "template.py").write_text("this is ${not} python")
    (tmp_path / "module.py").write_text(f'"""{"A module of words. " * 20}"""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "inner.py").write_text(f'"""{"A test of words. " * 20}"""\n')
    use_library(monkeypatch, tmp_path)
    texts = list(builtin_documents())
    assert len(texts) == 1
    assert texts[0].startswith("module\n\nA module of words.")


def test_a_python_without_documentation_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_library(monkeypatch, tmp_path)
    with pytest.raises(InputError, match="no documentation text: name a --dataset"):
        next(builtin_documents())


def test_functions_and_classes_stand_under_their_full_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shapes.py").write_text(
        'class Circle:\n    """A round thing."""\n'
        f'    def area(self, unit="m"):\n        """{"Its area. " * 30}"""\n'
    )
    use_library(monkeypatch, tmp_path)
    (text,) = builtin_documents()
    assert "class shapes.Circle\n\nA round thing.\n" in text
    assert "shapes.Circle.area(self, unit='m')\n\nIts area." in text
