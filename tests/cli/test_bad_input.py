"""Bad input of every kind: one line, status 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.helpers import refusal, tree


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("model", ["no/such/model", "./nothing", "nothing.gguf", "/nowhere/at/all"])
def test_an_unknown_model_path(model: str, out: Path) -> None:
    assert model in refusal("calibrate", model, "--out", out)
    assert not out.exists()


def test_a_gguf_file_that_is_cut_short(tmp_path: Path, out: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\x01" * 50)
    assert "cut.gguf" in refusal("calibrate", cut, "--out", out)
    assert not out.exists()


TEXTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("text.txt", b"", "text.txt is empty"),
    "blank": ("text.txt", b" \n\n", "text.txt is empty"),
    "binary": ("text.txt", b"\x7fELF\x00\x00\xff\xfe", "text.txt"),
    "no json": ("text.jsonl", b'{"text": "fine"}\nnot json\n', "text.jsonl:2"),
    "no column": ("text.jsonl", b'{"text": "fine"}\n{"body": "words"}\n', "text.jsonl:2"),
    "unknown kind": ("text.pdf", b"%PDF", "text.pdf"),
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("command", ["calibrate", "eval"])
def test_text_that_cannot_be_read(
    command: str, case: str, tmp_path: Path, tiny_model_dir: Path, out: Path
) -> None:
    name, content, named = TEXTS[case]
    path = tmp_path / name
    path.write_bytes(content)
    more = ["--task", "perplexity"] if command == "eval" else []
    line = refusal(command, tiny_model_dir, "--dataset", path, "--out", out, *more)
    assert named in line
    assert not out.exists()


def test_text_that_is_missing(tmp_path: Path, tiny_model_dir: Path, out: Path) -> None:
    missing = tmp_path / "missing.txt"
    assert "missing.txt" in refusal("calibrate", tiny_model_dir, "--dataset", missing, "--out", out)
    assert not out.exists()


def test_too_little_text(tmp_path: Path, tiny_model_dir: Path, out: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words only")
    assert "tokens" in refusal("calibrate", tiny_model_dir, "--dataset", path, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("bits", ["0", "99", "x", "-1", "1,2,3", "nan", ""])
def test_bits_that_make_no_sense(bits: str, tiny_calibration: Path, out: Path) -> None:
    refusal("train-codebook", tiny_calibration, "--out", out, "--bits", bits)
    assert not out.exists()


@pytest.mark.parametrize("layers", ["x", "3-1", "0-99", ","])
def test_layers_that_are_not_there(layers: str, tiny_calibration: Path, out: Path) -> None:
    refusal("train-codebook", tiny_calibration, "--out", out, "--layers", layers)
    assert not out.exists()


@pytest.mark.parametrize("option", ["--preset", "--engine"])
def test_presets_and_engines_that_do_not_exist(
    option: str, tiny_calibration: Path, out: Path
) -> None:
    line = refusal("train-codebook", tiny_calibration, "--out", out, option, "nonsense")
    assert "nonsense" in line
    assert not out.exists()


def test_too_few_tokens_for_the_codebooks(
    tmp_path: Path, tiny_model_dir: Path, tiny_text_file: Path, out: Path
) -> None:
    from commvq_core.calibration.collect import CalibrationConfig, calibrate
    from commvq_core.models import load_model

    calib = tmp_path / "calib"
    config = CalibrationConfig(tokens=64, seq_len=64, datasets=(str(tiny_text_file),))
    calibrate(load_model(str(tiny_model_dir), device="cpu"), calib, config)
    assert "64 tokens" in refusal("train-codebook", calib, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("command", ["train-codebook", "export"])
def test_a_folder_that_is_something_else(command: str, tiny_model_dir: Path, out: Path) -> None:
    refusal(command, tiny_model_dir, "--out", out)
    assert not out.exists()


def test_inspecting_something_else(tiny_model_dir: Path, tmp_path: Path) -> None:
    refusal("inspect", tiny_model_dir)
    refusal("inspect", tmp_path / "missing")


def test_existing_output_is_not_overwritten(
    tiny_model_dir: Path, tiny_calibration: Path, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "folder"
    out.mkdir()
    (out / "precious").write_text("keep me")
    before = tree(tmp_path)
    for arguments in (
        ("calibrate", tiny_model_dir),
        ("train-codebook", tiny_calibration),
        ("export", tiny_run),
    ):
        assert "--overwrite" in refusal(*arguments, "--out", out)
    file = out / "precious"
    line = refusal("eval", tiny_model_dir, "--task", "perplexity", "--out", file)
    assert "--overwrite" in line
    assert "is a folder" in refusal("eval", tiny_model_dir, "--task", "perplexity", "--out", out)
    assert tree(tmp_path) == before


def test_resuming_a_run_with_the_calibration_of_another_model(
    tmp_path: Path, tiny_run: Path, other_calibration: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = tree(run)
    refusal("train-codebook", other_calibration, "--out", run, "--bits", "0.5", "--resume")
    assert tree(run) == before


def test_codebooks_of_another_model(
    tmp_path: Path, tiny_artifact: Path, other_model_dir: Path
) -> None:
    out = tmp_path / "result.json"
    shared = (other_model_dir, "--codebook", tiny_artifact)
    line = refusal("eval", *shared, "--task", "perplexity", "--max-length", 64, "--out", out)
    assert "another model" in line
    assert "another model" in refusal("generate", *shared, "--prompt", "words")
    assert not out.exists()


def missing(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def misshapen(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].flatten()[:-1].clone()


def of_integers(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int32)


def with_nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[0] = float("nan")


@pytest.mark.parametrize("damage", [missing, misshapen, of_integers, with_nan])
def test_an_artifact_that_is_damaged(
    damage: Callable[[dict[str, torch.Tensor], str], None],
    tmp_path: Path,
    tiny_artifact: Path,
    tiny_model_dir: Path,
) -> None:
    broken = tmp_path / "artifact"
    shutil.copytree(tiny_artifact, broken)
    tensors = load_file(broken / "codebooks.safetensors")
    name = next(name for name in tensors if tensors[name].is_floating_point())
    damage(tensors, name)
    save_file(tensors, broken / "codebooks.safetensors")
    out = tmp_path / "result.json"
    shared = (tiny_model_dir, "--codebook", broken)
    line = refusal("eval", *shared, "--task", "perplexity", "--out", out)
    assert "layer 0, key" in line
    assert refusal("generate", *shared, "--prompt", "words") == line
    assert not out.exists()


def test_an_artifact_whose_file_is_cut(
    tmp_path: Path, tiny_artifact: Path, tiny_model_dir: Path
) -> None:
    broken = tmp_path / "artifact"
    shutil.copytree(tiny_artifact, broken)
    tensors = broken / "codebooks.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    refusal("generate", tiny_model_dir, "--codebook", broken, "--prompt", "words")
    config = broken / "config.json"
    config.write_text(config.read_text()[:100])
    refusal("generate", tiny_model_dir, "--codebook", broken, "--prompt", "words")
    config.write_text(json.dumps({"format": "something else"}))
    refusal("generate", tiny_model_dir, "--codebook", broken, "--prompt", "words")


@pytest.mark.parametrize(
    "options",
    [
        ["--task", "nonsense"],
        ["--task", "perplexity", "--codec", "nonsense"],
        ["--task", "perplexity", "--lengths", "64"],
        ["--task", "perplexity", "--max-length", "1"],
        ["--task", "perplexity", "--max-length", "999999"],
        ["--task", "perplexity", "--limit", "999999"],
        ["--task", "niah", "--lengths", "x"],
        ["--task", "niah", "--lengths", "10.5"],
        ["--task", "niah", "--depths", "101"],
        ["--task", "niah", "--lengths", "64", "--max-length", "64"],
        ["--task", "niah", "--lengths", "8"],
        ["--task", "niah", "--max-length", "4096"],
        ["--task", "perplexity", "--device", "nonsense"],
        ["--task", "perplexity", "--dtype", "nonsense"],
    ],
)
def test_evaluations_that_make_no_sense(
    options: list[str], tiny_model_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    refusal("eval", tiny_model_dir, "--dataset", tiny_text_file, "--out", out, *options)
    assert list(tmp_path.iterdir()) == []


def _any_safetensors(folder: Path) -> Path:
    path = folder / "any.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    return path


def test_prompts_that_make_no_sense(tiny_model_dir: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "no prompt" in refusal("generate", tiny_model_dir)
    assert "two prompts" in refusal(
        "generate", tiny_model_dir, "--prompt", "a", "--prompt-file", binary
    )
    assert "missing" in refusal("generate", tiny_model_dir, "--prompt-file", tmp_path / "missing")
    assert "UTF-8" in refusal("generate", tiny_model_dir, "--prompt-file", binary)
    assert "empty" in refusal("generate", tiny_model_dir, "--prompt", " ")
    assert "empty" in refusal("generate", tiny_model_dir, "--prompt-file", "-", stdin="")
    assert "at most" in refusal("generate", tiny_model_dir, "--prompt", "word " * 5000)
    one = ("generate", tiny_model_dir, "--prompt", "word")
    assert "fp16" in refusal(*one, "--save-cache", tmp_path / "cache")
    assert "no saved cache" in refusal(*one, "--load-cache", _any_safetensors(tmp_path))
    assert "does not exist" in refusal(*one, "--load-cache", tmp_path / "missing")
    assert "exists already" in refusal(
        *one, "--codebook", tmp_path, "--save-cache", _any_safetensors(tmp_path)
    )


def test_benchmarks_that_cannot_be_read_are_refused_before_the_model_is_loaded(
    tmp_path: Path, out: Path
) -> None:
    def refused(*more: object) -> str:
        return refusal("eval", "no/such/model", "--out", out, *more)

    folder = ("--data-dir", tmp_path)
    longbench = ("--task", "longbench", *folder)
    line = refused(*longbench, "--subset", "trec")
    assert "has no data/trec.jsonl or trec.jsonl" in line
    assert "has no subset trek" in refused(*longbench, "--subset", "trek")
    assert "gone is no folder" in refused("--task", "longbench", "--data-dir", tmp_path / "gone")
    assert "has no passkey.jsonl" in refused("--task", "infinitebench", *folder)
    assert "perplexity has no use for --data-dir" in refused("--task", "perplexity", *folder)
    assert not out.exists()


def test_a_wrong_row_of_a_benchmark_is_named(
    tmp_path: Path, tiny_model_dir: Path, out: Path
) -> None:
    row = {"input": "", "context": "words", "answers": ["a"], "length": 1, "all_classes": None}
    path = tmp_path / "lcc.jsonl"
    path.write_text(json.dumps(row | {"_id": "1"}) + "\n" + json.dumps(row) + "\n")
    options = ("--task", "longbench", "--subset", "lcc", "--data-dir", tmp_path)
    line = refusal("eval", tiny_model_dir, "--out", out, *options)
    assert "lcc.jsonl:2: field '_id' is missing" in line
    assert not out.exists()
