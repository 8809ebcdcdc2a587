"""RUN folders: what they know of themselves, and damage to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commvq_core.errors import InputError
from commvq_core.files import read_tensors, write_tensors
from commvq_core.run import Run, Unit
from tests import runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return runs.train(runs.calibration(folder / "calib"), folder / "run")


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """A finished run that a test may damage."""
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((run / "run.json").read_text())
    change(config)
    (run / "run.json").write_text(json.dumps(config))


def test_units_are_every_head_of_every_compressible_layer(run: Path) -> None:
    opened = Run.open(run)
    assert opened.units()[0] == Unit(0, "key", 0)
    assert [unit.filename for unit in opened.units()] == runs.UNITS
    (run / runs.UNITS[3]).unlink()
    assert opened.missing_units() == [Unit(0, "value", 1)]


def test_statistics_that_vary_from_run_to_run_stay_out_of_the_units(run: Path) -> None:
    opened, unit = Run.open(run), Unit(0, "key", 0)
    tensors = read_tensors(run / unit.filename, "the run")
    before = (run / unit.filename).read_bytes()
    kept, dead = opened.statistic(unit), opened.statistic(unit, "dead")
    opened.write_unit(unit, tensors, {"distortion": kept, "dead": dead, "seconds": 1234.5})
    assert (run / unit.filename).read_bytes() == before
    assert opened.statistic(unit) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="commvq-artifact"), "is not a run: give a folder made by"),
        (
            lambda c: c.update(version=2),
            "has format version 2, this release reads up to 1",
        ),
        (lambda c: c.update(version="1"), "has format version 1, this"),
        (lambda c: c.pop("version"), "has format version None"),
        (lambda c: c.pop("model"), r"run.json is damaged \(KeyError\('model'\)\): train again"),
        (lambda c: c.pop("attention"), "damaged .*attention"),
        (lambda c: c.update(attention=[]), "damaged"),
        (lambda c: c["attention"]["layers"][0].update(kv_heads="2"), "damaged .*kv_heads is '2'"),
        (lambda c: c["attention"]["layers"][0].update(pair_layout="?"), "damaged .*pair_layout"),
        (lambda c: c["attention"].update(extra=1), "damaged .*extra"),
        (lambda c: c["plans"].pop("2"), "damaged .*'2'"),
        (lambda c: c.update(plans=None), "damaged"),
        (lambda c: c["plans"]["0"]["key"].update(codec="magic"), "damaged .*'magic'"),
        (lambda c: c["plans"]["0"]["key"].update(codec="identity"), "identity is not fitted"),
        (lambda c: c["plans"]["0"]["value"]["config"].update(stages=0), "impossible geometry"),
        (lambda c: c["plans"]["0"]["value"].update(config={}), "damaged .*sub_dim"),
    ],
)
def test_a_damaged_plan_is_refused_by_name(run: Path, change: Any, message: str) -> None:
    edit(run, change)
    with pytest.raises(InputError, match=message) as refused:
        Run.open(run)
    assert "\n" not in str(refused.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run.json does not exist: give the folder of a run"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json is not readable JSON"):
        Run.open(tmp_path)
    assert Run.exists(tmp_path)
    assert not Run.exists(tmp_path / "gone")


def test_a_run_is_never_begun_on_top_of_something_else(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no run and will not be removed"):
        Run.create(tmp_path, {}, Run.open(finished).spec)
    assert (tmp_path / "thesis.txt").exists()


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = read_tensors(path, "the run")
    change(tensors)
    write_tensors(path, tensors, {"statistics": '{"distortion": 0.5}'})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("inverse"), "inverse is missing"),
        (lambda t: t.update(codebooks=t["codebooks"][:, :, :, :9]), "codebooks has shape"),
        (lambda t: t.update(inverse=-t["inverse"]), "factor that is not positive"),
    ],
)
def test_a_damaged_unit_is_refused_by_layer_and_side(run: Path, change: Any, message: str) -> None:
    opened = Run.open(run)
    _rewrite(run / Unit(2, "key", 0).filename, change)
    with pytest.raises(InputError, match=rf"layer 2, keys: .*({message}).*--resume"):
        opened.codec(opened.spec.compressible[1], "key")
    opened.codec(opened.spec.compressible[0], "key")


def test_a_unit_that_is_cut_short_or_lacks_its_distortion_is_refused(run: Path) -> None:
    opened, unit = Run.open(run), Unit(2, "key", 0)
    write_tensors(run / unit.filename, read_tensors(run / unit.filename, "the run"))
    with pytest.raises(InputError, match=r"head_00.safetensors is not a readable unit"):
        opened.statistic(unit)
    (run / unit.filename).write_bytes((run / unit.filename).read_bytes()[:100])
    with pytest.raises(InputError, match=r"delete it and run commvq train-codebook --resume"):
        opened.statistic(unit)
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        opened.codec(opened.spec.compressible[1], "key")
