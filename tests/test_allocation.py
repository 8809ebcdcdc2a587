"""`--bits auto`: within the budget, repeatable, resumable, refused where it can't be measured."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commvq_core.allocation import allocate_bits
from commvq_core.artifact import export_run, load_artifact
from commvq_core.calibration.store import CalibrationStore
from commvq_core.codecs.additive import AdditiveCodec
from commvq_core.errors import InputError
from commvq_core.models import LoadedModel, load_model
from commvq_core.run import Run
from commvq_core.sides import SIDES, side_spec
from commvq_core.training import TrainConfig, parse_auto, train_codebooks


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> LoadedModel:
    return load_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def store(tiny_calibration: Path) -> CalibrationStore:
    return CalibrationStore.open(tiny_calibration)


def mean_bits(store: CalibrationStore, plans: dict[Any, dict[str, Any]]) -> float:
    """Bits an element, by what the codecs themselves say."""
    layers = {layer.index: layer for layer in store.layers}
    bits = [AdditiveCodec.bits(side_spec(layers[i], side), p) for (i, side), p in plans.items()]
    return sum(bits) / len(bits)  # all sides of the tiny model are of one size


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.4])
def test_the_budget_is_kept_and_nearly_used(
    store: CalibrationStore, loaded: LoadedModel, bits: float
) -> None:
    plans = allocate_bits(store, loaded, bits)
    assert set(plans) == {(x.index, side) for x in store.layers for side in SIDES}
    width = next(iter(plans.values()))["sub_dim"]
    step = 8 / width / len(plans)
    assert bits - step < mean_bits(store, plans) <= bits


def test_it_is_the_same_every_time(store: CalibrationStore, loaded: LoadedModel) -> None:
    assert allocate_bits(store, loaded, 1.0) == allocate_bits(store, loaded, 1.0)


def test_another_model_is_refused(store: CalibrationStore, tmp_path: Path) -> None:
    other: Any = type("Loaded", (), {"spec": type("S", (), {"fingerprint": "x"}), "source": "it"})
    with pytest.raises(InputError, match="it is not the model that was calibrated"):
        allocate_bits(store, other, 1.0)


def test_a_run_is_trained_resumed_and_exported(
    tiny_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(auto_bits=0.75, workers=1)
    summary = train_codebooks(tiny_calibration, tmp_path / "run", config)
    assert summary["bits_per_element"] <= 0.75
    run = Run.open(tmp_path / "run")
    assert run.config["bits"] == {"auto": 0.75}
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for unit in run.units()[3:]:
        (tmp_path / "again" / unit.filename).unlink()
    # A resumed run asks the model nothing: it may be out of reach by then.
    monkeypatch.setattr("commvq_core.allocation.allocate_bits", None)
    train_codebooks(tiny_calibration, tmp_path / "again", config, resume=True)
    for unit in run.units():
        one, other = (tmp_path / name / unit.filename for name in ("run", "again"))
        assert one.read_bytes() == other.read_bytes()
    export_run(tmp_path / "run", tmp_path / "artifact")
    artifact = load_artifact(tmp_path / "artifact")
    assert artifact.bits_per_element == pytest.approx(summary["bits_per_element"])


def test_a_model_that_is_gone_is_named(tiny_calibration: Path, tmp_path: Path) -> None:
    calib = tmp_path / "calib"
    shutil.copytree(tiny_calibration, calib)
    manifest = calib / "manifest.json"
    model = CalibrationStore.open(calib).manifest.model
    manifest.write_text(manifest.read_text().replace(model, "/nowhere/model"))
    with pytest.raises(InputError, match="/nowhere/model"):
        train_codebooks(calib, tmp_path / "run", TrainConfig(auto_bits=1.0, workers=1))
    assert not (tmp_path / "run").exists()


def test_sequences_too_short_to_measure_on_are_refused(
    store: CalibrationStore, loaded: LoadedModel
) -> None:
    short = CalibrationStore(store.path, replace(store.manifest, seq_len=100))
    with pytest.raises(InputError, match="--seq-len of at least 128"):
        allocate_bits(short, loaded, 1.0)


@pytest.mark.parametrize(("text", "bits"), [("auto:1", 1.0), ("auto:1.25", 1.25), ("1", None)])
def test_the_option_is_read(text: str, bits: float | None) -> None:
    assert parse_auto(text) == bits


@pytest.mark.parametrize("text", ["auto:", "auto:x", "auto", "auto:9", "auto:nan", "auto:0"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"such as auto:1\.0"):
        parse_auto(text)


def test_only_the_default_preset_is_shared_out() -> None:
    with pytest.raises(InputError, match="not of published"):
        TrainConfig(auto_bits=1.0, preset="published")
