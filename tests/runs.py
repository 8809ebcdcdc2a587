"""Calibrations and runs so small that fitting all of their eight units takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from commvq_core.calibration.store import CalibrationStore
from commvq_core.training import TrainConfig, train_codebooks
from tests.calibration import stores

TOKENS = 1200  # the additive codec asks for 1,024
UNITS = [
    f"layer_{layer:03d}.{side}.head_{head:02d}.safetensors"
    for layer in (0, 2)
    for side in ("key", "value")
    for head in (0, 1)
]


def calibration(folder: Path, tokens: int = TOKENS, **changes: Any) -> Path:
    """A finished CALIB of random numbers: layers 0 and 2 of three, 2 KV heads of 8 dims."""
    manifest = stores.manifest(tokens=tokens, seq_len=100, chunk_sequences=5, **changes)
    store = CalibrationStore.create(folder, manifest)
    stores.fill(store)
    stores.finish(store)
    return folder


def config(**changes: Any) -> TrainConfig:
    """One bit an element: one stage of 8 dims. One worker, which is this process."""
    return TrainConfig(**{"key_bits": 1.0, "value_bits": 1.0, "workers": 1, **changes})


def train(calib: Path, out: Path, **changes: Any) -> Path:
    """A finished RUN."""
    train_codebooks(calib, out, config(**changes))
    return out


def codebooks(run: Path) -> dict[str, bytes]:
    """What a run's bytes must be the same in: everything but the log."""
    files = stores.contents(run)
    return {name: files[name] for name in files if name != "log.jsonl"}
