"""The encoding benchmark: what it reports, on cases that take no time."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from commvq_core.bench import encode
from commvq_core.bench.encode import EncodeBench, bench_encode, linear_flops
from commvq_core.bench.shapes import SHAPES, random_model
from commvq_core.errors import InputError
from tests.cli.helpers import refusal

TINY = {
    **SHAPES["smollm2-135m"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 10,
}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> EncodeBench:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    return EncodeBench(
        shapes=("tiny",), tokens=(1, 40), bits=(1.0, 2.0), device="cpu", seconds=0.0, matmul_rows=8
    )


@pytest.fixture
def result(config: EncodeBench) -> dict[str, Any]:
    return bench_encode(config)


def test_every_case_is_timed_on_both_sides(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result)) == result
    few, many = ("op", "codec", "pytorch"), ("op", "codec")
    assert [(r["bits"], r["tokens"], r["side"], r["impl"]) for r in result["rows"]] == [
        (bits, tokens, side, impl)
        for bits in (1.0, 2.0)
        for tokens in (1, 40)
        for side in ("key", "value")
        for impl in (few if tokens == 1 else many)
    ]
    for row in result["rows"]:
        assert 0 < row["ms_min"] <= row["ms_median"]
        assert row["us_per_token_head"] == pytest.approx(1e3 * row["ms_median"] / row["tokens"] / 2)
    assert result["threads"] == torch.get_num_threads()


def test_the_share_of_prefill_is_encoding_by_linear_layers_at_the_rate(
    result: dict[str, Any],
) -> None:
    assert [(p["bits"], p["dtype"]) for p in result["prefill"]] == [
        (bits, dtype) for bits in (1.0, 2.0) for dtype in ("bfloat16", "float32")
    ]
    for entry in result["prefill"]:
        both = [
            row["ms_median"]
            for row in result["rows"]
            if (row["bits"], row["tokens"], row["impl"]) == (entry["bits"], 40, "codec")
        ]
        assert len(both) == 2
        assert entry["encode_us"] == pytest.approx(1e3 * sum(both) / 40)
        seconds = entry["linear_flops"] / (1e9 * entry["matmul_gflop_s"])
        assert entry["prefill_us"] == pytest.approx(1e6 * seconds)
        assert entry["share_of_prefill"] == pytest.approx(entry["encode_us"] / entry["prefill_us"])


@pytest.mark.usefixtures("config")
def test_linear_flops_are_two_for_each_weight() -> None:
    layer = random_model("tiny", torch.device("cpu"), torch.float32).get_decoder().layers[0]
    weights = [m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert linear_flops("tiny") == 2 * sum(weights)


def test_all_implementations_give_the_same_codes(
    config: EncodeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed is the same work: nearly all codes agree, and bring the vectors back."""
    calls: dict[str, Any] = {}

    def watch(named: dict[str, list[Any]], *_: object, **__: object) -> dict[str, list[float]]:
        calls.update(named)
        return {name: [1.0] for name in named}

    monkeypatch.setattr(encode, "interleaved", watch)
    bench_encode(replace(config, bits=(2.0,), tokens=(30,)))
    for side in ("key", "value"):
        op = calls[f"op/{side}"][0]()
        assert (op == calls[f"pytorch/{side}"][0]()).float().mean() > 0.99
        packed = calls[f"codec/{side}"][0]()
        assert (op == packed[0]).float().mean() > 0.99
        codec, vectors = encode._inputs("tiny", 2.0, 30, side, torch.device("cpu"), 0)
        error = (codec.decode(packed) - vectors).square().mean() / vectors.square().mean()
        assert error < 0.3


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"tokens": (0,)}, "--tokens is too small"),
        ({"bits": (0.0,)}, "no codes have"),
        ({"bits": ()}, "no codes have"),
        ({"shapes": ("gpt-9",)}, "--shape gpt-9 is not known"),
    ],
)
def test_bad_input_is_one_line(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        EncodeBench(**fields)


def test_bad_options_are_refused() -> None:
    for arguments in (("--tokens", 0), ("--shape", "gpt-9"), ("--bits", 99), ("--threads", 0)):
        refusal("bench", "encode", *arguments)
