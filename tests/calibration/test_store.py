"""The CALIB folder: what is written comes back, and nothing damaged is read."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from commvq_core.calibration import store as store_module
from commvq_core.calibration import vectors
from commvq_core.calibration.store import CalibrationStore, LayerChunk, narrow
from commvq_core.errors import InputError
from tests.calibration.stores import contents, fill, finish, layer_chunk, manifest


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    store = CalibrationStore.create(tmp_path / "calib", manifest(tokens=80))
    fill(store)
    finish(store)
    return tmp_path / "calib"


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    store = CalibrationStore.create(tmp_path / "calib", manifest(tokens=80))
    written = fill(store)
    finish(store)
    again = CalibrationStore.open(tmp_path / "calib")
    assert again.manifest == store.manifest
    assert again.spec == store.spec
    assert again.token_count == 80
    assert [layer.index for layer in again.layers] == [0, 2]
    for index in (0, 2):
        keys = torch.cat([chunk[index].keys for chunk in written])
        values = torch.cat([chunk[index].values for chunk in written])
        assert again.load(index, "key").dtype == torch.float16
        assert torch.equal(again.load(index, "key"), keys.half())
        assert torch.equal(again.load(index, "value"), values.half())
        assert torch.equal(again.query_energy(index), torch.ones(2, 4))
        assert torch.equal(again.value_gram(index)[1], index * torch.eye(8))
        total, count = again.query_sums(index)
        sums = sum(chunk[index].query_energy_sum for chunk in written)
        assert torch.equal(total, torch.as_tensor(sums))
        assert count == 160


def test_a_model_in_bf16_is_stored_as_bf16(tmp_path: Path) -> None:
    store = CalibrationStore.create(tmp_path, manifest(dtype="bfloat16"))
    written = fill(store)
    keys = torch.cat([chunk[0].keys for chunk in written])
    assert torch.equal(store.load(0, "key"), keys.bfloat16())


def test_a_chunk_that_overflows_fp16_is_stored_as_bf16(tmp_path: Path) -> None:
    store = CalibrationStore.create(tmp_path, manifest(tokens=64))
    first, second = layer_chunk(32, 0), layer_chunk(32, 1)
    large = LayerChunk(second.keys * 1e5, second.values, second.query_energy_sum, 64)
    store.write_chunk(0, {0: first, 2: first})
    store.write_chunk(1, {0: large, 2: first})
    keys = store.load(0, "key")
    assert keys.dtype == torch.float32
    assert torch.equal(keys[:32], first.keys.half().float())
    assert torch.equal(keys[32:], large.keys.bfloat16().float())
    assert store.load(0, "value").dtype == torch.float16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_keys_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    store = CalibrationStore.create(tmp_path, manifest())
    chunk = layer_chunk(32, 0)
    chunk.values[3, 1, 2] = bad
    with pytest.raises(
        InputError, match=r"the values of layer 2 are not finite: .*--dtype float32"
    ):
        store.write_chunk(0, {0: layer_chunk(32, 0), 2: chunk})
    assert store.manifest.chunks_done == 0


def test_narrowing_keeps_the_largest_half() -> None:
    largest = torch.tensor([65504.0, -65504.0])
    assert narrow(largest, torch.float16, "keys").dtype == torch.float16
    assert narrow(largest * 1.01, torch.float16, "keys").dtype == torch.bfloat16


def test_an_unfinished_store_says_how_to_finish_it(tmp_path: Path) -> None:
    store = CalibrationStore.create(tmp_path, manifest(tokens=80))
    fill(store, chunks=1)
    with pytest.raises(InputError, match=r"is not finished \(1 of 3 chunks\): .*--resume"):
        CalibrationStore.open(tmp_path)
    again = CalibrationStore.open(tmp_path, require_complete=False)
    assert again.token_count == 32
    assert again.load(0, "key").shape == (32, 2, 8)


def test_all_chunks_without_statistics_are_not_a_finished_store(tmp_path: Path) -> None:
    fill(CalibrationStore.create(tmp_path, manifest()))
    with pytest.raises(InputError, match=r"is not finished \(2 of 2 chunks\)"):
        CalibrationStore.open(tmp_path)


def test_a_folder_without_a_manifest_is_no_calibration(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is no calibration: give a folder that `calibrate` wrote"):
        CalibrationStore.open(tmp_path)
    with pytest.raises(InputError, match="gone does not exist"):
        CalibrationStore.open(tmp_path / "gone")


@pytest.mark.parametrize("name", ["chunk_00001.safetensors", "statistics.safetensors"])
def test_a_missing_shard_is_named(finished: Path, name: str) -> None:
    (finished / "layer_002" / name).unlink()
    with pytest.raises(InputError, match=rf"layer_002/{name} is missing"):
        CalibrationStore.open(finished)


@pytest.mark.parametrize("name", ["chunk_00001.safetensors", "statistics.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, -1])
def test_a_shard_that_is_cut_short_is_named(finished: Path, name: str, kept: float) -> None:
    path = finished / "layer_000" / name
    whole = path.read_bytes()
    length = int(kept * len(whole)) if isinstance(kept, float) else kept
    path.write_bytes(whole[:length])
    with pytest.raises(InputError, match=rf"layer_000/{name} is damaged"):
        CalibrationStore.open(finished)


def test_a_shard_of_the_wrong_shape_or_dtype_is_named(finished: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = finished / "layer_000" / "chunk_00000.safetensors"
    good = load_file(path)
    save_file({**good, "keys": good["keys"][:7].contiguous()}, path)
    with pytest.raises(InputError, match=r"chunk_00000.safetensors holds .*\(7, 2, 8\)"):
        CalibrationStore.open(finished)
    save_file({**good, "keys": good["keys"].double()}, path)
    with pytest.raises(InputError, match="holds F64, F16, neither fp16 nor bf16"):
        CalibrationStore.open(finished)


def test_nothing_is_created_where_something_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        CalibrationStore.create(tmp_path, manifest())
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_only_calibrations_are_ever_removed(tmp_path: Path, finished: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no calibration and will not be removed"):
        CalibrationStore.clear(precious)
    with pytest.raises(InputError, match="is no calibration and will not be removed"):
        CalibrationStore.clear(precious / "thesis.txt")
    assert contents(precious) == {"thesis.txt": b"years of work"}
    CalibrationStore.clear(finished)
    assert not finished.exists()
    CalibrationStore.clear(finished)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    store = CalibrationStore.create(tmp_path, manifest())
    fill(store, chunks=1)
    whole = contents(tmp_path)
    (tmp_path / ".manifest.json.abc.tmp").write_bytes(b"{")
    (tmp_path / "layer_000" / ".chunk_00001.safetensors.abc.tmp").write_bytes(b"half")
    store.remove_temporary_files()
    assert contents(tmp_path) == whole


def test_a_folder_with_nothing_but_a_torn_first_file_counts_as_blank(tmp_path: Path) -> None:
    assert CalibrationStore.is_blank(tmp_path)
    assert CalibrationStore.is_blank(tmp_path / "gone")
    (tmp_path / ".manifest.json.abc.tmp").write_bytes(b"{")
    assert CalibrationStore.is_blank(tmp_path)
    (tmp_path / ".profile").write_text("mine")
    assert not CalibrationStore.is_blank(tmp_path)
    assert not CalibrationStore.is_blank(tmp_path / ".profile")


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_leaves_what_was_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    import safetensors.torch

    store = CalibrationStore.create(tmp_path, manifest())
    fill(store, chunks=1)
    before = contents(tmp_path)
    save, calls = safetensors.torch.save_file, []

    def full(tensors: Any, path: Any, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == fails_at:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match=r"No space left on device.*free some space"):
        fill(store)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.endswith(".tmp")]
    monkeypatch.undo()
    again = CalibrationStore.open(tmp_path, require_complete=False)
    fill(again)
    finish(again)
    straight = CalibrationStore.create(tmp_path / "straight", manifest())
    fill(straight)
    finish(straight)
    resumed = {k: v for k, v in contents(tmp_path).items() if not k.startswith("straight")}
    assert resumed == contents(tmp_path / "straight")


def test_a_disk_that_is_full_at_the_manifest_does_not_count_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CalibrationStore.create(tmp_path, manifest())

    def full(path: Path, value: Any) -> None:
        raise InputError(f"cannot write {path} (No space left on device)", "free some space")

    monkeypatch.setattr(store_module, "write_json", full)
    with pytest.raises(InputError, match=r"cannot write .*manifest\.json"):
        fill(store, chunks=1)
    assert store.manifest.chunks_done == 0
    assert CalibrationStore.open(tmp_path, require_complete=False).manifest.chunks_done == 0


@pytest.mark.parametrize("most", [1, 7, 13, 31, 32, 100])
def test_a_share_of_the_tokens_is_evenly_spread(most: int, tmp_path: Path) -> None:
    """What a fit reads, whatever the size of the calibration."""
    store = CalibrationStore.create(tmp_path, manifest())
    keys = torch.cat([chunk[0].keys for chunk in fill(store)]).half()
    step = -(-len(keys) // most)
    few = store.load(0, "key", slice(1, 2), most)
    assert len(few) <= most
    assert torch.equal(few, keys[::step, 1:2])


def test_a_fit_reads_so_many_tokens_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CalibrationStore.create(tmp_path, manifest())
    fill(store)
    monkeypatch.setattr(vectors, "MOST_TOKENS", 10)
    layer = store.layers[0]
    assert len(vectors.canonical_vectors(store, layer, "key")) == len(range(0, 64, 7))
