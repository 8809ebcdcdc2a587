"""Train codebooks: a loop over (layer, side, KV head) that fits, checkpoints and resumes.

Every unit is fitted alone, from a seed of its own, and written as soon as it is done. A run that
was killed therefore continues to the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commvq_core.calibration.store import CalibrationStore
from commvq_core.calibration.vectors import canonical_vectors, side_metric
from commvq_core.codecs.base import Codec, FitData
from commvq_core.codecs.registry import PRESETS
from commvq_core.engines import ENGINES, check_engine
from commvq_core.errors import InputError
from commvq_core.files import check_output, is_blank, remove_temporary, sha256_of_file
from commvq_core.progress import Progress, Silent
from commvq_core.run import Run, Unit
from commvq_core.sides import SIDES, Side, side_spec

_MOST_LAYERS = 10_000  # a slip of the hand must not fill the memory with numbers
_USAGE_ROWS = 4096  # enough for each of 256 codewords to be chosen some 16 times
_HELD_OUT = 16  # every 16th token measures and does not teach


@dataclass(frozen=True)
class TrainConfig:
    """What `commvq train-codebook` was asked for. `workers` 0 means every core.

    With `auto_bits` every layer's keys and values get their own share of so many bits on average
    (allocation.py), and `key_bits` and `value_bits` are not used.
    """

    key_bits: float = 1.0
    value_bits: float = 1.0
    auto_bits: float | None = None
    preset: str = "default"
    layers: tuple[int, ...] | None = None
    workers: int = 0
    engine: str = "local"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InputError(f"preset {self.preset!r} is not known", f"give {' or '.join(PRESETS)}")
        if self.auto_bits is not None and self.preset != "default":
            raise InputError(
                f"--bits auto shares out stages of the default preset, not of {self.preset}",
                "leave out --preset, or name the bits",
            )
        check_engine(self.engine)
        if self.workers < 0:
            raise InputError(f"--workers {self.workers}", "give 0 (every core) or more")


def parse_bits(text: str) -> tuple[float, float]:
    """ "1" -> (1.0, 1.0); "1,1.5" -> keys 1.0, values 1.5. Raises InputError."""
    parts = text.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0.25 <= n <= 4 for n in numbers):
        raise InputError(
            f"--bits {text} is not a number of bits",
            "give one number from 0.25 to 4, or two as K,V (keys, values)",
        )
    return numbers[0], numbers[-1]


def parse_auto(text: str) -> float | None:
    """ "auto:1.5" -> 1.5; None for any other text. Raises InputError."""
    kind, _, number = text.partition(":")
    if kind != "auto":
        return None
    try:
        bits = float(number)
    except ValueError:
        bits = 0.0
    if not 0.25 <= bits <= 4:
        raise InputError(f"--bits {text}", "give a number from 0.25 to 4, such as auto:1.0")
    return bits


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """ "0-3,7" -> (0, 1, 2, 3, 7); None -> None, every layer. Raises InputError."""
    if text is None:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"--layers {text} is not a list of layers", "write it like 0-3,7")
        stop = int(last) if dash else int(first)
        if stop >= _MOST_LAYERS:
            raise InputError(f"--layers {part}: no model has so many", "write it like 0-3,7")
        if stop < int(first):
            raise InputError(f"--layers {part} runs backwards", "write the smaller number first")
        chosen.update(range(int(first), stop + 1))
    return tuple(sorted(chosen))


def train_codebooks(
    calib: Path,
    out: Path,
    config: TrainConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit every unit that `out` lacks from the calibration folder `calib`.

    Returns {"run", "bits_per_element", "units", "distortion": {side: mean}, "seconds"}. Raises
    InputError for bad input, before anything is written.
    """
    progress = progress or Silent()
    started = time.monotonic()
    check_output(out, overwrite=overwrite, resume=resume)
    store = CalibrationStore.open(calib)
    resuming = resume and not is_blank(out)
    allocated = None
    if config.auto_bits is not None:
        allocated = _allocated(out if resuming else None, store, config.auto_bits, progress)
    settings = _settings(calib, store, config, allocated)
    if resuming:
        run = _resume(out, settings)
    else:
        run = Run.create(out, settings, store.spec)
    wanted = [u for u in run.units() if config.layers is None or u.layer in config.layers]
    missing = set(run.missing_units())
    todo = [unit for unit in wanted if unit in missing]
    # Absolute, since workers may start in another folder.
    fit = partial(fit_unit, calib.resolve(), out.resolve())
    done = len(wanted) - len(todo)
    with progress.task("fitting codebooks", total=len(wanted), unit="codebooks", done=done) as task:
        for unit, statistics in ENGINES[config.engine](fit, todo, config.workers):
            run.log({"unit": asdict(unit), **statistics})
            task.advance()
    return _summary(run, wanted, time.monotonic() - started)


def _allocated(
    out: Path | None, store: CalibrationStore, bits: float, progress: Progress
) -> dict[tuple[int, Side], dict[str, Any]]:
    """What `--bits auto` gives each side of each layer; a run that is resumed keeps its own."""
    if out is not None and Run.exists(out):
        run = Run.open(out)
        return {
            (layer.index, side): run.plan(layer.index, side)[1]
            for layer in run.spec.compressible
            for side in SIDES
        }
    from commvq_core.allocation import allocate_bits
    from commvq_core.models import load_model

    return allocate_bits(store, load_model(store.manifest.model, progress=progress), bits, progress)


