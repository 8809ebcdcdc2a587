"""`--bits auto:B`: stages for each layer's keys and values, from what errors do to the model.

For every side of every layer: a quick codebook gives its error at each number of stages, and one
forward pass, with that side alone as codes, gives the divergence from the exact model at one
number. Divergence grows in proportion to the error and nearly adds up over sides and layers, so
the two give the cost of every choice and `fit.allocate` spends the budget.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commvq_core.calibration.data import iter_documents, tokenize_sequences
from commvq_core.calibration.store import CalibrationStore
from commvq_core.calibration.vectors import canonical_vectors, side_metric
from commvq_core.codecs.additive import AdditiveCodec, AdditiveConfig
from commvq_core.codecs.base import FitData
from commvq_core.codecs.digest import LayerCodecs
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.errors import InputError
from commvq_core.evaluation.metrics import token_kl
from commvq_core.fit.allocate import Item, allocate
from commvq_core.fit.kmeans import nearest
from commvq_core.models import LayerSpec
from commvq_core.progress import Progress, Silent
from commvq_core.sides import SIDES, Side, side_spec

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

Place = tuple[int, Side]

_FIT_TOKENS = 16_384  # for the quick codebooks: with fewer, later stages seem to gain nothing
_TEXT_TOKENS = 1024  # of the calibration's text, for the forward passes
_WINDOW = 32  # short, so that a short text is mostly codes
_MOST_BITS = 4.0


def allocate_bits(
    store: CalibrationStore, loaded: LoadedModel, bits: float, progress: Progress | None = None
) -> dict[Place, dict[str, Any]]:
    """Configs of the additive codec for every side of every layer, `bits` an element on average.

    Deterministic in the calibration and the model. Raises InputError for bits that no geometry
    reaches and for a model or text that is not the calibration's.
    """
    progress = progress or Silent()
    if loaded.spec.fingerprint != store.spec.fingerprint:
        raise InputError(
            f"{loaded.source} is not the model that was calibrated", "calibrate this model again"
        )
    places = [(layer, side) for layer in store.layers for side in SIDES]
    ids = _text(store, loaded)
    exact = _logits(loaded, ids, {})
    items: dict[Place, Item] = {}
    plans: dict[Place, AdditiveConfig] = {}
    with progress.task("measuring sensitivity", total=len(places), unit="sides") as task:
        for layer, side in places:
            probe, curve, plan = _quick(store, layer, side, bits)
            other = IdentityCodec(side_spec(layer, "value" if side == "key" else "key"))
            pair = (probe, other) if side == "key" else (other, probe)
            logits = _logits(loaded, ids, {layer.index: pair})
            divergence = float(token_kl(exact, logits)[2 * _WINDOW :].double().mean())
            at = curve[plan.stages - 1]
            spec = side_spec(layer, side)
            per_stage = 8 * layer.kv_heads * (spec.head_dim // plan.sub_dim)
            key = (layer.index, side)
            plans[key] = plan
            items[key] = Item(tuple(divergence * error / at for error in curve), per_stage)
            task.advance()
    scalars = sum(2 * layer.kv_heads * layer.head_dim for layer in store.layers)
    chosen = allocate(items, bits * scalars)
    return {key: {**asdict(plan), "stages": chosen[key]} for key, plan in plans.items()}


def _quick(
    store: CalibrationStore, layer: LayerSpec, side: Side, bits: float
) -> tuple[AdditiveCodec, list[float], AdditiveConfig]:
    """A rough codec near `bits`, its relative error after each stage, and the codec's config."""
    spec = side_spec(layer, side)
    width = AdditiveCodec.plan(spec, _MOST_BITS)["sub_dim"]
    most = int(_MOST_BITS * width / 8)
    rough = AdditiveConfig(sub_dim=width, stages=most, rounds=0, kmeans_iterations=4, beam=1)
    vectors = canonical_vectors(store, layer, side)[:_FIT_TOKENS]
    metric = side_metric(store, layer, side)
    learn = torch.arange(len(vectors)) % 8 != 7
    units = [
        AdditiveCodec.fit(
            spec, asdict(rough), FitData(vectors[learn, h : h + 1], metric[h : h + 1], seed=h)
        )
        for h in range(layer.kv_heads)
    ]
    whole = AdditiveCodec.join(spec, asdict(rough), units)
    curve = _curve(whole, vectors[~learn])
    stages = min(most, max(1, round(bits * width / 8)))
    plan = AdditiveConfig(sub_dim=width, stages=stages)
    cut = asdict(AdditiveConfig(sub_dim=width, stages=stages, beam=1))
    by_stage = ("codebooks", "gains", "scales")
    kept = {
        name: tensor[:, :, :stages].contiguous() if name in by_stage else tensor
        for name, tensor in whole.tensors().items()
    }
    return AdditiveCodec.from_tensors(spec, cut, kept), curve, plan


def _curve(codec: AdditiveCodec, vectors: Tensor) -> list[float]:
    """Error after each stage, encoded greedily, to the variance; mean over heads."""
    books = codec.books.codebooks
    heads, subs, stages, _, width = books.shape
    left = codec.transformed(vectors.transpose(0, 1)).unflatten(-1, (subs, width))
    spread = (left - left.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2, 3)).clamp_min(1e-30)
    curve = []
    for stage in range(stages):
        for head in range(heads):
            for sub in range(subs):
                book = books[head, sub, stage]
                rows = left[head, :, sub]
                left[head, :, sub] = rows - book[nearest(rows.contiguous(), book.contiguous())]
        curve.append(float((left.square().sum(dim=(1, 2, 3)) / spread).mean()))
    return curve


def _text(store: CalibrationStore, loaded: LoadedModel) -> Tensor:
    sources = [str(source["name"]) for source in store.manifest.sources]
    # Not longer than the calibration's sequences, which the model is known to take.
    tokens = min(_TEXT_TOKENS, store.manifest.tokens, store.manifest.seq_len)
    if tokens < 4 * _WINDOW:
        raise InputError(
            f"sequences of {tokens} tokens are too short to measure what bits are worth",
            f"calibrate with a --seq-len of at least {4 * _WINDOW}, or name the bits",
        )
    (ids,) = tokenize_sequences(
        loaded.tokenizer, iter_documents(sources), tokens=tokens, seq_len=tokens
    )
    return ids


def _logits(loaded: LoadedModel, ids: Tensor, codecs: LayerCodecs) -> Tensor:
    """Logits [tokens, vocabulary] with codes in these layers alone."""
    from commvq_core.cache.cache import CommVQCache

    with (
        torch.inference_mode(),
        CommVQCache(loaded.model, codecs, window=_WINDOW, strict=True) as cache,
    ):
        output = loaded.model(input_ids=ids[None].to(loaded.model.device), past_key_values=cache)
    return output.logits[0]
