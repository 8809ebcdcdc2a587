"""The memory benchmark: what it measures, against what is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commvq_core.bench.memory import IMPLEMENTATIONS, MemoryBench, bench_memory
from commvq_core.bench.shapes import SHAPES
from commvq_core.errors import InputError


def test_it_measures_both_caches_in_processes_of_their_own(
    tiny_model_dir: Path, tiny_artifact: Path
) -> None:
    result = bench_memory(
        MemoryBench(
            model=str(tiny_model_dir), codebook=tiny_artifact, contexts=(300,), new_tokens=2,
            window=16, prefill_chunk=128, device="cpu",
        )
    )  # fmt: skip
    assert json.loads(json.dumps(result)) == result
    assert [row["impl"] for row in result["rows"]] == list(IMPLEMENTATIONS)
    own, ours = result["rows"]
    assert own["cache_bytes"] == own["fp16_cache_bytes"] == 302 * 2 * 2 * 2 * 32 * 2
    assert 0 < ours["cache_bytes"] < own["cache_bytes"] / 3
    assert own["codebook_bytes"] == 0 < ours["codebook_bytes"]
    for row in result["rows"]:
        assert 0 < row["peak_bytes"] < row["peak_total_bytes"]
        assert row["prefill_seconds"] > 0
        assert row["tokens_per_second"] > 0


def test_a_shape_needs_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**SHAPES["smollm2-135m"], "num_hidden_layers": 1, "vocab_size": 100}
    from commvq_core.bench import memory

    monkeypatch.setitem(SHAPES, "tiny", shape)
    config = MemoryBench(shape="tiny", contexts=(64,), new_tokens=1, window=16, device="cpu")
    row, facts = memory._measure(config, "commvq", 64)
    assert row["cache_bytes"] < row["fp16_cache_bytes"]
    assert facts == {"device": "cpu", "dtype": "bfloat16"}


def test_a_shape_takes_as_many_tokens_as_its_model_and_then_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from commvq_core.bench import memory

    shape = {**SHAPES["smollm2-135m"], "num_hidden_layers": 1, "vocab_size": 100}
    monkeypatch.setitem(SHAPES, "tiny", {**shape, "max_position_embeddings": 64})
    config = MemoryBench(shape="tiny", random_weights=True, contexts=(64,), new_tokens=2, window=16)
    row, _ = memory._measure(config, "commvq", 64)
    assert row["context"] == 64
    assert row["tokens_per_second"] > 0


def test_a_cache_that_does_not_fit_a_gpu_is_a_row_without_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from commvq_core.bench import memory

    def no_memory(*arguments: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(
        SHAPES, "tiny", {**SHAPES["smollm2-135m"], "num_hidden_layers": 1, "vocab_size": 100}
    )
    monkeypatch.setattr(memory, "_prefill", no_memory)
    row, _ = memory._measure(MemoryBench(shape="tiny", contexts=(64,)), "dynamic-cache", 64)
    assert row == {"impl": "dynamic-cache", "context": 64, **dict.fromkeys(memory.FIGURES)}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "needs one model"),
        ({"model": "a", "random_weights": True}, "give --shape"),
        ({"model": "a", "shape": "b"}, "needs one model"),
        ({"shape": "b", "contexts": (1,)}, "too small"),
        ({"shape": "b"}, "give llama-3.1-8b or"),
        ({"shape": "smollm2-135m", "contexts": (9000,)}, "at most 8,192 tokens"),
    ],
)
def test_bad_input_is_one_line(fields: dict[str, object], line: str) -> None:
    with pytest.raises(InputError, match=line):
        bench_memory(MemoryBench(**fields))  # type: ignore[arg-type]
