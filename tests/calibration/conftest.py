"""A loaded tiny model, and settings that make several chunks of little text."""

from __future__ import annotations

from pathlib import Path

import pytest

from commvq_core.calibration import collect
from commvq_core.calibration.collect import CalibrationConfig
from commvq_core.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> LoadedModel:
    return load_model(str(tiny_model_dir), device="cpu")


@pytest.fixture
def config(tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch) -> CalibrationConfig:
    """9 sequences of 32 tokens and one of 12, in 5 chunks of two."""
    monkeypatch.setattr(collect, "_CHUNK_TOKENS", 64)
    return CalibrationConfig(tokens=300, seq_len=32, datasets=(str(tiny_text_file),))
