"""Any sequence of changes to a cache does what it does to the float64 reference (hypothesis)."""

from __future__ import annotations

from functools import cache as remember
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from commvq_core.cache.cache import CommVQCache
from commvq_core.codecs.digest import LayerCodecs
from tests.cache.families import build
from tests.cache.lossy_codecs import preset_codecs
from tests.cache.reference_cache import reference
from tests.cache.test_saved import _Loaded
from tests.cache.ways import crop_to, prompt

OPTIONS = {"window": 6, "sinks": 2}
STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 12)),
    st.tuples(st.just("append"), st.just(1)),
    st.tuples(st.just("crop"), st.integers(1, 9)),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("save"), st.none()),
)


@remember
def _setting() -> tuple[PreTrainedModel, LayerCodecs]:
    model = build("glm4")
    return model, preset_codecs(model, "default")


def _run(
    model: PreTrainedModel, cache: Any, steps: list[tuple[str, Any]], seed: int, reload: Any
) -> list[torch.Tensor]:
    """Apply the steps; logits after each append. Rows stay at most 4, tokens positive."""
    rows, logits = 2, []
    for number, (kind, value) in enumerate([("append", 9), *steps, ("append", 2)]):
        length = cache.get_seq_length()
        if kind == "append":
            ids = prompt(rows, value, 100 * seed + number)
            with torch.no_grad():
                logits.append(model(input_ids=ids, past_key_values=cache).logits)
        elif kind == "crop":
            crop_to(cache, max(1, length - value))
        elif kind == "rows":
            chosen = torch.tensor([row % rows for row in value])
            cache.batch_select_indices(chosen)
            rows = len(chosen)
        elif kind == "repeat" and rows * value <= 4:
            cache.batch_repeat_interleave(value)
            rows *= value
        elif kind == "save":
            cache = reload(cache)
    return logits


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(STEP, max_size=7), seed=st.integers(0, 5))
def test_any_sequence_of_changes_is_the_references(steps: list[tuple[str, Any]], seed: int) -> None:
    model, codecs = _setting()

    def reload(cache: CommVQCache) -> CommVQCache:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            cache.save(path)
            cache.close()
            return CommVQCache.load(path, model, _Loaded(model, codecs))

    with reference(model, codecs, **OPTIONS) as slow:
        wanted = _run(model, slow, steps, seed, lambda cache: cache)
    got = _run(model, CommVQCache(model, codecs, **OPTIONS), steps, seed, reload)
    for want, have in zip(wanted, got, strict=True):
        assert (want - have).abs().max() < 1e-3 * want.abs().max()
