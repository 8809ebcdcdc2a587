"""The caches that an evaluation compares."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commvq_core.cache.backends import BACKENDS, check_backend
from commvq_core.codecs.digest import codecs_sha256
from commvq_core.codecs.rivals import RIVALS
from commvq_core.errors import InputError
from commvq_core.evaluation.rivals import open_calibration, rival_artifact, shared_bytes
from commvq_core.sides import SIDES, Side

if TYPE_CHECKING:
    from commvq_core.artifact import Artifact
    from commvq_core.calibration.store import CalibrationStore
    from commvq_core.models import LoadedModel

BASELINE = "fp16"

# "hf-quanto-2" -> backend and width of a quantized cache of transformers' own.
_OWN = {
    f"hf-{name}-{width}": (name, width)
    for name, backend in BACKENDS.items()
    for width in backend.widths
}


@dataclass(frozen=True)
class EvalCodec:
    """One way to store a cache.

    `open(strict)` is a context manager that gives a fresh cache for one example, with `nbytes`.
    `identity` tells this codec from every other: it decides whether --resume may use old records.
    `own_cache` are the layers that keep transformers' own cache, which bits and bytes of codebooks
    leave out.
    """

    name: str
    bits_per_element: float
    resident_bytes: int
    identity: dict[str, Any]
    open: Callable[[bool], AbstractContextManager[Any]]
    own_cache: tuple[int, ...] = ()


def resolve_codecs(
    loaded: LoadedModel,
    *,
    artifacts: Mapping[str, Artifact] | None = None,
    names: Sequence[str] = (),
    window: int = 128,
    sinks: int = 4,
    only: Side | None = None,
    calibration: Path | None = None,
) -> list[EvalCodec]:
    """The fp16 cache first, always; then the other named codecs; then one codec an artifact.

    `artifacts` as from `load_artifacts`; `calibration` is what KVQuant's levels are learnt from.
    With `only`, that side alone is codes and the other exact, which tells what each costs; bits are
    then that side's. Raises InputError for an unknown name, an artifact or calibration of another
    model, and as `check_codecs` does.
    """
    store = check_codecs(names, calibration, only)
    codecs = [_half_precision(loaded)]
    for name in dict.fromkeys(names):
        if name in RIVALS:
            rival = rival_artifact(name, loaded.spec, store)
            codec = _from_artifact(loaded, name, rival, window, sinks, only)
            held = shared_bytes(rival if only is None else rival.only(only))
            codecs.append(dataclasses.replace(codec, resident_bytes=held))
        elif name in _OWN:
            codecs.append(_transformers_own(loaded, name))
    for source, artifact in (artifacts or {}).items():
        codec = _from_artifact(loaded, source, artifact, window, sinks, only)
        if any(codec.name == other.name for other in codecs):
            codec = dataclasses.replace(codec, name=f"{codec.name}:{source}")
        codecs.append(codec)
    return codecs


def load_artifacts(sources: Sequence[str | Path]) -> dict[str, Artifact]:
    """Artifacts by the name that the user gave; raises InputError for one that is damaged."""
    from commvq_core.artifact import load_artifact

    return {str(source): load_artifact(source) for source in sources}


def parse_side(text: str | None) -> Side | None:
    """ "key" or "value", or None for both. Raises InputError."""
    for side in SIDES:
        if text == side:
            return side
    if text is not None:
        raise InputError(f"--only {text} is not a side", f"give {' or '.join(SIDES)}")
    return None


def check_codecs(
    names: Sequence[str], calibration: Path | None = None, only: Side | None = None
) -> CalibrationStore | None:
    """Raise InputError for a codec that can't run: unknown, or something it needs is not there.

    Returns the calibration, opened, if one of them learns from it.
    """
    for name in names:
        if name not in (BASELINE, *RIVALS, *_OWN):
            raise InputError(
                f"codec {name} is not known",
                f"give one of {', '.join((BASELINE, *RIVALS, *_OWN))}, or a folder to --codebook",
            )
        if name in _OWN:
            check_backend(_OWN[name][0])
            if only is not None:
                raise InputError(f"--only {only}: {name} codes both sides", f"leave out {name}")
    return open_calibration(names, calibration)


def _half_precision(loaded: LoadedModel) -> EvalCodec:
    from commvq_core.cache.half import HalfPrecisionCache

    @contextlib.contextmanager
    def fresh(strict: bool) -> Iterator[Any]:
        yield HalfPrecisionCache(loaded.model)

    return EvalCodec(BASELINE, 16.0, 0, {"codec": BASELINE}, fresh)


def _transformers_own(loaded: LoadedModel, name: str) -> EvalCodec:
    from commvq_core.cache.quantized import GROUP, RESIDUAL, bits_per_element, own_quantized_cache

    backend, width = _OWN[name]
    settings = {"group": GROUP, "window": RESIDUAL, "sinks": 0}
    return EvalCodec(
        name,
        bits_per_element(loaded.model, backend, width),
        0,
        {"codec": name, **settings},
        lambda strict: own_quantized_cache(loaded.model, backend, width, strict),
    )


def _from_artifact(
    loaded: LoadedModel, source: str, artifact: Artifact, window: int, sinks: int, only: Side | None
) -> EvalCodec:
    from commvq_core.cache.cache import CommVQCache
    from commvq_core.cache.half import half_dtype

    artifact.check_fits(loaded.spec)
    if only is not None:
        artifact = artifact.only(only)

    def fresh(strict: bool) -> AbstractContextManager[Any]:
        return CommVQCache.from_pretrained(
            artifact,
            loaded.model,
            window=window,
            sinks=sinks,
            strict=strict,
            exact_dtype=half_dtype(loaded.model),
            keep_decoded=source in RIVALS,  # their codes have no operator for attention
        )

    identity = {
        "codec": artifact.name,
        "source": source,
        "sha256": codecs_sha256(artifact.codecs),
        "window": window,
        "sinks": sinks,
    }
    if source in RIVALS:
        first = next(iter(artifact.codecs.values()))
        identity["settings"] = {codec.spec.side: codec.config() for codec in first}
    return EvalCodec(
        artifact.name,
        artifact.bits_per_element,
        artifact.resident_bytes,
        identity,
        fresh,
        own_cache=tuple(
            layer.index
            for layer in artifact.spec.layers
            if layer.index not in artifact.coded_layers
        ),
    )
