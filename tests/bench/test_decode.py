"""The decoding benchmark: that what it times is the same attention, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core.bench import decode, rivals
from commvq_core.bench.context import coded_contexts
from commvq_core.bench.decode import BEST_TORCH, ROOFLINE, DecodeBench, bench_decode, contenders
from commvq_core.bench.shapes import AttentionShape, attention_shape
from commvq_core.errors import InputError
from commvq_core.progress import Silent
from tests.cli.helpers import refusal, succeed, succeed_json

CPU = torch.device("cpu")
SHAPE = AttentionShape("tiny", heads=6, kv_heads=2, head_dim=32)
TINY: dict[str, Any] = {
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 32,
    "contexts": (70, 140),
    "threads": 1,
    "device": "cpu",
    "seconds": 0.0,
    "read_bytes": 1 << 16,
    "cold_bytes": 1 << 13,
}
TORCH = list(rivals.TORCH)


def by_definition(keys: Tensor, values: Tensor, query: Tensor) -> np.ndarray:
    """softmax(q k / sqrt(d)) v in float64, a query head after the other."""
    out = np.zeros(query.shape)
    share = query.shape[1] // keys.shape[1]
    for row, head in np.ndindex(*query.shape[:2]):
        k, v = (t[row, head // share].double().numpy() for t in (keys, values))
        scores = k @ query[row, head, 0].double().numpy() / np.sqrt(k.shape[1])
        weights = np.exp(scores - scores.max())
        out[row, head, 0] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize("bits", [1.0, 2.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_implementation_attends_to_the_same_tokens(bits: float, batch: int) -> None:
    config = DecodeBench(**{**TINY, "bits": (bits,), "batch": batch, "cold_bytes": 0})
    found = contenders(config, SHAPE, 150, CPU, Silent())
    make = {"tokens": 150, "batch": batch, "count": 1, "device": CPU, "seed": 0}
    (context,) = coded_contexts(SHAPE, bits, **make)  # type: ignore[arg-type]
    ((keys, values),) = context.dense((torch.float32,))
    query = torch.randn(batch, 6, 1, 32, generator=torch.Generator().manual_seed(1))
    want = by_definition(keys, values, query)
    quantized = found.pop(rivals.QUANTIZED, None)  # loses what 2 bits lose
    assert list(found) == [f"commvq-{bits:g}bit", *TORCH]
    for name, contender in found.items():
        got = contender.calls[0](query)
        assert got.shape == query.shape, name
        # bfloat16 keeps 8 bits, and scores of some units multiply its error.
        # Ours rounds queries to 13 bits of their norm and rotates in 16.
        most = 1e-5 if name.endswith("fp32") else 5e-3 if name.startswith("commvq") else 0.05
        error = np.abs(got.double().numpy() - want).max() / np.abs(want).max()
        assert error < most, name
    if quantized is not None:
        assert quantized.calls[0](query).shape == query.shape


class TwoBitLayer:
    """transformers' quantized layer as far as the benchmark knows it, losing nothing."""

    def __init__(self, nbits: int, q_group_size: int) -> None:
        assert (nbits, q_group_size) == (2, 64)
        self.old: tuple[Tensor, Tensor] | None = None
        self.keys = self.values = torch.tensor([])

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.old is None:
            self.old = keys, values
            return keys, values
        self.keys = torch.cat((self.keys, keys), dim=-2)
        self.values = torch.cat((self.values, values), dim=-2)
        parts = zip(self.old, (self.keys, self.values), strict=True)
        found = tuple(torch.cat(pair, dim=-2) for pair in parts)
        return found[0], found[1]


def test_the_quantized_cache_sees_every_token_once_however_often_it_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import cache_utils

    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", TwoBitLayer)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 65, 32, generator=generator) for _ in range(2))
    query = torch.randn(1, 6, 1, 32, generator=generator)
    attend = rivals.quantized(keys, values)
    assert attend is not None
    for _ in range(3):
        got = attend(query)
        np.testing.assert_allclose(got, by_definition(keys, values, query), atol=1e-5)
    assert rivals.quantized(keys[:, :, :2, :3], values[:, :, :2, :3]) is None  # no whole group


def test_a_backend_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(rivals, "quantized", broken)
    found = contenders(DecodeBench(**TINY), SHAPE, 70, CPU, Silent())
    assert list(found) == ["commvq-1bit", "commvq-2bit", *TORCH]


