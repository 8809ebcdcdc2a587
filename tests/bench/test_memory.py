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
        assert row["peak_bytes"] > 0
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


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "needs one model"),
        ({"model": "a", "shape": "b"}, "needs one model"),
        ({"shape": "b", "contexts": (1,)}, "too small"),
        ({"shape": "b"}, "give llama-3.1-8b or"),
        ({"shape": "smollm2-135m", "contexts": (9000,)}, "at most 8,192 tokens"),
    ],
)
def test_bad_input_is_one_line(fields: dict[str, object], line: str) -> None:
    with pytest.raises(InputError, match=line):
        bench_memory(MemoryBench(**fields))  # type: ignore[arg-type]
