"""Small artifacts, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from commvq_core.artifact import export_run
from commvq_core.files import read_tensors, write_tensors
from tests import runs

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def artifact(folder: Path) -> Path:
    """An ARTIFACT made from a CALIB and a RUN beside it."""
    run = runs.train(runs.calibration(folder / "calib"), folder / "run")
    export_run(run, folder / "artifact")
    return folder / "artifact"


def edit_config(folder: Path, change: Callable[[Config], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "codebooks.safetensors"
    tensors = read_tensors(path, "an artifact")
    change(tensors)
    write_tensors(path, tensors)
