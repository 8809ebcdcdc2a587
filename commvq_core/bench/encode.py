"""How fast vectors become codes, and what share of a model's prefill that is: `bench encode`.

A prefill's floor is its linear layers at the matmul rate that this machine reaches in the same run;
attention and the head, which add to a prefill, are left out of it, so that shares are rather too
large than too small.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.bench.machine import matmul_rate
from commvq_core.bench.shapes import attention_shape, random_codec, shape_config
from commvq_core.bench.timing import interleaved, threads
from commvq_core.codecs.additive import AdditiveCodec
from commvq_core.errors import InputError
from commvq_core.ops import reference
from commvq_core.progress import Progress, Silent
from commvq_core.sides import SIDES

_MOST_PYTORCH = 32  # tokens; the reference is slow
_SHRINK = 0.75  # a stage's codewords by those of the stage before, about as fitted ones
_NOISE = 0.3  # standard deviations of a vector that its code loses, about as at 1 bit
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class EncodeBench:
    """What to time: all `tokens` at all `bits` for the layers of all named `shapes`.

    `seconds` are spent on each, `matmul_rows` is how many tokens the matrix products have that say
    how fast a prefill could be.
    """

    shapes: tuple[str, ...] = ("smollm2-135m", "llama-3.1-8b")
    bits: tuple[float, ...] = (1.0, 2.0)
    tokens: tuple[int, ...] = (1, 32, 2048)
    threads: int | None = None
    device: str = "auto"
    seed: int = 0
    seconds: float = 2.0
    matmul_rows: int = 512

    def __post_init__(self) -> None:
        if min(self.tokens, default=0) < 1:
            raise InputError("--tokens is too small", "give 1 or more")
        if not self.bits or not all(0 < bits <= 8 for bits in self.bits):
            raise InputError("no codes have these --bits", "give some above 0 and up to 8")
        for name in self.shapes:
            shape_config(name)


def bench_encode(config: EncodeBench, progress: Progress | None = None) -> dict[str, Any]:
    """{"device", "threads", "native", "rows", "prefill"}.

    A row has `impl` ("op", the operator with codebooks laid out for it; "codec", all that the cache
    calls, from canonical vectors to packed codes; "pytorch", the reference, for few tokens),
    `shape`, `bits`, `side`, `tokens`, `ms_median`, `ms_min` and `us_per_token_head`, of the median.

    `prefill` has one entry a shape, bits and dtype of the model, for the largest of `tokens`:
    `encode_us` (a token's keys and values of one layer), `linear_flops` of a token and layer,
    `matmul_gflop_s` measured here, `prefill_us`, what the linear layers take at that rate, and
    `share_of_prefill`, the one by the other. Raises InputError.
    """
    from commvq_core.models import choose_device

    shown, device = progress or Silent(), choose_device(config.device)
    rows: list[dict[str, Any]] = []
    prefill: list[dict[str, Any]] = []
    cases = [(shape, bits) for shape in config.shapes for bits in config.bits]
    with threads(config.threads) as count, torch.inference_mode():
        with shown.task("timing", total=len(cases), unit="cases") as task:
            rates: dict[tuple[str, str], float] = {}
            for shape, bits in cases:
                for tokens in config.tokens:
                    rows += _rows(config, shape, bits, tokens, device)
                for dtype in _DTYPES:
                    if (shape, dtype) not in rates:
                        rates[shape, dtype] = _rate(shape, dtype, config.matmul_rows, device)
                    prefill.append(_share(config, shape, bits, dtype, rates[shape, dtype], rows))
                task.advance()
    return {
        "device": str(device),
        "threads": count,
        "native": ops.native_info().summary,
        "rows": rows,
        "prefill": prefill,
    }


def linear_flops(shape: str) -> int:
    """Floating-point operations of a token in the linear layers of one layer of a named shape."""
    config = shape_config(shape)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * (2 * heads + 2 * kv_heads) * config["head_dim"]  # q and o, k and v
    return 2 * (attention + 3 * hidden * width)


def _rows(
    config: EncodeBench, shape: str, bits: float, tokens: int, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of one case: both sides and all implementations, side by side."""
    kv_heads = attention_shape(shape, None, None, None).kv_heads
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for side in SIDES:
        codec, vectors = _inputs(shape, bits, tokens, side, device, config.seed)
        x = codec.transformed(vectors[0]).contiguous()
        codebooks, beam = codec.books.codebooks, codec.config()["beam"]
        calls["op", side] = partial(ops.additive_encode, x, codebooks, beam)
        calls["codec", side] = partial(codec.encode, vectors)
        if tokens <= _MOST_PYTORCH:
            calls["pytorch", side] = partial(reference.additive_encode, x, codebooks, beam)
    named = {"/".join(key): [call] for key, call in calls.items()}
    times = interleaved(named, device, seconds=config.seconds, least=3)
    rows = []
    for (impl, of), own in zip(calls, times.values(), strict=True):
        median = statistics.median(own)
        rows.append(
            {
                "impl": impl,
                "shape": shape,
                "bits": bits,
                "side": of,
                "tokens": tokens,
                "ms_median": 1e3 * median,
                "ms_min": 1e3 * min(own),
                "us_per_token_head": 1e6 * median / (tokens * kv_heads),
            }
        )
    return rows


def _inputs(
    shape: str, bits: float, tokens: int, side: str, device: torch.device, seed: int
) -> tuple[AdditiveCodec, Tensor]:
    """A random codec and vectors [1, kv_heads, tokens, head_dim] near sums of its codewords."""
    generator = torch.Generator().manual_seed(seed)
    spec = attention_shape(shape, None, None, None).side(side)
    codec = random_codec(spec, bits, generator, shrink=_SHRINK)
    size = (1, codec.code_rows, tokens, codec.code_bytes)
    codes = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    vectors = codec.decode(codes)
    noise = torch.randn(vectors.shape, generator=generator)
    return codec.to(device), (vectors + _NOISE * vectors.std() * noise).to(device)


def _rate(shape: str, dtype: str, rows: int, device: torch.device) -> float:
    """Operations a second of the largest linear layer of a named shape."""
    config = shape_config(shape)
    sizes = config["intermediate_size"], config["hidden_size"]
    return matmul_rate(rows, *sizes, _DTYPES[dtype], device)


def _share(
    config: EncodeBench,
    shape: str,
    bits: float,
    dtype: str,
    rate: float,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    tokens = max(config.tokens)
    own = (shape, bits, tokens, "codec")
    costs = [
        row["us_per_token_head"]
        for row in rows
        if (row["shape"], row["bits"], row["tokens"], row["impl"]) == own
    ]
    encode = sum(costs) * attention_shape(shape, None, None, None).kv_heads
    flops = linear_flops(shape)
    return {
        "shape": shape,
        "bits": bits,
        "tokens": tokens,
        "dtype": dtype,
        "encode_us": encode,
        "linear_flops": flops,
        "matmul_gflop_s": rate / 1e9,
        "prefill_us": 1e6 * flops / rate,
        "share_of_prefill": encode / (1e6 * flops / rate),
    }
