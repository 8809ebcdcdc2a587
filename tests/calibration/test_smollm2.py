"""Calibration of a real model on real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commvq_core.calibration.collect import CalibrationConfig, calibrate
from commvq_core.calibration.data import iter_documents, tokenize_sequences
from commvq_core.calibration.store import CalibrationStore
from commvq_core.models import attention_modules, load_model
from tests.calibration.models import Projections


@pytest.mark.slow
def test_the_builtin_text_calibrates_smollm2(tmp_path: Path, smollm2_path: Path) -> None:
    loaded = load_model(str(smollm2_path), device="cpu")
    calibrate(loaded, tmp_path / "calib", CalibrationConfig(tokens=512, seq_len=512))
    store = CalibrationStore.open(tmp_path / "calib")
    assert (store.token_count, len(store.layers)) == (512, 30)
    sequence = tokenize_sequences(
        loaded.tokenizer, iter_documents(["builtin"]), tokens=512, seq_len=512
    )[0]
    spec = loaded.spec.layers[20]
    module = dict(attention_modules(loaded.model))[20]
    projections = Projections(module, spec.heads, spec.kv_heads, spec.head_dim)
    with torch.inference_mode():
        loaded.model(input_ids=sequence[None])
    for side, expected in (("key", projections.key), ("value", projections.value)):
        got = store.load(20, side).float()  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
