"""`commvq compare`: tables, what can't be compared, and the files that show it."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from commvq_core.compare import compare_files, differences, flat_metrics, smaller_is_better
from commvq_core.comparison import markdown, method_of, table_cells, turned_cells
from commvq_core.errors import InputError
from tests.cli.helpers import refusal, succeed, succeed_json


def entry(codec: str, bits: float, metrics: dict[str, Any], **identity: Any) -> dict[str, Any]:
    return {
        "codec": codec,
        "bits_per_element": bits,
        "resident_bytes": 10,
        "cache_bytes": 1000,
        "metrics": metrics,
        "identity": {"codec": codec, **identity},
    }


def result(task: str = "longbench", **changes: Any) -> dict[str, Any]:
    settings = {"max_length": 100, "examples_sha256": "aa", "sources": [{"name": "x"}]}
    return {
        "model": "models/m",
        "task": task,
        "model_fingerprint": "ff",
        "settings": settings,
        "results": [
            entry("fp16", 16.0, {"score": 40.0, "trec": 50.0, "qasper": 30.0}),
            entry("a-2", 2.0, {"score": 35.0, "trec": 48.0, "qasper": 22.0}, window=128, sinks=4),
        ],
        **changes,
    }


def saved(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(value))
    return path


def test_one_table_a_task_with_a_column_a_subset(tmp_path: Path) -> None:
    second = result()
    second["results"][1] = entry("b-1", 1.0, {"score": 20.0, "trec": 10.0, "qasper": 30.0})
    kl = result("divergence", results=[entry("fp16", 16.0, {"kl_mean": 0.0, "tokens": 7})])
    files = [saved(tmp_path, f"{i}.json", r) for i, r in enumerate((result(), second, kl))]
    tables = compare_files(files)
    assert [table.task for table in tables] == ["longbench", "divergence"]
    assert tables[0].columns == ("score", "trec", "qasper")
    # fp16 is the same in both and appears once.
    assert [row.codec for row in tables[0].rows] == ["fp16", "a-2", "b-1"]
    assert [row.metrics["trec"] for row in tables[0].rows] == [50.0, 48.0, 10.0]
    assert not any(row.why for row in tables[0].rows)
    assert tables[0].baseline("qasper") == 30.0
    assert tables[1].columns == ("kl_mean",)


def changed(part: str, **values: Any) -> dict[str, Any]:
    other = result()
    other[part] = {**other[part], **values} if isinstance(other[part], dict) else values[part]
    return other


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (changed("settings", examples_sha256="bb"), "other examples"),
        (changed("settings", max_length=200), "max_length 200, not 100"),
        (changed("settings", chat=True), "chat true, not null"),
        (changed("model", model="n"), "other model (n)"),
        (changed("model_fingerprint", model_fingerprint="0"), "other model of the same name"),
    ],
)
def test_what_differs_is_said(other: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert differences(result(), other) == (reason,)
    files = [saved(tmp_path, "0.json", result()), saved(tmp_path, "1.json", other)]
    (table,) = compare_files(files)
    assert [row.why for row in table.rows] == [(), (), (reason,), (reason,)]
    _, cells, notes = table_cells(table)
    assert [row[0] for row in cells] == ["fp16", "a-2", "fp16 [1]", "a-2 [1]"]
    assert notes == [f"[1] not comparable: {reason}"]
    assert notes[0] in markdown([table])


def test_what_says_nothing_about_a_score_is_no_difference() -> None:
    assert differences(result(), changed("settings", sources=[], batch_size=8)) == ()


def test_other_windows_can_not_be_compared_but_transformers_own_can(tmp_path: Path) -> None:
    second = result()
    metrics = {"score": 1.0}
    second["results"][1:] = [
        entry("b-1", 1.0, metrics, window=64, sinks=4),
        entry("hf-hqq-2", 2.5, metrics, window=128, sinks=0),
    ]
    files = [saved(tmp_path, "0.json", result()), saved(tmp_path, "1.json", second)]
    (table,) = compare_files(files)
    why = {row.codec: row.why for row in table.rows}
    assert why["b-1"] == ("window 64, not 128",)
    assert why["hf-hqq-2"] == ()
    # It has no subsets.
    assert table.rows[-1].metrics == {"score": 1.0, "trec": None, "qasper": None}


def test_grids_and_nested_metrics_become_columns() -> None:
    grid = {"1024": {"0": 1.0, "50": 0.0}, "2048": {"0": 0.5, "50": None}}
    metrics = {"accuracy": 0.6, "kept": 0.9, "grid": grid, "lengths": {"0-4k": 3.0}}
    assert flat_metrics(metrics) == {
        "accuracy": 0.6,
        "tokens 1024": 0.5,
        "tokens 2048": 0.5,
        "lengths 0-4k": 3.0,
    }
    assert flat_metrics({"arc": {"acc": 0.3}}) == {"arc acc": 0.3}


def test_a_grid_of_subsets_gives_their_mean_at_each_length() -> None:
    grid = {"vt": {"1024": 1.0, "2048": 0.0}, "cwe": {"1024": 0.5, "2048": None}}
    assert flat_metrics({"accuracy": 0.5, "subsets": {"vt": 0.5, "cwe": 0.5}, "grid": grid}) == {
        "accuracy": 0.5,
        "subsets vt": 0.5,
        "subsets cwe": 0.5,
        "tokens 1024": 0.75,
        "tokens 2048": 0.0,
    }


def test_many_metrics_are_lines_and_caches_columns() -> None:
    names, cells = turned_cells(["cache", "bits", "a"], [["fp16", 16.0, 1.0], ["x", 1.0, 0.5]])
    assert names == ["cache", "fp16", "x"]
    assert cells == [["bits", 16.0, 1.0], ["a", 1.0, 0.5]]


def test_which_way_is_better() -> None:
    down = ("perplexity", "kl_mean", "kl_p99", "delta_percent", "wikitext word_perplexity")
    up = ("score", "accuracy", "top1_agreement", "exact_match", "arc acc")
    assert all(smaller_is_better(column) for column in down)
    assert not any(smaller_is_better(column) for column in up)


@pytest.mark.parametrize(
    ("codec", "method"),
    [
        ("kivi-2", "kivi"),
        ("hf-quanto-4", "hf-quanto"),
        ("commvq-1.5bit", "commvq"),
        ("commvq-1bit-keys", "commvq-keys"),
        ("commvq-1bit:runs/b-2", "commvq"),
        ("published-1.06bit", "published"),
        ("fp16", "fp16"),
    ],
)
def test_codecs_that_differ_in_bits_are_one_method(codec: str, method: str) -> None:
    assert method_of(codec) == method


def test_the_command_writes_all_its_files(tmp_path: Path) -> None:
    other = changed("settings", max_length="<b>200|</b>")
    files = [saved(tmp_path, "0.json", result()), saved(tmp_path, "1.json", other)]
    outputs = [tmp_path / f"c.{kind}" for kind in ("html", "png", "md")]
    options = ["--html", outputs[0], "--png", outputs[1], "--markdown", outputs[2]]
    shown = succeed_json("compare", *files, *options)
    assert [row["codec"] for row in shown["tables"][0]["rows"]] == ["fp16", "a-2"] * 2
    page = outputs[0].read_text()
    assert "&lt;b&gt;200" in page
    assert "<b>200" not in page
    # Everything is inside: no other file, no address.
    assert not re.search(r"(src|href)=\"?(?!\"?data:)", page.replace('src="data:', ""))
    picture = re.search(r'data:image/png;base64,([^"]+)', page)
    assert picture is not None
    for data in (base64.b64decode(picture.group(1)), outputs[1].read_bytes()):
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000
    assert "| a-2 | 2 | 1,000 | 10 | 35 | 48 | 22 |" in outputs[2].read_text()
    table = succeed("compare", *files)
    assert "not comparable" in table
    assert "--overwrite" in refusal("compare", *files, *options)


def test_files_that_are_no_evaluation_are_refused(tmp_path: Path) -> None:
    bad = saved(tmp_path, "bad.json", {"model": "m"})
    assert "is no evaluation" in refusal("compare", bad)
    no_fp16 = result()
    del no_fp16["results"][0]
    assert "no fp16 result" in refusal("compare", saved(tmp_path, "n.json", no_fp16))
    broken = result()
    del broken["results"][1]["bits_per_element"]
    with pytest.raises(InputError, match=r"results\[1\] has no bits_per_element"):
        compare_files([saved(tmp_path, "b.json", broken)])
    assert refusal("compare", tmp_path / "none.json")
