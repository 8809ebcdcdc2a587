"""`train_codebooks`: what it fits, from what, to what bytes, and what it refuses."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from commvq_core.calibration.store import CalibrationStore
from commvq_core.codecs.additive import AdditiveCodec
from commvq_core.codecs.base import FitData, SideSpec
from commvq_core.errors import InputError
from commvq_core.run import Run
from commvq_core.training import (
    TrainConfig,
    fit_unit,
    parse_bits,
    parse_layers,
    train_codebooks,
)
from tests import runs
from tests.calibration import stores


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.calibration(tmp_path_factory.mktemp("calib") / "calib")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, calib: Path) -> Path:
    """A run that nothing interrupted."""
    return runs.train(calib, tmp_path_factory.mktemp("run") / "run")


def test_every_unit_is_fitted_and_summed_up(tmp_path: Path, calib: Path) -> None:
    summary = train_codebooks(calib, tmp_path / "run", runs.config())
    run = Run.open(tmp_path / "run")
    assert run.missing_units() == []
    assert sorted(unit.filename for unit in run.units()) == runs.UNITS
    assert summary["run"] == str(tmp_path / "run")
    assert summary["units"] == 8
    assert summary["bits_per_element"] == 1.0
    assert summary["seconds"] > 0
    for side in ("key", "value"):
        own = [run.statistic(unit) for unit in run.units() if unit.side == side]
        assert summary["distortion"][side] == pytest.approx(sum(own) / len(own))
        assert 0 < summary["distortion"][side] < 1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["unit"]["layer"] for entry in log] == [0, 0, 0, 0, 2, 2, 2, 2]
    assert all(entry["seconds"] > 0 for entry in log)


def test_keys_and_values_can_have_bits_of_their_own(tmp_path: Path, calib: Path) -> None:
    config = runs.config(key_bits=1.0, value_bits=2.0)
    summary = train_codebooks(calib, tmp_path / "run", config)
    run = Run.open(tmp_path / "run")
    assert summary["bits_per_element"] == 1.5
    assert run.plan(0, "key")[1]["stages"] == 1
    assert run.plan(0, "value")[1]["stages"] == 2
    assert summary["distortion"]["value"] < summary["distortion"]["key"]


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    tmp_path: Path, calib: Path, straight: Path
) -> None:
    torch.manual_seed(99)  # the global generator has no say
    again = runs.codebooks(runs.train(calib, tmp_path / "again"))
    other = runs.codebooks(runs.train(calib, tmp_path / "other", seed=1))
    assert again == runs.codebooks(straight)
    assert all(other[unit] != again[unit] for unit in runs.UNITS)


def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, calib: Path, straight: Path
) -> None:
    assert runs.codebooks(runs.train(calib, tmp_path / "run", workers=2)) == runs.codebooks(
        straight
    )


def test_layers_can_be_fitted_apart_and_the_rest_later(
    tmp_path: Path, calib: Path, straight: Path
) -> None:
    out = tmp_path / "run"
    first = train_codebooks(calib, out, runs.config(layers=(2,)))
    assert first["units"] == 4
    assert {u.layer for u in Run.open(out).missing_units()} == {0}
    kept = {unit: (out / unit).stat().st_mtime_ns for unit in runs.UNITS if "_002." in unit}
    train_codebooks(calib, out, runs.config(), resume=True)
    assert runs.codebooks(out) == runs.codebooks(straight)
    assert {unit: (out / unit).stat().st_mtime_ns for unit in kept} == kept


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_fit_sees_canonical_vectors_its_own_metric_and_no_held_out_token(
    calib: Path, straight: Path, side: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[SideSpec, FitData]] = []
    fit = AdditiveCodec.fit

    def record(spec: SideSpec, config: Any, data: FitData) -> Any:
        seen.append((spec, data))
        return fit(spec, config, data)

    monkeypatch.setattr(AdditiveCodec, "fit", staticmethod(record))
    run = Run.open(straight)
    monkeypatch.setattr(Run, "write_unit", lambda *_: None)
    store = CalibrationStore.open(calib)
    for unit in run.units():
        if unit.side == side and unit.layer == 2:
            fit_unit(calib, straight, unit)
    assert len({data.seed for _, data in seen}) == len(seen) == 2
    for head, (spec, data) in enumerate(seen):
        raw = store.load(2, side)[:, head].float()
        # The store holds Llama's order: pair j is dims (j, j + 4) of 8.
        order = [0, 4, 1, 5, 2, 6, 3, 7] if side == "key" else list(range(8))
        taught = [token for token in range(runs.TOKENS) if token % 16 != 15]
        assert torch.equal(data.vectors[:, 0], raw[taught][:, order])
        assert spec.rotary_dim == (8 if side == "key" else 0)
        weights = data.metric[0].diagonal()
        want = store.query_energy(2)[head] if side == "key" else store.value_gram(2)[head, 0, 0]
        assert weights[0].item() == pytest.approx(want.flatten()[0].item(), rel=2e-3)


def test_distortion_is_the_weighted_error_on_held_out_tokens(calib: Path, straight: Path) -> None:
    run, store = Run.open(straight), CalibrationStore.open(calib)
    layer = store.spec.compressible[1]
    codec, mean = run.codec(layer, "value")
    rows = store.load(layer.index, "value").double()[15::16].transpose(0, 1)
    left = rows - codec.decode(codec.encode(rows[None].float()))[0].double()
    shares = []
    for head in range(2):
        metric = store.value_gram(layer.index)[head].double().numpy()
        error, centred = left[head].numpy(), (rows[head] - rows[head].mean(0)).numpy()
        shares.append(
            np.einsum("nd,de,ne->", error, metric, error)
            / np.einsum("nd,de,ne->", centred, metric, centred)
        )
    assert mean == pytest.approx(np.mean(shares), rel=1e-3)


def test_output_that_exists_is_refused_unless_told_to_overwrite_it(
    tmp_path: Path, calib: Path, straight: Path
) -> None:
    out = runs.train(calib, tmp_path / "run", seed=5)
    before = stores.contents(out)
    with pytest.raises(InputError, match=r"run exists already: .*--overwrite"):
        train_codebooks(calib, out, runs.config())
    with pytest.raises(InputError, match="contradict each other"):
        train_codebooks(calib, out, runs.config(), overwrite=True, resume=True)
    assert stores.contents(out) == before
    train_codebooks(calib, out, runs.config(), overwrite=True)
    assert runs.codebooks(out) == runs.codebooks(straight)


def test_overwriting_never_removes_what_is_no_run(tmp_path: Path, calib: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for out in (precious, precious / "thesis.txt", calib):
        with pytest.raises(InputError, match="is no run and will not be removed"):
            train_codebooks(calib, out, runs.config(), overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert CalibrationStore.open(calib).token_count == runs.TOKENS


def test_too_few_tokens_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    short = runs.calibration(tmp_path / "calib", tokens=1000)
    with pytest.raises(InputError, match=r"holds 1,000 tokens, .* need 1,024: .*--tokens"):
        train_codebooks(short, tmp_path / "run", runs.config())
    assert not (tmp_path / "run").exists()


def test_an_unfinished_calibration_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = CalibrationStore.create(tmp_path / "calib", stores.manifest())
    stores.fill(store, chunks=1)
    with pytest.raises(InputError, match=r"is not finished \(1 of 2 chunks\)"):
        train_codebooks(tmp_path / "calib", tmp_path / "run", runs.config())
    with pytest.raises(InputError, match="is no calibration"):
        train_codebooks(tmp_path, tmp_path / "run", runs.config())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bits", [0.5, 1.25])
def test_bits_that_the_heads_cannot_take_are_refused_before_anything_is_written(
    tmp_path: Path, calib: Path, bits: float
) -> None:
    with pytest.raises(InputError, match=f"{bits:g} bits can't be reached with heads of 8 dims"):
        train_codebooks(calib, tmp_path / "run", runs.config(value_bits=bits))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layers", [(1,), (0, 7), (3,)])
def test_layers_that_the_model_lacks_or_does_not_compress_are_refused(
    tmp_path: Path, calib: Path, layers: tuple[int, ...]
) -> None:
    wrong = max(layers)
    with pytest.raises(InputError, match=f"layer {wrong} is not among .*: choose from 0, 2"):
        train_codebooks(calib, tmp_path / "run", runs.config(layers=layers))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "best"}, "preset 'best' is not known: give default"),
        ({"engine": "slurm"}, "engine 'slurm' is not known: give local or ray"),
        ({"workers": -1}, "--workers -1: give 0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("1", (1, 1)), ("1.5", (1.5, 1.5)), ("1,1.25", (1, 1.25)), (" 0.75 , 4 ", (0.75, 4))],
)
def test_bits_are_one_number_or_keys_and_values(text: str, bits: tuple[float, float]) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "99",
        "x",
        "",
        ",",
        "1,",
        "1,2,3",
        "nan",
        "inf",
        "-1",
        "1,nan",
        "-inf,1",
        "0.2",
        "4.25",
    ],
)
def test_bits_out_of_range_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"is not a number of bits: give one number") as refused:
        parse_bits(text)
    assert f"--bits {text}".strip() in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (None, None),
        ("0", (0,)),
        ("0-3", (0, 1, 2, 3)),
        ("0,2,5-7", (0, 2, 5, 6, 7)),
        ("5-7, 0,6", (0, 5, 6, 7)),
        ("4-4", (4,)),
    ],
)
def test_layers_are_numbers_and_ranges(text: str | None, layers: tuple[int, ...] | None) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "x", "1,,2", "-1", "1-", "0-x", "1.5", "nan", "0x1", "1-2-3"])
def test_layers_that_are_no_list_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a list of layers: write it like 0-3,7"):
        parse_layers(text)


def test_layers_that_run_backwards_or_without_end_are_refused() -> None:
    with pytest.raises(InputError, match="--layers 0-99999999999: no model has so many"):
        parse_layers("0-99999999999")
    with pytest.raises(InputError, match="--layers 5-2 runs backwards"):
        parse_layers("0,5-2")


def test_a_full_disk_is_one_clear_line_and_the_units_before_it_are_whole(
    tmp_path: Path, calib: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = safetensors.torch.save_file, []

    def full(tensors: Any, path: Any, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, *rest)

    out = tmp_path / "run"
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device") as refused:
        train_codebooks(calib, out, runs.config())
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    found, want = stores.contents(out), stores.contents(straight)
    assert set(found) == {"run.json", "log.jsonl", *runs.UNITS[:2]}
    assert all(found[unit] == want[unit] for unit in runs.UNITS[:2])
    train_codebooks(calib, out, runs.config(), resume=True)
    assert runs.codebooks(out) == runs.codebooks(straight)


def test_a_log_that_cannot_be_written_is_one_clear_line(tmp_path: Path, straight: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    run = Run(tmp_path, {}, Run.open(straight).spec)
    with pytest.raises(InputError, match=r"cannot write .*log.jsonl"):
        run.log({"unit": 1})
