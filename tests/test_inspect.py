"""`inspect_path` tells a calibration, a run and an artifact apart, and says what each holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from commvq_core.calibration.store import CalibrationStore
from commvq_core.errors import InputError
from commvq_core.inspect import inspect_path
from commvq_core.plots import plot_layers
from commvq_core.run import Run
from tests import runs
from tests.artifact.artifacts import artifact
from tests.calibration import stores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds calib, run and artifact."""
    return artifact(tmp_path_factory.mktemp("made")).parent


def test_a_calibration_tells_its_model_its_tokens_and_its_layers(folder: Path) -> None:
    facts = inspect_path(folder / "calib")
    layers = facts.pop("layers")
    assert facts == {
        "kind": "calibration",
        "model": "someone/model",
        "complete": True,
        "tokens": runs.TOKENS,
        "sources": ["builtin"],
        "seed": 0,
        "fingerprint": "0" * 64,
    }
    assert [layer["compressible"] for layer in layers] == [True, False, True]
    assert layers[0] == {
        "layer": 0,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "rotary_dim": 8,
        "pairs": "half",
        "compressible": True,
    }


def test_a_calibration_that_is_not_finished_says_so(tmp_path: Path) -> None:
    store = CalibrationStore.create(tmp_path / "calib", stores.manifest())
    stores.fill(store, chunks=1)
    facts = inspect_path(tmp_path / "calib")
    assert facts["complete"] is False
    assert facts["tokens"] == 32


def test_a_run_tells_which_units_are_there_and_how_good_they_are(
    folder: Path, tmp_path: Path
) -> None:
    facts = inspect_path(folder / "run")
    assert facts["kind"] == "run"
    assert facts["bits"] == {"key": 1.0, "value": 1.0}
    assert (facts["units"], facts["missing"]) == (8, 0)
    assert (facts["tokens"], facts["seed"], facts["preset"]) == (runs.TOKENS, 0, "default")
    run = Run.open(folder / "run")
    own = [run.statistic(u) for u in run.units() if (u.layer, u.side) == (2, "value")]
    assert facts["layers"][1]["layer"] == 2
    assert facts["layers"][1]["value_distortion"] == pytest.approx(sum(own) / 2)
    assert facts["layers"][1]["value_distortion_heads"] == own
    assert facts["layers"][1]["value_bits"] == 1.0
    assert 0 <= facts["layers"][1]["key_dead"] < 0.1
    partial = runs.train(folder / "calib", tmp_path / "run", layers=(2,))
    (partial / runs.UNITS[4]).unlink()
    facts = inspect_path(partial)
    assert facts["missing"] == 5
    assert facts["layers"][0]["key_units"] == "0/2"
    assert facts["layers"][0]["key_distortion"] is None
    assert facts["layers"][1]["key_units"] == "1/2"


def test_an_artifact_tells_its_bits_its_memory_and_its_layers(folder: Path) -> None:
    facts = inspect_path(folder / "artifact")
    layers = facts.pop("layers")
    resident = facts.pop("resident_bytes")
    assert resident > 0
    assert facts == {
        "kind": "artifact",
        "name": "commvq-1bit",
        "model": "someone/model",
        "preset": "default",
        "bits_per_element": 1.0,
        "layers_with_their_own_cache": [1],
        "fingerprint": "0" * 64,
    }
    assert [layer["layer"] for layer in layers] == [0, 2]
    assert layers[0]["key_codec"] == "additive"
    assert layers[0]["value_bits"] == 1.0
    held = sum(layer[f"{side}_resident_bytes"] for layer in layers for side in ("key", "value"))
    assert held == resident
    assert 0 < layers[0]["key_distortion"] < 1


@pytest.mark.parametrize("kind", ["run", "artifact"])
def test_error_and_bits_are_drawn_over_the_layers(folder: Path, tmp_path: Path, kind: str) -> None:
    plot_layers(inspect_path(folder / kind), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["layers.png"]


def test_a_calibration_has_nothing_to_draw(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give a run or an artifact"):
        plot_layers(inspect_path(folder / "calib"), tmp_path / "layers.png")


def test_drawing_without_matplotlib_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'commvq\[plots\]'"):
        plot_layers(inspect_path(folder / "run"), tmp_path / "layers.png")


@pytest.mark.parametrize("kind", ["calib", "run", "artifact"])
def test_what_is_told_goes_through_json(folder: Path, kind: str) -> None:
    facts = inspect_path(folder / kind)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_anything_else_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    cases = {
        tmp_path: "holds no calibration, run or artifact: give a folder written by",
        tmp_path / "gone": "holds no calibration, run or artifact",
        tmp_path / "model" / "config.json": "holds no calibration, run or artifact",
        tmp_path / "model": "is not an artifact",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as refused:
            inspect_path(path)
        assert "\n" not in str(refused.value)
