"""How long one attention layer takes for one new token: `commvq bench decode`.

Attention over codes is timed against the same attention over whole keys and values in the same
minutes: every round calls every implementation once, over inputs that together are larger than the
last-level cache. The floor is the bf16 roofline: the time to read a bf16 cache once at the read
bandwidth that the same rounds measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.bench import rivals
from commvq_core.bench.context import CodedContext, coded_contexts
from commvq_core.bench.machine import ReadBuffer, free_memory, last_level_cache
from commvq_core.bench.shapes import AttentionShape, attention_shape
from commvq_core.bench.timing import interleaved, threads
from commvq_core.errors import InputError
from commvq_core.progress import Progress, Silent

ROOFLINE = "bf16-roofline"
BEST_TORCH = "best-torch"  # in ratios: whichever torch implementation is fastest there
_READ = "read"  # the reading of a large buffer, among the timed calls
_MOST_SETS = 256
_MOST_BITS = 8  # an element
_COLD = 2  # times the last-level cache that inputs are at least


@dataclass(frozen=True)
class DecodeBench:
    """What to time: a named `shape`, or one given by its numbers of heads and dims.

    `seconds` are spent on each context, more when even five rounds take longer; `read_bytes` is
    how large the buffer is whose reading gives the bandwidth, `cold_bytes` how much all sets of an
    implementation's inputs are together at least (None: twice the last-level cache).
    """

    shape: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    bits: tuple[float, ...] = (1.0, 2.0)
    batch: int = 1
    threads: int | None = None
    device: str = "auto"
    seed: int = 0
    seconds: float = 10.0
    read_bytes: int = 1 << 30
    cold_bytes: int | None = None

    def __post_init__(self) -> None:
        if min(self.contexts, default=0) < 1:
            raise InputError("--context is too small", "give 1 token or more")
        if not self.bits or not all(0 < bits <= _MOST_BITS for bits in self.bits):
            raise InputError(
                f"no codes have {', '.join(f'{bits:g}' for bits in self.bits) or 'no'} bits",
                f"give --bits above 0 and up to {_MOST_BITS}",
            )
        if self.batch < 1:
            raise InputError(f"--batch {self.batch} has no rows", "give 1 or more")


@dataclass(frozen=True)
class Contender:
    """One implementation at one context: a call for each set of inputs, and what each reads.

    A call takes the query [batch, heads, 1, head_dim] and gives the output, of the same shape.
    """

    calls: tuple[Callable[[Tensor], Tensor], ...]
    bytes_read: int


@dataclass(frozen=True)
class Measured:
    """What one context gave: seconds of every repetition and bytes read, by implementation."""

    context: int
    seconds: dict[str, list[float]]
    bytes_read: dict[str, int]
    bandwidth: float  # bytes a second
    scaling: dict[str, float]


def bench_decode(config: DecodeBench, progress: Progress | None = None) -> dict[str, Any]:
    """{"shape", "device", "threads", "rows", "read_bandwidth_gb_s", "ratios", ...}.

    A row, one a context and implementation, has `impl`, `context`, `batch`, `ms_median`, `ms_min`
    and `bytes_read` (codes and codebooks, or keys and values). `ratios` divide medians:
    "a/b@context" is the time of a by that of b. `growth` divides an implementation's medians at two
    contexts, `thread_scaling` those of attention over codes on one thread and on all of them (on
    CPUs with several). Raises InputError.
    """
    from commvq_core.models import choose_device

    shown = progress or Silent()
    shape = attention_shape(config.shape, config.heads, config.kv_heads, config.head_dim)
    device = choose_device(config.device)
    contexts = sorted(set(config.contexts))
    for context in contexts:
        _check_memory(config, shape, context, device)
    found = []
    with threads(config.threads) as count, torch.inference_mode():
        buffer = ReadBuffer(config.read_bytes, device)
        with shown.task("timing", total=len(contexts), unit="contexts") as task:
            for context in contexts:
                found.append(_measure(config, shape, context, buffer, device, shown))
                task.advance()
    bandwidth = max(one.bandwidth for one in found)
    rows = [row for one in found for row in _rows(one, bandwidth, config, shape)]
    return {
        "shape": shape.name,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "device": str(device),
        "threads": count,
        "native": ops.native_info().summary,
        "seed": config.seed,
        "rows": rows,
        "read_bandwidth_gb_s": bandwidth / 1e9,
        "ratios": ratios(rows),
        "growth": growth(rows),
        "thread_scaling": {name: x for one in found for name, x in one.scaling.items()},
    }


def contenders(
    config: DecodeBench,
    shape: AttentionShape,
    context: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, Contender]:
    """Every implementation at one context, by name.

    All of them attend to the same tokens, those of the codes at the first of `bits`; other bits
    have codes of their own.
    """
    make = partial(
        coded_contexts, shape, tokens=context, batch=config.batch, device=device, seed=config.seed
    )
    cold = _cold(config, device)
    numbers = 2 * config.batch * context * shape.kv_heads * shape.head_dim  # of keys and values
    coded: dict[float, list[CodedContext]] = {}
    for bits in dict.fromkeys(config.bits):
        coded[bits] = make(bits, count=_sets(cold, int(numbers * bits / 8)))
    found = {
        f"commvq-{bits:g}bit": Contender(
            tuple(own.attend for own in sets), sets[0].nbytes + sets[0].codebook_bytes
        )
        for bits, sets in coded.items()
    }
    dense: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {torch.bfloat16: [], torch.float32: []}
    for index, source in enumerate(coded[config.bits[0]]):
        lacking = tuple(t for t in dense if index < _sets(cold, numbers * t.itemsize))
        if not lacking:
            break
        for dtype, made in zip(lacking, source.dense(lacking), strict=True):
            dense[dtype].append(made)
    for name, (dtype, maker) in rivals.TORCH.items():
        calls = tuple(maker(*pair) for pair in dense[dtype])
        found[name] = Contender(calls, numbers * dtype.itemsize)
    try:
        quantized = [rivals.quantized(*pair) for pair in dense[torch.bfloat16]]
    except (ImportError, RuntimeError, ValueError) as error:
        quantized = []
        progress.message(f"{rivals.QUANTIZED} is left out: {' '.join(str(error).split())[:200]}")
    steps = tuple(step for step in quantized if step is not None)
    if steps:
        size = rivals.quantized_bytes(numbers, torch.bfloat16)
        found[rivals.QUANTIZED] = Contender(steps, size)
    return found


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """ "a/b@context": median time of a, attention over codes, by that of b, every other one.

    "best-torch" is the fastest torch implementation at that context.
    """
    found = {}
    for context in dict.fromkeys(row["context"] for row in rows):
        medians = {row["impl"]: row["ms_median"] for row in rows if row["context"] == context}
        torchs = [value for name, value in medians.items() if name.startswith("torch-")]
        others = {name: ms for name, ms in medians.items() if not name.startswith("commvq")}
        if torchs:
            others[BEST_TORCH] = min(torchs)
        for name in medians.keys() - others.keys():
            for other, value in others.items():
                found[f"{name}/{other}@{context}"] = medians[name] / value
    return dict(sorted(found.items()))


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """ "a@long/short": median time of a at one context by that at the next shorter one."""
    found = {}
    for name in dict.fromkeys(row["impl"] for row in rows):
        own = [(row["context"], row["ms_median"]) for row in rows if row["impl"] == name]
        for (short, before), (long, after) in pairwise(own):
            found[f"{name}@{long}/{short}"] = after / before
    return found


def _measure(
    config: DecodeBench,
    shape: AttentionShape,
    context: int,
    buffer: ReadBuffer,
    device: torch.device,
    progress: Progress,
) -> Measured:
    """Time everything at one context; its inputs live no longer than this."""
    query = _query(config, shape, device)
    found = contenders(config, shape, context, device, progress)
    calls = {name: _calls(own, query) for name, own in found.items()}
    times = interleaved({**calls, _READ: [buffer.read]}, device, seconds=config.seconds)
    bandwidth = buffer.nbytes / min(times.pop(_READ))
    scaling: dict[str, float] = {}
    count = torch.get_num_threads()
    if device.type == "cpu" and count > 1:
        coded = {name: own for name, own in calls.items() if name.startswith("commvq")}
        for name, factor in _scaling(coded, device, count, config.seconds).items():
            scaling[f"{name}@{context}"] = factor
    sizes = {name: own.bytes_read for name, own in found.items()}
    return Measured(context, times, sizes, bandwidth, scaling)


def _rows(
    measured: Measured, bandwidth: float, config: DecodeBench, shape: AttentionShape
) -> list[dict[str, Any]]:
    numbers = 2 * config.batch * measured.context * shape.kv_heads * shape.head_dim
    floor = numbers * torch.bfloat16.itemsize
    times = {**measured.seconds, ROOFLINE: [floor / bandwidth]}
    sizes = {**measured.bytes_read, ROOFLINE: floor}
    return [
        {
            "impl": name,
            "context": measured.context,
            "batch": config.batch,
            "ms_median": 1e3 * statistics.median(own),
            "ms_min": 1e3 * min(own),
            "bytes_read": sizes[name],
        }
        for name, own in times.items()
    ]


def _query(config: DecodeBench, shape: AttentionShape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)
    size = (config.batch, shape.heads, 1, shape.head_dim)
    return torch.randn(size, generator=generator).to(device)


def _calls(contender: Contender, query: Tensor) -> list[Callable[[], Tensor]]:
    return [partial(call, query) for call in contender.calls]


def _scaling(
    calls: Mapping[str, Sequence[Callable[[], Tensor]]],
    device: torch.device,
    count: int,
    seconds: float,
) -> dict[str, float]:
    """How many times faster each is on `count` threads than on one; the two take turns."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(3):
        for number in (1, count):
            with threads(number):
                found = interleaved(calls, device, seconds=seconds / 10, most=50)
            for name, own in found.items():
                times.setdefault((name, number), []).extend(own)
    return {
        name: statistics.median(times[name, 1]) / statistics.median(times[name, count])
        for name in calls
    }


def _cold(config: DecodeBench, device: torch.device) -> int:
    if config.cold_bytes is not None:
        return config.cold_bytes
    return _COLD * last_level_cache(device)


def _sets(cold: int, size: int) -> int:
    """How many inputs of `size` bytes are together as large as `cold`."""
    return min(_MOST_SETS, max(1, -(-cold // max(1, size))))


def _check_memory(
    config: DecodeBench, shape: AttentionShape, context: int, device: torch.device
) -> None:
    """Refuse what would not fit instead of being killed for it."""
    numbers = 2 * config.batch * context * shape.kv_heads * shape.head_dim
    cold = _cold(config, device)
    kept = sum(max(cold, 2 * numbers * size) for size in (2, 4))  # bf16 and fp32; with temporaries
    codes = sum(max(cold, int(numbers * bits / 8)) for bits in config.bits)
    need, free = kept + codes + config.read_bytes, free_memory(device)
    if free is not None and need > free:
        raise InputError(
            f"{context:,} tokens take {need / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free",
            "give a smaller --context or --batch",
        )
