"""Fixtures of the command line's tests: a second model, to be confused with the first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model with another RoPE base: the same shapes, other rotations."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500_000.0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def other_calibration(
    tmp_path_factory: pytest.TempPathFactory, other_model_dir: Path, tiny_text_file: Path
) -> Path:
    """A calibration of that other model."""
    from commvq_core.calibration.collect import CalibrationConfig, calibrate
    from commvq_core.models import load_model

    folder = tmp_path_factory.mktemp("other_calibration") / "calib"
    config = CalibrationConfig(tokens=2048, seq_len=512, datasets=(str(tiny_text_file),))
    calibrate(load_model(str(other_model_dir), device="cpu"), folder, config)
    return folder
