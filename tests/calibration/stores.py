"""Small stores made by hand, and whole folders compared byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from commvq_core.calibration.manifest import Manifest
from commvq_core.calibration.store import CalibrationStore, LayerChunk
from commvq_core.models import AttentionSpec, LayerSpec


def attention_spec() -> AttentionSpec:
    """Three layers, of which the middle one is not compressible."""
    layers = tuple(
        LayerSpec(
            index=index,
            heads=4,
            kv_heads=2,
            head_dim=8,
            rotary_dim=8,
            pair_layout="half",
            sliding_window=16 if index == 1 else None,
            compressible=index != 1,
        )
        for index in range(3)
    )
    return AttentionSpec("llama", 32, 64, layers, "0" * 64)


def manifest(**changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "model": "someone/model",
        "spec": attention_spec().to_json(),
        "tokens": 64,
        "sample": 1.0,
        "seq_len": 16,
        "seed": 0,
        "dtype": "float16",
        "sources": ({"name": "builtin", "sha256": "0", "documents": 1, "characters": 9},),
        "token_sha256": "0",
        "chunk_sequences": 2,
        **changes,
    }
    per_chunk = settings["chunk_sequences"] * settings["seq_len"]
    return Manifest(chunks=-(-settings["tokens"] // per_chunk), **settings)


def layer_chunk(tokens: int, seed: int) -> LayerChunk:
    generator = torch.Generator().manual_seed(seed)
    return LayerChunk(
        keys=torch.randn(tokens, 2, 8, generator=generator),
        values=torch.randn(tokens, 2, 8, generator=generator),
        query_energy_sum=torch.rand(2, 4, generator=generator, dtype=torch.float64),
        query_count=tokens * 2,
    )


def fill(store: CalibrationStore, chunks: int | None = None) -> list[dict[int, LayerChunk]]:
    """Write `chunks` more chunks (default: all that are missing) and return everything written."""
    plan = store.manifest
    last = plan.chunks if chunks is None else plan.chunks_done + chunks
    written = []
    for chunk in range(plan.chunks_done, last):
        tokens = plan.chunk_tokens(chunk)
        layers = {
            layer.index: layer_chunk(tokens, 10 * chunk + layer.index) for layer in store.layers
        }
        store.write_chunk(chunk, layers)
        written.append(layers)
    return written


def finish(store: CalibrationStore) -> None:
    for layer in store.layers:
        statistics = {
            "query_energy": torch.ones(2, 4),
            "value_gram": torch.eye(8).expand(2, 8, 8) * layer.index,
        }
        store.write_statistics(layer.index, statistics)
    store.finish()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
