"""The key-value task: many facts of one form, one of which is asked for."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.codecs import EvalCodec
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.runner import evaluate
from commvq_core.evaluation.tasks.grid import GridExample
from commvq_core.evaluation.tasks.kv import KeyValue
from commvq_core.models import LoadedModel

FACT = re.compile(r"The number of the (\w+ \w+) is (\d+)\.\n")


def text_of(loaded: LoadedModel, example: GridExample) -> str:
    return loaded.tokenizer.decode(example.prompt.context + example.prompt.question)


def test_facts_fill_the_length_and_one_is_asked_for_at_its_depth(loaded: LoadedModel) -> None:
    task = KeyValue(EvalOptions(lengths=(600, 1100), depths=(0, 50, 100), limit=2))
    examples = task.prepare(loaded)
    assert len(examples) == 12
    for example in examples:
        used = len(example.prompt.context) + len(example.prompt.question)
        assert example.length - 64 < used <= example.length
        facts = FACT.findall(text_of(loaded, example))
        keys = [key for key, _ in facts]
        assert len(set(keys)) == len(keys) > 8
        asked = re.search(r"What is the number of the (\w+ \w+)\?", text_of(loaded, example))
        assert asked is not None
        place = keys.index(asked.group(1))
        assert facts[place][1] == example.number
        assert place == pytest.approx((len(keys) - 1) * example.depth / 100, abs=0.5)
        assert text_of(loaded, example).endswith(f"The number of the {asked.group(1)} is")


def test_the_seed_decides_the_facts(loaded: LoadedModel) -> None:
    def hashed(seed: int) -> str:
        task = KeyValue(EvalOptions(lengths=(400,), depths=(50,), seed=seed))
        task.prepare(loaded)
        return str(task.settings()["examples_sha256"])

    assert hashed(1) == hashed(1) != hashed(2)


def test_a_length_beyond_all_facts_holds_them_all(loaded: LoadedModel, tmp_path: Path) -> None:
    task = KeyValue(EvalOptions(lengths=(500,), depths=(0,), limit=1))
    source = random.Random(0)
    example = task.example(loaded, 10**6, 100.0, source)
    assert len(FACT.findall(text_of(loaded, example))) == 900


def test_a_length_without_room_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(InputError, match="no room for two facts"):
        KeyValue(EvalOptions(lengths=(60,))).prepare(loaded)


def test_it_runs_with_codes_and_reports_the_grid(
    loaded: LoadedModel, codecs: list[EvalCodec]
) -> None:
    task = KeyValue(EvalOptions(lengths=(400,), depths=(0, 100), limit=1))
    result = evaluate(loaded, codecs, task)
    assert result["settings"]["fact"].startswith("The number of the")
    for entry in result["results"]:
        assert set(entry["metrics"]["grid"]) == {"400"}
        assert len(entry["examples"]) == 2
        assert entry["context"] <= 400
