"""The tiny model, loaded once, and its caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from commvq_core.evaluation.codecs import EvalCodec, load_artifacts, resolve_codecs
from commvq_core.evaluation.options import EvalOptions
from commvq_core.models import LoadedModel, load_model


@pytest.fixture(scope="session")
def loaded(tiny_model_dir: Path) -> LoadedModel:
    return load_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="session")
def codecs(loaded: LoadedModel, tiny_artifact: Path) -> list[EvalCodec]:
    """fp16, and half-bit codes behind a short window."""
    artifacts = load_artifacts([tiny_artifact])
    return resolve_codecs(loaded, artifacts=artifacts, window=32, sinks=2)


@pytest.fixture
def short(tiny_text_file: Path) -> EvalOptions:
    """Two windows of 128 tokens."""
    return EvalOptions(datasets=(str(tiny_text_file),), max_length=128, limit=2)