def _settings(
    calib: Path,
    store: CalibrationStore,
    config: TrainConfig,
    allocated: Mapping[tuple[int, Side], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What decides the codebooks' bytes; two runs with equal settings are the same run."""
    known = {layer.index for layer in store.spec.compressible}
    unknown = sorted(set(config.layers or ()) - known)
    if unknown:
        raise InputError(
            f"layer {unknown[0]} is not among the model's compressible layers",
            f"choose from {', '.join(str(index) for index in sorted(known))}",
        )
    bits = {"key": config.key_bits, "value": config.value_bits}
    asked = bits if config.auto_bits is None else {"auto": config.auto_bits}
    kinds = dict(zip(SIDES, PRESETS[config.preset], strict=True))
    plans: dict[str, dict[str, Any]] = {}
    for layer in store.spec.compressible:
        plans[str(layer.index)] = {}
        for side in SIDES:
            if allocated is None:
                plan = kinds[side].plan(side_spec(layer, side), bits[side])
            else:
                plan = allocated[layer.index, side]
            least = kinds[side].least_tokens(plan)
            if store.token_count < least:
                raise InputError(
                    f"{calib} holds {store.token_count:,} tokens, these codebooks need {least:,}",
                    "calibrate with more --tokens, or ask for fewer --bits",
                )
            plans[str(layer.index)][side] = {"codec": kinds[side].name, "config": plan}
    return {
        "model": store.manifest.model,
        "preset": config.preset,
        "bits": asked,
        "seed": config.seed,
        "tokens": store.token_count,
        "calibration": sha256_of_file(calib / "manifest.json"),
        "layers": sorted(known),
        "plans": plans,
    }


def _resume(out: Path, settings: Mapping[str, Any]) -> Run:
    if not Run.exists(out):
        raise InputError(f"{out} holds no run to resume", "choose another --out")
    run = Run.open(out)
    for field, value in settings.items():
        if run.config.get(field) != value:
            raise InputError(
                f"{out} was begun with other settings ({field} differs)",
                "give the same settings, or --overwrite to start again",
            )
    remove_temporary(out)
    return run


def fit_unit(calib: Path, out: Path, unit: Unit) -> dict[str, float]:
    """Fit one unit and write it; returns its statistics. Runs in a worker process."""
    started = time.monotonic()
    store, run = CalibrationStore.open(calib), Run.open(out)
    layer = next(entry for entry in store.spec.layers if entry.index == unit.layer)
    spec = side_spec(layer, unit.side)
    kind, plan = run.plan(unit.layer, unit.side)
    heads = slice(None) if unit.head is None else slice(unit.head, unit.head + 1)
    vectors = canonical_vectors(store, layer, unit.side, heads)
    metric = side_metric(store, layer, unit.side)[heads]
    judged = held_out(len(vectors))
    data = FitData(vectors[~judged], metric, _seed(int(run.config["seed"]), unit))
    tensors = kind.fit(spec, plan, data)
    codec = kind.join(replace(spec, kv_heads=len(metric)), plan, [tensors])
    statistics = {
        "distortion": distortion(codec, vectors[judged], metric),
        "dead": dead_share(codec, vectors[~judged][:_USAGE_ROWS]),
        "seconds": time.monotonic() - started,
    }
    run.write_unit(unit, tensors, statistics)
    return statistics


def held_out(count: int) -> Tensor:
    """Which of `count` tokens measure and do not teach, bool [count]."""
    return torch.arange(count) % _HELD_OUT == _HELD_OUT - 1


def distortion(codec: Codec, vectors: Tensor, metric: Tensor) -> float:
    """Relative error under the metric: E[e' M e] / E[(x - mean)' M (x - mean)].

    `vectors` [n, heads, head_dim], `metric` [heads, head_dim, head_dim].
    """
    rows = vectors.transpose(0, 1)
    error = rows - codec.decode(codec.encode(rows[None]))[0]
    spread = rows - rows.mean(dim=1, keepdim=True)
    cost = torch.einsum("hnd,hde,hne->", error, metric, error)
    scale = torch.einsum("hnd,hde,hne->", spread, metric, spread)
    return float(cost / scale.clamp_min(1e-30))


def dead_share(codec: Codec, vectors: Tensor) -> float:
    """The share of codewords that no vector of [n, heads, head_dim] chose; 0 for other codecs."""
    found = codec.symbols(codec.encode(vectors.transpose(0, 1)[None]))
    if found is None:
        return 0.0
    symbols, size = found
    rows = symbols[0].transpose(1, 2).flatten(0, 1)  # a choice, its tokens
    used = sum(int(torch.bincount(row.int(), minlength=size).count_nonzero()) for row in rows)
    return 1.0 - used / (len(rows) * size)


def _seed(seed: int, unit: Unit) -> int:
    text = f"{seed}/{unit.layer}/{unit.side}/{unit.head}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _summary(run: Run, units: list[Unit], seconds: float) -> dict[str, Any]:
    by_side = {side: [run.statistic(unit) for unit in units if unit.side == side] for side in SIDES}
    kinds = []
    for layer in run.spec.compressible:
        for side in SIDES:
            kind, plan = run.plan(layer.index, side)
            weight = layer.kv_heads * layer.head_dim
            kinds.append((kind.bits(side_spec(layer, side), plan), weight))
    return {
        "run": str(run.path),
        "bits_per_element": sum(b * w for b, w in kinds) / sum(w for _, w in kinds),
        "units": len(units),
        "distortion": {side: sum(v) / len(v) if v else None for side, v in by_side.items()},
        "seconds": seconds,
    }
