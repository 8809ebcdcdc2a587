"""How much memory a context really takes: `commvq bench memory`.

Every figure is measured in a process of its own: it loads the model, runs a few tokens so that all
weights are in memory, and only then counts. Both caches get the prompt in the same pieces.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commvq_core.bench.peak import device_held, device_peak
from commvq_core.cache.prefill import PREFILL_CHUNK
from commvq_core.errors import InputError
from commvq_core.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from commvq_core.models import AttentionSpec

IMPLEMENTATIONS = ("dynamic-cache", "commvq")
# Of a row, in the order that _figures gives them.
FIGURES = (
    *("peak_bytes", "steady_bytes", "peak_total_bytes", "cache_bytes", "fp16_cache_bytes"),
    *("codebook_bytes", "prefill_seconds", "tokens_per_second"),
)
_WARM = 16  # tokens


@dataclass(frozen=True)
class MemoryBench:
    """What to run: a `model` (hub id, folder, .gguf) or a `shape` of random weights.

    `codebook` is an artifact; without one random codebooks of `bits` take its place, since memory
    does not depend on their numbers. `random_weights` says aloud what a `shape` always has.
    """

    model: str | None = None
    shape: str | None = None
    random_weights: bool = False
    codebook: Path | str | None = None
    bits: float = 1.0
    contexts: tuple[int, ...] = (8192,)
    new_tokens: int = 16
    window: int = 128
    sinks: int = 4
    prefill_chunk: int = PREFILL_CHUNK
    device: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise InputError(
                "bench memory needs one model", "give MODEL, or --shape (random weights)"
            )
        if self.random_weights and self.shape is None:
            raise InputError("--random-weights has no shape", "give --shape instead of MODEL")
        if min(self.contexts, default=0) < 2:
            raise InputError("--context is too small", "give 2 tokens or more")


def bench_memory(config: MemoryBench, progress: Progress | None = None) -> dict[str, Any]:
    """{"source", "device", "dtype", "rows": [one a context and implementation]}.

    A row has `impl`, `context`, `peak_bytes` and `steady_bytes` (above what the process held before
    the prompt, codebooks included; the most, and after decoding), `peak_total_bytes` (the most with
    the weights), `cache_bytes` (what the cache says of itself), `fp16_cache_bytes` (by arithmetic),
    `codebook_bytes`, `prefill_seconds` and `tokens_per_second` of decoding. All but the first two
    are None where a GPU's memory did not suffice. Raises InputError.
    """
    shown, rows = progress or Silent(), []
    context = multiprocessing.get_context("spawn")
    jobs = [(name, tokens) for tokens in config.contexts for name in IMPLEMENTATIONS]
    with shown.task("measuring", total=len(jobs), unit="runs") as task:
        for name, tokens in jobs:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                row, facts = pool.submit(_measure, config, name, tokens).result()
            rows.append(row)
            task.advance()
    return {
        "source": config.model or f"{config.shape}, random weights",
        **facts,
        "settings": {
            **asdict(config),
            "codebook": None if config.codebook is None else str(config.codebook),
            "contexts": list(config.contexts),
        },
        "rows": rows,
    }


def _measure(config: MemoryBench, name: str, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row, and what all rows share; runs in a fresh process."""
    model, spec = _load(config)
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    # Random weights know no positions: only the prompt must fit what the real model is made for.
    if limit and tokens + (0 if config.shape else config.new_tokens) > limit:
        raise InputError(f"the model takes at most {limit:,} tokens", "give a smaller --context")
    facts = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    row = {"impl": name, "context": tokens}
    try:
        return {**row, **_figures(config, name, tokens, model, spec)}, facts
    except torch.cuda.OutOfMemoryError:
        return {**row, **dict.fromkeys(FIGURES)}, facts


def _figures(
    config: MemoryBench, name: str, tokens: int, model: PreTrainedModel, spec: AttentionSpec
) -> dict[str, float]:
    """FIGURES of one implementation at one context."""
    device = model.device
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        for _ in range(2):  # the second time nothing is allocated once and for all
            with _open(config, name, model, spec) as cache:
                _prefill(model, cache, ids[:, :_WARM], config.prefill_chunk)
                model(input_ids=ids[:, :1], past_key_values=cache)
        del cache
        before = device_held(device)
        device_peak(device, forget=True)
        with _open(config, name, model, spec) as cache:
            began = time.perf_counter()
            _prefill(model, cache, ids, config.prefill_chunk)
            prefill = _now(device) - began
            began = time.perf_counter()
            for step in range(config.new_tokens):
                model(input_ids=ids[:, step : step + 1], past_key_values=cache)
            decode = _now(device) - began
            peak, steady = device_peak(device), device_held(device)
            found = (
                *(max(0, peak - before), max(0, steady - before), peak),
                *(_cache_bytes(cache), _arithmetic(spec, cache.get_seq_length())),
                *(getattr(cache, "resident_bytes", 0), prefill, config.new_tokens / decode),
            )
    return dict(zip(FIGURES, found, strict=True))


def _load(config: MemoryBench) -> tuple[PreTrainedModel, AttentionSpec]:
    from commvq_core.bench.shapes import random_model
    from commvq_core.models import choose_device, choose_dtype, describe_model, load_model

    if config.model is not None:
        loaded = load_model(config.model, device=config.device, dtype=config.dtype)
        return loaded.model, loaded.spec
    assert config.shape is not None
    device = choose_device(config.device)
    model = random_model(config.shape, device, choose_dtype(config.dtype, None, device))
    return model, describe_model(model)


_codecs: dict[str, Any] = {}  # made once a process


def _open(
    config: MemoryBench, name: str, model: PreTrainedModel, spec: AttentionSpec
) -> AbstractContextManager[Any]:
    """A fresh cache."""
    from transformers import DynamicCache

    from commvq_core.bench.shapes import random_codecs
    from commvq_core.cache.cache import CommVQCache

    if name == "dynamic-cache":
        return nullcontext(DynamicCache(config=model.config))
    options: dict[str, Any] = {
        "window": config.window,
        "sinks": config.sinks,
        "prefill_chunk": config.prefill_chunk,
    }
    if config.codebook is not None:
        if "artifact" not in _codecs:
            from commvq_core.artifact import load_artifact

            _codecs["artifact"] = load_artifact(config.codebook)
        return CommVQCache.from_pretrained(_codecs["artifact"], model, **options)
    if "random" not in _codecs:
        _codecs["random"] = random_codecs(spec, config.bits)
    return CommVQCache(model, _codecs["random"], **options)


def _prefill(model: PreTrainedModel, cache: Any, ids: Tensor, size: int) -> None:
    """The prompt, in pieces, which our cache cuts itself; nobody needs a logit of it."""
    decoder = model.get_decoder()
    for piece in [ids] if hasattr(cache, "prefill_chunk") else ids.split(size, dim=1):
        decoder(input_ids=piece, past_key_values=cache, use_cache=True)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cache_bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _arithmetic(spec: AttentionSpec, tokens: int) -> int:
    from commvq_core.generation import half_precision_bytes

    return half_precision_bytes(spec, tokens)