def test_inputs_are_together_larger_than_the_cache() -> None:
    config = DecodeBench(**TINY)
    found = contenders(config, SHAPE, 70, CPU, Silent())
    numbers = 2 * 70 * 2 * 32
    assert len(found["commvq-1bit"].calls) == -(-(1 << 13) // (numbers // 8))
    assert len(found["torch-sdpa-bf16"].calls) == 1 < len(found["commvq-2bit"].calls)
    first, second = (call(torch.ones(1, 6, 1, 32)) for call in found["commvq-1bit"].calls[:2])
    assert not torch.equal(first, second)


def test_what_is_read_is_counted(result: dict[str, Any]) -> None:
    rows = {(row["impl"], row["context"]): row["bytes_read"] for row in result["rows"]}
    for context in (70, 140):
        numbers = 2 * context * 2 * 32
        assert rows["torch-sdpa-bf16", context] == rows[ROOFLINE, context] == 2 * numbers
        assert rows["torch-sdpa-fp32", context] == 4 * numbers
    for bits in (1, 2):
        name = f"commvq-{bits}bit"
        assert rows[name, 140] - rows[name, 70] == 2 * 70 * 2 * 32 * bits // 8


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench_decode(DecodeBench(**TINY))


def test_its_keys_are_those_that_scripts_rely_on(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {"shape", "device", "threads", "rows", "read_bandwidth_gb_s", "ratios"} <= set(result)
    assert (result["shape"], result["device"], result["threads"]) == ("6x2x32", "cpu", 1)
    names = ["commvq-1bit", "commvq-2bit", *TORCH, ROOFLINE]
    rows = [row for row in result["rows"] if row["impl"] != rivals.QUANTIZED]
    assert [(row["context"], row["impl"]) for row in rows] == [
        (context, name) for context in (70, 140) for name in names
    ]
    for row in rows:
        assert set(row) == {"impl", "context", "batch", "ms_median", "ms_min", "bytes_read"}
        assert 0 < row["ms_min"] <= row["ms_median"]
        assert row["batch"] == 1
    assert result["thread_scaling"] == {}  # one thread


def test_the_roofline_is_the_bf16_cache_over_the_bandwidth(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["impl"] == ROOFLINE:
            seconds = row["bytes_read"] / (1e9 * result["read_bandwidth_gb_s"])
            assert row["ms_median"] == row["ms_min"] == pytest.approx(1e3 * seconds)


def test_ratios_and_growth_divide_medians() -> None:
    medians = {
        ("commvq-1bit", 10): 2.0,
        ("torch-a", 10): 8.0,
        ("torch-b", 10): 5.0,
        ("commvq-1bit", 40): 9.0,
        ("torch-a", 40): 36.0,
        ("torch-b", 40): 60.0,
        (ROOFLINE, 10): 4.0,
        (ROOFLINE, 40): 12.0,
    }
    rows = [{"impl": i, "context": c, "ms_median": ms} for (i, c), ms in medians.items()]
    assert decode.ratios(rows) == {
        "commvq-1bit/torch-a@10": 0.25,
        "commvq-1bit/torch-b@10": 0.4,
        f"commvq-1bit/{BEST_TORCH}@10": 0.4,
        f"commvq-1bit/{ROOFLINE}@10": 0.5,
        "commvq-1bit/torch-a@40": 0.25,
        "commvq-1bit/torch-b@40": 0.15,
        f"commvq-1bit/{BEST_TORCH}@40": 0.25,
        f"commvq-1bit/{ROOFLINE}@40": 0.75,
    }
    assert decode.growth(rows) == {
        "commvq-1bit@40/10": 4.5,
        "torch-a@40/10": 4.5,
        "torch-b@40/10": 12.0,
        f"{ROOFLINE}@40/10": 3.0,
    }


def test_several_threads_are_compared_with_one() -> None:
    before = torch.get_num_threads()
    found = bench_decode(DecodeBench(**{**TINY, "threads": 2, "contexts": (70,), "bits": (1.0,)}))
    assert found["threads"] == 2
    assert list(found["thread_scaling"]) == ["commvq-1bit@70"]
    assert found["thread_scaling"]["commvq-1bit@70"] > 0
    assert torch.get_num_threads() == before


def test_a_named_shape_is_that_models() -> None:
    llama = attention_shape(None, None, None, None)
    assert (llama.name, llama.heads, llama.kv_heads, llama.head_dim) == ("llama-3.1-8b", 32, 8, 128)
    assert llama == attention_shape("llama-3.1-8b", None, None, None)
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from commvq_core.bench.shapes import SHAPES

    for name, config in SHAPES.items():
        shape = attention_shape(name, None, None, None)
        want = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
        assert torch.allclose(shape.rotary(CPU).inv_freq, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"contexts": (0,)}, "--context is too small"),
        ({"contexts": ()}, "--context is too small"),
        ({"bits": ()}, "no codes have no bits"),
        ({"bits": (1.0, float("nan"))}, "no codes have 1, nan bits"),
        ({"batch": 0}, "--batch 0"),
        ({"shape": "llama-3.1-8b"}, "leave out --heads"),
        ({"heads": None}, "three numbers"),
        ({"heads": 5}, "multiple of --kv-heads"),
        ({"head_dim": 33}, "even number"),
        ({"bits": (1.3,)}, "1.3 bits can't be reached"),
        ({"contexts": (1 << 40,)}, "smaller --context or --batch"),
        ({"device": "abacus"}, "device abacus can't be used"),
    ],
)
def test_bad_input_is_one_line(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        bench_decode(DecodeBench(**{**TINY, **fields}))


OPTIONS = ("--heads", 6, "--kv-heads", 2, "--head-dim", 32, "--threads", 1, "--device", "cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers, which no option sets."""
    fields = {**DecodeBench.__dataclass_fields__}
    defaults = DecodeBench.__init__.__defaults__
    assert defaults is not None
    small = {name: TINY[name] for name in ("seconds", "read_bytes", "cold_bytes")}
    changed = tuple(small.get(name, value) for name, value in zip(fields, defaults, strict=True))
    monkeypatch.setattr(DecodeBench.__init__, "__defaults__", changed)


@pytest.mark.usefixtures("quick")
def test_the_command_prints_a_table_or_one_object_and_draws(tmp_path: Path) -> None:
    figure = tmp_path / "decode.png"
    arguments = ("bench", "decode", *OPTIONS, "--context", 70, "--context", 130, "--bits", 2)
    found = succeed_json(*arguments, "--png", figure)
    assert {row["context"] for row in found["rows"]} == {70, 130}
    assert "commvq-2bit/bf16-roofline@130" in found["ratios"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "commvq-2bit" in succeed(*arguments)
    assert "decode.png" in refusal(*arguments, "--png", figure)


@pytest.mark.parametrize(
    "arguments",
    [("--context", 0), ("--shape", "gpt-9"), ("--bits", 77), ("--heads", 4), ("--batch", 0)],
)
def test_bad_options_are_refused(arguments: tuple[object, ...]) -> None:
    refusal("bench", "decode", *arguments)
