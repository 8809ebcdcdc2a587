"""Published quantizers as caches to compare with: the codecs of every layer of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from commvq_core.codecs.base import Codec, FitData
from commvq_core.codecs.rival import RivalCodec
from commvq_core.codecs.rivals import RIVALS
from commvq_core.errors import InputError
from commvq_core.sides import SIDES, Side, side_spec

if TYPE_CHECKING:
    from commvq_core.artifact import Artifact
    from commvq_core.calibration.store import CalibrationStore
    from commvq_core.models import AttentionSpec, LayerSpec

_TOKENS = 32_768  # of a calibration; KVQuant's own is 16 sequences of 2,048


def open_calibration(names: Sequence[str], path: Path | None) -> CalibrationStore | None:
    """The calibration that some of the codecs `names` learn from; None when none of them does.

    Raises InputError when one is needed and not given, or is no finished calibration.
    """
    needing = [name for name in names if name in RIVALS and RIVALS[name][0].needs_calibration]
    if not needing:
        return None
    if path is None:
        raise InputError(
            f"codec {needing[0]} learns its levels from a calibration",
            "give --calibration CALIB, a folder that commvq calibrate wrote for this model",
        )
    from commvq_core.calibration.store import CalibrationStore

    return CalibrationStore.open(path)


def rival_artifact(name: str, spec: AttentionSpec, store: CalibrationStore | None) -> Artifact:
    """The codecs called `name` for a model, as an artifact that is never written.

    `store` as from `open_calibration`. Raises InputError when it is of another model.
    """
    from commvq_core.artifact import Artifact

    method, width = RIVALS[name]
    if store is not None and method.needs_calibration:
        _check_model(store, spec)
    codecs: dict[int, tuple[Codec, Codec]] = {}
    for layer in spec.compressible:
        data = {side: _data(store, layer, side) for side in SIDES if method.needs_calibration}
        codecs[layer.index] = (
            method.key.make(side_spec(layer, "key"), width, data.get("key")),
            method.value.make(side_spec(layer, "value"), width, data.get("value")),
        )
    return Artifact(name, {}, spec, codecs)


def shared_bytes(artifact: Artifact) -> int:
    """What stays loaded for all layers together: a rotation that all share counts once."""
    held = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for pair in artifact.codecs.values()
        for codec in pair
        if isinstance(codec, RivalCodec)
        for tensor in codec.resident
    }
    return sum(held.values())


def _data(store: CalibrationStore | None, layer: LayerSpec, side: Side) -> FitData:
    from commvq_core.calibration.vectors import canonical_vectors, side_metric

    assert store is not None
    vectors = canonical_vectors(store, layer, side)
    vectors = vectors[:: -(-len(vectors) // _TOKENS)]
    return FitData(vectors, side_metric(store, layer, side), seed=0)


def _check_model(store: CalibrationStore, spec: AttentionSpec) -> None:
    if store.spec.fingerprint != spec.fingerprint:
        raise InputError(
            f"the calibration {store.path} is of another model, {store.manifest.model}",
            "give --calibration a folder that commvq calibrate wrote for this model",
        )
