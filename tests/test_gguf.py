"""GGUF files: loaded as what they hold when whole, refused in one line when not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from commvq_core import models
from commvq_core.errors import InputError
from commvq_core.gguf_file import check_gguf
from commvq_core.models import load_model
from tests.gguf_files import save_gguf, save_header


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return save_gguf(tiny_model_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_loads_as_the_model_it_was_made_of(
    tiny_gguf: Path, tiny_model_dir: Path
) -> None:
    from_file = load_model(str(tiny_gguf), device="cpu")
    from_folder = load_model(str(tiny_model_dir), device="cpu")
    assert from_file.spec == from_folder.spec
    assert from_file.source == str(tiny_gguf)
    assert from_file.model.dtype == torch.float32
    text = "the rain in spain.\n"
    ids = from_folder.tokenizer(text).input_ids
    assert from_file.tokenizer(text).input_ids == ids
    with torch.no_grad():
        logits = [m.model(torch.tensor([ids])).logits for m in (from_file, from_folder)]
    torch.testing.assert_close(*logits)


def test_the_dtype_asked_for_is_the_dtype_given(tiny_gguf: Path) -> None:
    assert load_model(str(tiny_gguf), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def refusal(path: Path) -> str:
    """The one line with which load_model refuses a path, before transformers sees it."""
    with pytest.raises(InputError) as refused:
        load_model(str(path), device="cpu")
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "part", [0, 3, 4, 23, 24, 30, 200, 0.1, 0.3, 0.5, 0.9, -32, -1], ids=lambda part: f"to {part}"
)
def test_a_file_cut_short_anywhere_is_refused(
    tmp_path: Path, tiny_gguf: Path, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_from_pretrained", None)  # must not be reached
    content = tiny_gguf.read_bytes()
    keep = int(part * len(content)) if isinstance(part, float) else part
    (tmp_path / "cut.gguf").write_bytes(content[:keep])
    line = refusal(tmp_path / "cut.gguf")
    assert "cut.gguf is" in line
    assert "cut short" in line
    assert line.endswith(": download the file again")


def test_every_cut_of_a_header_is_noticed(tmp_path: Path) -> None:
    whole = save_header(tmp_path / "whole.gguf")
    check_gguf(whole)
    content, cut = whole.read_bytes(), tmp_path / "cut.gguf"
    for keep in range(0, len(content), 3):
        cut.write_bytes(content[:keep])
        with pytest.raises(InputError, match="cut short"):
            check_gguf(cut)


@pytest.mark.parametrize("keep", [1000, 3_000_000, 50_000_000, 98_362_431])
def test_the_real_file_cut_short_is_refused(tmp_path: Path, smollm2_path: Path, keep: int) -> None:
    with smollm2_path.open("rb") as file, (tmp_path / "cut.gguf").open("wb") as cut:
        cut.write(file.read(min(keep, 3_000_000)))  # all of the header
        cut.truncate(keep)  # the tensors' bytes are never read, so a hole will do
    assert "cut short" in refusal(tmp_path / "cut.gguf")
    check_gguf(smollm2_path)


def test_text_behind_the_tensors_is_no_reason_to_refuse(tmp_path: Path, tiny_gguf: Path) -> None:
    (tmp_path / "long.gguf").write_bytes(tiny_gguf.read_bytes() + b"trailer")
    check_gguf(tmp_path / "long.gguf")


def test_big_endian_files_are_read_too(tmp_path: Path) -> None:
    whole = save_header(tmp_path / "big.gguf", big_endian=1)
    check_gguf(whole)
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"cut short: it has \d+ of \d+ bytes"):
        check_gguf(whole)


def test_the_alignment_that_a_file_states_is_kept(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(4096)
    writer.add_tensor("weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    # The data starts at 4,096 and is 128 bytes long, whatever padding follows.
    path.write_bytes(content[: 4096 + 128])
    check_gguf(path)
    path.write_bytes(content[: 4096 + 127])
    with pytest.raises(InputError, match="it has 4,223 of 4,224 bytes"):
        check_gguf(path)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path, tiny_gguf: Path) -> None:
    (tmp_path / "text.gguf").write_text("This is not a model, however long it may be.")
    assert "text.gguf is not a .gguf file" in refusal(tmp_path / "text.gguf")
    (tmp_path / "model.bin").write_bytes(tiny_gguf.read_bytes())
    assert "is not a model: give a hub id, a folder or a .gguf" in refusal(tmp_path / "model.bin")
    assert "gone.gguf does not exist" in refusal(tmp_path / "gone.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert "has no config.json" in refusal(tmp_path / "folder.gguf")


def test_versions_and_parts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = save_header(tmp_path / "old.gguf")
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + path.read_bytes()[8:])
    assert "has .gguf version 1: convert the model again" in refusal(path)
    part = save_header(tmp_path / "part.gguf", split_count=3)
    assert "is one of 3 parts of a model: merge them" in refusal(part)
    whole = save_header(tmp_path / "whole.gguf", split_count=1)
    check_gguf(whole)


def test_a_tensor_type_from_the_future_is_refused_by_name(tmp_path: Path) -> None:
    path = save_header(tmp_path / "new.gguf")
    content = path.read_bytes()
    at = content.index(b"weight") + len(b"weight") + 4 + 2 * 8  # name, number of dims, two dims
    path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    assert "tensor weight has type 999, which the package gguf doesn't know" in refusal(path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(32))
    assert "empty.gguf holds no tensors" in refusal(path)


def test_an_architecture_that_transformers_cannot_read_is_refused(
    tmp_path: Path, tiny_gguf: Path
) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(tiny_gguf.read_bytes().replace(b"llama", b"lamas"))
    assert "odd.gguf can't be loaded as a causal language model" in refusal(path)


def test_a_missing_reader_is_named(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert "needs the package gguf: pip install 'commvq[gguf]'" in refusal(tiny_gguf)
