"""Fitted codecs of every preset with random codebooks: no fitting, but the real code paths."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from commvq_core.codecs.base import FitData
from commvq_core.codecs.digest import LayerCodecs
from commvq_core.codecs.registry import PRESETS
from commvq_core.models import describe_model
from commvq_core.sides import side_spec


def preset_codecs(model: PreTrainedModel, preset: str, bits: float = 1.0) -> LayerCodecs:
    """Codecs of a preset for every compressible layer, fitted to noise, quickly."""
    generator = torch.Generator().manual_seed(3)
    codecs = {}
    for layer in describe_model(model).compressible:
        pair = []
        for side, kind in zip(("key", "value"), PRESETS[preset], strict=True):
            spec = side_spec(layer, side)
            plan = kind.plan(spec, bits)
            plan.update({name: 1 for name in ("steps", "kmeans_iterations") if name in plan})
            rows = 3 * torch.randn(1100, spec.kv_heads, spec.head_dim, generator=generator)
            metric = torch.eye(spec.head_dim).expand(spec.kv_heads, -1, -1)
            heads = [slice(h, h + 1) for h in range(spec.kv_heads)]
            parts = heads if kind.unit == "head" else [slice(None)]
            units = [kind.fit(spec, plan, FitData(rows[:, p], metric[p], 0)) for p in parts]
            pair.append(kind.join(replace(spec), plan, units))
        codecs[layer.index] = (pair[0], pair[1])
    return codecs
