"""What a calibration, a run or an artifact holds, as one JSON object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from commvq_core.artifact import load_artifact
from commvq_core.calibration.store import CalibrationStore
from commvq_core.errors import InputError
from commvq_core.run import Run
from commvq_core.sides import SIDES, side_spec


def inspect_path(path: Path) -> dict[str, Any]:
    """{"kind": "calibration" | "run" | "artifact", facts..., "layers": [one dict a layer]}.

    Raises InputError when `path` is none of the three, or a damaged one.
    """
    if (path / "run.json").is_file():
        return _inspect_run(Run.open(path))
    if (path / "manifest.json").is_file():
        return _inspect_calibration(CalibrationStore.open(path, require_complete=False))
    if (path / "config.json").is_file():
        return _inspect_artifact(path)
    raise InputError(
        f"{path} holds no calibration, run or artifact",
        "give a folder written by commvq calibrate, train-codebook or export",
    )


def _inspect_calibration(store: CalibrationStore) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "kind": "calibration",
        "model": manifest.model,
        "complete": manifest.complete,
        "tokens": store.token_count,
        "sources": [source.get("name") for source in manifest.sources],
        "seed": manifest.seed,
        "fingerprint": store.spec.fingerprint,
        "layers": [
            {
                "layer": layer.index,
                "heads": layer.heads,
                "kv_heads": layer.kv_heads,
                "head_dim": layer.head_dim,
                "rotary_dim": layer.rotary_dim,
                "pairs": layer.pair_layout,
                "compressible": layer.compressible,
            }
            for layer in store.spec.layers
        ],
    }


def _inspect_run(run: Run) -> dict[str, Any]:
    units, missing = run.units(), set(run.missing_units())
    layers = []
    for layer in run.spec.compressible:
        row: dict[str, Any] = {"layer": layer.index}
        for side in SIDES:
            own = [unit for unit in units if unit.layer == layer.index and unit.side == side]
            done = [unit for unit in own if unit not in missing]
            kind, plan = run.plan(layer.index, side)
            row[f"{side}_units"] = f"{len(done)}/{len(own)}"
            row[f"{side}_bits"] = kind.bits(side_spec(layer, side), plan)
            heads = [run.statistic(unit) for unit in done]
            row[f"{side}_distortion"] = sum(heads) / len(heads) if heads else None
            row[f"{side}_distortion_heads"] = heads
            dead = [run.statistic(unit, "dead") for unit in done]
            row[f"{side}_dead"] = sum(dead) / len(dead) if dead else None
        layers.append(row)
    return {
        "kind": "run",
        "model": run.config["model"],
        "preset": run.config["preset"],
        "bits": run.config["bits"],
        "tokens": run.config["tokens"],
        "seed": run.config["seed"],
        "units": len(units),
        "missing": len(missing),
        "layers": layers,
    }


def _inspect_artifact(path: Path) -> dict[str, Any]:
    artifact = load_artifact(path)
    entries = {entry["index"]: entry for entry in artifact.config["layers"]}
    layers = []
    for index, pair in artifact.codecs.items():
        row: dict[str, Any] = {"layer": index}
        for side, codec in zip(SIDES, pair, strict=True):
            row[f"{side}_codec"] = codec.name
            row[f"{side}_bits"] = codec.bits_per_element
            row[f"{side}_resident_bytes"] = codec.resident_bytes
            row[f"{side}_distortion"] = entries[index][side].get("distortion")
        layers.append(row)
    uncompressed = [layer.index for layer in artifact.spec.layers if not layer.compressible]
    return {
        "kind": "artifact",
        "name": artifact.name,
        "model": artifact.config.get("model"),
        "preset": artifact.config.get("preset"),
        "bits_per_element": artifact.bits_per_element,
        "resident_bytes": artifact.resident_bytes,
        "layers_with_their_own_cache": uncompressed,
        "fingerprint": artifact.fingerprint,
        "layers": layers,
    }
