"""How fast and how well key codebooks of one layer and head are fitted: `commvq bench train`.

Each implementation runs in a process of its own, so that its peak memory is its own. All see the
same unit keys (divided by the token's norm over all heads, as the paper's method needs) and are
judged on keys that they did not see, by plain squared error.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.bench.dense import dense_e_step, dense_encode
from commvq_core.bench.peak import peak_bytes
from commvq_core.codecs.additive import AdditiveCodec
from commvq_core.codecs.base import FitData, SideSpec
from commvq_core.codecs.norms import token_norm
from commvq_core.codecs.published import PublishedKeyCodec
from commvq_core.errors import InputError
from commvq_core.fit import em
from commvq_core.progress import Progress, Silent
from commvq_core.training import held_out

IMPLEMENTATIONS = ("published-dense", "published-fast", "default")
_COUNT = 64
_LEAST = 2048  # keys


@dataclass(frozen=True)
class TrainBench:
    """What to fit: a layer and KV head of a calibration, or made-up keys without one."""

    calibration: Path | None = None
    layer: int | None = None
    head: int = 0
    bits: float = 1.0
    tokens: int = 16_384
    steps: int = 100
    threads: int = 1
    seed: int = 0


def bench_train(config: TrainBench, progress: Progress | None = None) -> dict[str, Any]:
    """{"source", "layer", "head", "tokens", "bits", "threads", "rows": [one an implementation]}.

    A row has `impl`, `bits_per_element`, `seconds`, `mse_relative` (of held-out keys, to their
    variance), `peak_bytes` (above what the process held before) and, for published-fast,
    `same_codes`: the share of held-out keys' codes that are published-dense's when both use its
    codebooks. (Their own part ways, as rounding decides ties and soft EM builds on them.) Raises
    InputError.
    """
    rows, spec, source, layer = _keys(config)
    if len(rows) < _LEAST:
        raise InputError(f"{len(rows):,} keys are too few", f"give --tokens of {_LEAST:,} or more")
    results = []
    shown = progress or Silent()
    context = multiprocessing.get_context("spawn")
    with shown.task("fitting", total=len(IMPLEMENTATIONS), unit="methods") as task:
        for name in IMPLEMENTATIONS:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                results.append(pool.submit(_measure, name, rows, spec, config).result())
            task.advance()
    dense = results[0].pop("books"), results[0].pop("codes")
    for row in results:
        row["same_codes"] = None
    results[1]["same_codes"] = _agreement(rows, *dense)
    return {
        "source": source,
        "layer": layer,
        "head": config.head,
        "head_dim": spec.head_dim,
        "tokens": len(rows),
        "bits": config.bits,
        "steps": config.steps,
        "threads": config.threads,
        "native": ops.native_info().summary,
        "rows": results,
    }


def _keys(config: TrainBench) -> tuple[Tensor, SideSpec, str, int | None]:
    """Unit keys [n, head_dim] of one head, a spec of one head, where they are from, which layer."""
    index = None
    if config.calibration is None:
        generator = torch.Generator().manual_seed(config.seed)
        mixing = torch.randn(64, 64, generator=generator) * 0.9 ** torch.arange(64)
        middles = torch.randn(500, 64, generator=generator)
        chosen = torch.randint(500, (config.tokens,), generator=generator)
        noise = torch.randn(config.tokens, 64, generator=generator)
        vectors = ((middles[chosen] + 0.7 * noise) @ mixing).unsqueeze(1)
        rotary, source = 64, "made up (give --calibration for a real layer)"
    else:
        from commvq_core.calibration.store import CalibrationStore
        from commvq_core.calibration.vectors import canonical_vectors

        store = CalibrationStore.open(config.calibration)
        known = {layer.index: layer for layer in store.layers}
        index = config.layer if config.layer is not None else sorted(known)[len(known) // 2]
        if index not in known or not 0 <= config.head < known[index].kv_heads:
            raise InputError(
                f"there is no layer {index} with KV head {config.head} in {config.calibration}",
                "give a --layer and --head that commvq inspect shows",
            )
        layer = known[index]
        vectors = canonical_vectors(store, layer, "key")[: config.tokens]
        rotary, source = layer.rotary_dim, f"{store.manifest.model}, layer {index}"
    _, unit = token_norm(vectors.transpose(0, 1)[None])
    rows = unit[0, config.head].contiguous()
    return rows, SideSpec("key", 1, rows.shape[1], rotary), source, index


def _measure(name: str, rows: Tensor, spec: SideSpec, config: TrainBench) -> dict[str, Any]:
    """Fit one implementation in this process."""
    torch.set_num_threads(config.threads)
    _warm_up()
    learn, judge = _split(rows)
    before, began = peak_bytes(forget=True), time.perf_counter()
    if name == "default":
        plan = AdditiveCodec.plan(spec, config.bits)
        data = FitData(learn[:, None], torch.eye(spec.head_dim)[None], config.seed)
        unit = AdditiveCodec.fit(spec, plan, data)
        bits = AdditiveCodec.bits(spec, plan)
    else:
        rounds = int(PublishedKeyCodec.plan(spec, config.bits)["rounds"])
        books = em.fit_rounds(
            learn,
            rounds,
            _COUNT,
            em.Annealing(steps=config.steps),
            torch.Generator().manual_seed(config.seed),
            e_step=dense_e_step if name == "published-dense" else em.e_step,
        )
        bits = 12.0 * rounds / spec.head_dim
    seconds, peak = time.perf_counter() - began, peak_bytes() - before
    result: dict[str, Any] = {"impl": name, "bits_per_element": bits, "seconds": seconds}
    if name == "default":
        codec = AdditiveCodec.join(spec, plan, [unit])
        decoded = codec.decode(codec.encode(judge[None, None]))[0, 0]
    else:
        encode = dense_encode if name == "published-dense" else em.encode_round
        codes = _encode(judge, books, encode)
        decoded = _decode(books, codes)
        if name == "published-dense":
            result.update(books=books, codes=codes)
    spread = (judge - judge.mean(dim=0)).square().sum()
    result["mse_relative"] = float((decoded - judge).square().sum() / spread)
    result["peak_bytes"] = max(0, peak)
    return result


def _encode(rows: Tensor, books: Tensor, encode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Codes [rounds, n] of greedy rounds."""
    left, codes = rows, []
    for theta in books:
        codes.append(encode(left, theta))
        left = left - em.decode_round(theta, codes[-1])
    return torch.stack(codes)


def _decode(books: Tensor, codes: Tensor) -> Tensor:
    parts = [em.decode_round(theta, index) for theta, index in zip(books, codes, strict=True)]
    return torch.stack(parts).sum(dim=0)


def _agreement(rows: Tensor, books: Tensor, codes: Tensor) -> float:
    """How many codes of the held-out rows are the same by the product E-step."""
    return float((_encode(_split(rows)[1], books, em.encode_round) == codes).float().mean())


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to learn from, and rows to judge by."""
    judged = held_out(len(rows))
    return rows[~judged].contiguous(), rows[judged].contiguous()


def _warm_up() -> None:
    """Load what any fit needs, so that it is not counted as memory of the first."""
    x = torch.randn(64, 8)
    ops.additive_encode(x[None], torch.randn(1, 1, 1, 16, 8), 1)
    em.e_step(x, torch.randn(4, 8), 1.0)
    torch.linalg.solve(
        torch.eye(4, dtype=torch.complex128), torch.ones(4, 2, dtype=torch.complex128)
    )
