"""The commands one after the other on a tiny model: every one's result, silence and files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import commvq, start, succeed, succeed_json, tree
from tests.evaluation.benchmarks import longbench


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_text_file: Path
) -> dict[str, Any]:
    """What each command printed with --json, and the folder that it all happened in."""
    folder = tmp_path_factory.mktemp("pipeline")
    text = ("--dataset", tiny_text_file)
    calibrate = ("calibrate", tiny_model_dir, *text, "--tokens", 2048, "--seq-len", 512)
    evaluate = ("eval", tiny_model_dir, "--codebook", folder / "artifact", *text)
    train = ("train-codebook", folder / "calib", "--bits", "0.5", "--workers", 1)
    perplexity = (*evaluate, "--task", "perplexity", "--max-length", 256, "--limit", 2)
    niah = (*evaluate, "--task", "niah", "--lengths", "300,600", "--depths", "0,100")
    data = longbench(folder / "data", "trec", "multi_news", rows=2)
    benchmark = ("eval", tiny_model_dir, "--codebook", folder / "artifact", "--data-dir", data)
    benchmark += ("--task", "longbench", "--subset", "trec", "--subset", "multi_news")
    generate = ("generate", tiny_model_dir, "--codebook", folder / "artifact")
    steps: dict[str, tuple[object, ...]] = {
        "calibrate": (*calibrate, "--out", folder / "calib"),
        "train": (*train, "--out", folder / "run"),
        "export": ("export", folder / "run", "--out", folder / "artifact"),
        "perplexity": (*perplexity, "--out", folder / "perplexity.json"),
        "niah": (*niah, "--out", folder / "niah.json"),
        "longbench": (*benchmark, "--max-length", 200, "--out", folder / "longbench.json"),
        "generate": (*generate, "--prompt", "the words", "--max-new-tokens", 5),
    }
    return {"folder": folder, **{name: succeed_json(*step) for name, step in steps.items()}}


def test_calibrate_says_what_it_stored(work: dict[str, Any]) -> None:
    shown = work["calibrate"]
    assert (shown["tokens"], shown["seq_len"], shown["layers"]) == (2048, 512, 2)
    assert shown["bytes"] == sum(
        len(content) for content in tree(work["folder"] / "calib").values()
    )


def test_train_and_export_say_what_it_costs(work: dict[str, Any]) -> None:
    assert work["train"]["bits_per_element"] == 0.5
    assert work["train"]["units"] == 2 * 2 * 2
    assert work["export"]["bits_per_element"] == 0.5
    assert work["export"]["resident_bytes"] > 0


@pytest.mark.parametrize("task", ["perplexity", "niah", "longbench"])
def test_eval_prints_what_it_writes(work: dict[str, Any], task: str) -> None:
    assert json.loads((work["folder"] / f"{task}.json").read_text()) == work[task]


@pytest.mark.parametrize("task", ["perplexity", "niah", "longbench"])
def test_eval_has_the_keys_that_scripts_rely_on(work: dict[str, Any], task: str) -> None:
    result = work[task]
    assert {"model", "task", "settings", "results", "versions"} <= set(result)
    assert result["task"] == task
    assert [entry["codec"] for entry in result["results"]] == ["fp16", "commvq-0.5bit"]
    for entry in result["results"]:
        wanted = {"codec", "bits_per_element", "resident_bytes", "metrics", "seconds"}
        assert wanted | {"cache_bytes", "fp16_cache_bytes"} <= set(entry)
    metrics = {
        "perplexity": {"perplexity", "delta_percent"},
        "niah": {"accuracy", "grid"},
        "longbench": {"score", "trec", "multi_news"},
    }
    assert metrics[task] <= set(result["results"][1]["metrics"])


def test_eval_counts_bits_and_bytes(work: dict[str, Any]) -> None:
    full, small = work["niah"]["results"]
    assert (full["bits_per_element"], full["resident_bytes"]) == (16.0, 0)
    assert small["bits_per_element"] == 0.5
    assert small["resident_bytes"] == work["export"]["resident_bytes"]
    assert full["cache_bytes"] == full["fp16_cache_bytes"] == small["fp16_cache_bytes"]
    assert 0 < small["cache_bytes"] < full["cache_bytes"]


def test_generate_says_what_it_wrote(work: dict[str, Any]) -> None:
    shown = work["generate"]
    assert shown["codec"] == "commvq-0.5bit"
    assert 1 <= shown["new_tokens"] <= 5
    assert shown["fp16_cache_bytes"] == shown["cache_tokens"] * 2 * 2 * 2 * 32 * 2


def test_generate_prints_just_the_text(work: dict[str, Any], tiny_model_dir: Path) -> None:
    shared = ("generate", tiny_model_dir, "--codebook", work["folder"] / "artifact")
    plain = succeed(*shared, "--prompt", "the words", "--max-new-tokens", 5)
    assert plain.rstrip("\n") == work["generate"]["text"].rstrip("\n")


def test_generate_reads_a_prompt_from_stdin_and_from_a_file(
    work: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    shared = ("generate", tiny_model_dir, "--max-new-tokens", 3)
    file = tmp_path / "prompt.txt"
    file.write_text("the words")
    expected = succeed(*shared, "--prompt", "the words")
    assert succeed(*shared, "--prompt-file", file) == expected
    assert succeed(*shared, "--prompt-file", "-", stdin="the words") == expected


@pytest.mark.parametrize("kind", ["calib", "run", "artifact"])
def test_inspect_knows_every_kind_of_folder(work: dict[str, Any], kind: str) -> None:
    path = work["folder"] / kind
    shown = succeed_json("inspect", path)
    assert shown["kind"] == {"calib": "calibration"}.get(kind, kind)
    assert "layers" in shown
    assert shown["kind"] in succeed("inspect", path)


def test_doctor_finds_this_installation_sound() -> None:
    shown = succeed_json("doctor")
    assert shown["ok"] is True
    assert {"torch", "transformers", "commvq"} <= set(shown["versions"])
    assert "native kernels" in succeed("doctor")


def test_without_json_a_table_is_shown(work: dict[str, Any]) -> None:
    out = ("--out", work["folder"] / "run", "--resume")
    shown = succeed("train-codebook", work["folder"] / "calib", "--bits", "0.5", *out)
    assert "bits_per_element" in shown


def test_a_benchmark_is_shown_subset_by_subset(work: dict[str, Any], tiny_model_dir: Path) -> None:
    folder = work["folder"]
    shown = succeed(
        *("eval", tiny_model_dir, "--codebook", folder / "artifact", "--task", "longbench"),
        *("--subset", "multi_news", "--subset", "trec", "--data-dir", folder / "data"),
        *("--max-length", 200, "--out", folder / "longbench.json", "--resume"),
    )
    assert re.search(r"subset +examples +fp16 +commvq-0.5bit", shown)
    assert re.search(r"multi_news +2 ", shown)


def test_resuming_what_is_complete_gives_the_same(
    work: dict[str, Any], tiny_model_dir: Path
) -> None:
    before = tree(work["folder"])
    again = succeed_json(
        *(
            "eval",
            tiny_model_dir,
            "--codebook",
            work["folder"] / "artifact",
            "--task",
            "perplexity",
        ),
        *("--dataset", work["perplexity"]["settings"]["sources"][0]["name"]),
        *("--max-length", 256, "--limit", 2, "--out", work["folder"] / "perplexity.json"),
        "--resume",
    )
    assert again == work["perplexity"]
    assert tree(work["folder"]) == before


def test_quiet_leaves_stderr_empty_and_json_leaves_stdout_pure(
    work: dict[str, Any], tiny_model_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """In a process of its own, where libraries write to the real streams."""
    process = start(
        *(
            "eval",
            tiny_model_dir,
            "--codebook",
            work["folder"] / "artifact",
            "--task",
            "perplexity",
        ),
        *("--dataset", tiny_text_file, "--max-length", 64, "--limit", 1),
        *("--out", tmp_path / "result.json", "--json", "--quiet"),
    )
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stderr == ""
    assert json.loads(stdout)["task"] == "perplexity"
    assert stdout.count("\n") == 1


def test_progress_goes_to_stderr_as_plain_lines(
    tiny_model_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    process = start(
        *("calibrate", tiny_model_dir, "--dataset", tiny_text_file, "--tokens", 512),
        *("--seq-len", 256, "--out", tmp_path / "calib", "--json"),
    )
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["tokens"] == 512
    assert "\r" not in stderr
    assert "\x1b" not in stderr
    assert any("512/512" in line for line in stderr.splitlines())


def test_overwrite_replaces_and_resume_continues(
    tiny_model_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "calib"
    shared = ("calibrate", tiny_model_dir, "--dataset", tiny_text_file, "--seq-len", 256)
    succeed(*shared, "--tokens", 512, "--out", out)
    first = tree(out)
    succeed(*shared, "--tokens", 512, "--out", out, "--resume")
    assert tree(out) == first
    assert commvq(*shared, "--tokens", 1024, "--out", out, "--resume").exit_code == 2
    assert tree(out) == first
    succeed(*shared, "--tokens", 1024, "--out", out, "--overwrite")
    assert tree(out) != first


def test_a_saved_cache_goes_on_where_it_stopped(
    work: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    saved, raw = tmp_path / "cache", ("--raw", "--window", 16)
    shared = ("generate", tiny_model_dir, "--codebook", work["folder"] / "artifact", *raw)
    text = "the words " * 30
    whole = succeed_json(*shared, "--prompt", text, "--max-new-tokens", 9)
    first = succeed_json(*shared, "--prompt", text, "--max-new-tokens", 4, "--save-cache", saved)
    # The codebooks are found by themselves; nothing of the prompt runs again.
    again = ("generate", tiny_model_dir, "--load-cache", saved, "--raw")
    second = succeed_json(*again, "--max-new-tokens", 5)
    assert first["text"] + second["text"] == whole["text"]
    assert second["cache_tokens"] == whole["cache_tokens"]
    assert second["codec"] == whole["codec"]
    turn = succeed_json(
        *again, "--prompt", " more", "--max-new-tokens", 2, "--save-cache", saved, "--overwrite"
    )
    assert turn["prompt_tokens"] > first["prompt_tokens"] + 4
    assert succeed_json(*again, "--max-new-tokens", 1)["prompt_tokens"] == turn["prompt_tokens"] + 2
