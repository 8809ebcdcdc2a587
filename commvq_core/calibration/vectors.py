"""What a fit learns from, out of a calibration: canonical vectors and their metric."""

from __future__ import annotations

from torch import Tensor

from commvq_core.calibration.store import CalibrationStore
from commvq_core.fit.metric import key_metric, value_metric
from commvq_core.models import LayerSpec
from commvq_core.rope import to_pairs
from commvq_core.sides import Side

MOST_TOKENS = 1 << 17  # twice the default calibration; 64 MiB a head of 128 dims


def canonical_vectors(
    store: CalibrationStore, layer: LayerSpec, side: Side, heads: slice = slice(None)
) -> Tensor:
    """One side of a layer, float32 [tokens, heads, head_dim]; keys before RoPE, in pairs.

    At most MOST_TOKENS of them, so that the memory of a fit does not grow with the calibration.
    """
    vectors = store.load(layer.index, side, heads, MOST_TOKENS).float()
    if side == "value":
        return vectors
    return to_pairs(vectors, rotary_dim=layer.rotary_dim, layout=layer.pair_layout)


def side_metric(store: CalibrationStore, layer: LayerSpec, side: Side) -> Tensor:
    """What an error costs, [kv_heads, head_dim, head_dim]; see fit.metric."""
    if side == "key":
        return key_metric(store.query_energy(layer.index))
    return value_metric(store.value_gram(layer.index))
