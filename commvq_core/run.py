"""The RUN folder: one safetensors file a unit of fitting, a plan, and a log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from commvq_core.codecs.base import Codec, FittedCodec
from commvq_core.codecs.registry import CODECS
from commvq_core.errors import InputError
from commvq_core.files import read_json, read_tensors, write_json, write_tensors
from commvq_core.models import AttentionSpec, LayerSpec
from commvq_core.sides import SIDES, Side, side_spec

FORMAT = "commvq-run"
VERSION = 1
_CONFIG = "run.json"
_LOG = "log.jsonl"


@dataclass(frozen=True, order=True)
class Unit:
    """One piece of fitting: the codebooks of a KV head's keys or values."""

    layer: int
    side: Side
    head: int

    @property
    def filename(self) -> str:
        """Its file in the run folder."""
        return f"layer_{self.layer:03d}.{self.side}.head_{self.head:02d}.safetensors"


class Run:
    """A run folder. `config` is run.json: model, training settings and the plan of each layer."""

    def __init__(self, path: Path, config: dict[str, Any], spec: AttentionSpec) -> None:
        self.path, self.config, self.spec = path, config, spec

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], spec: AttentionSpec) -> Run:
        """Begin a run folder by writing run.json."""
        full = {"format": FORMAT, "version": VERSION, **config, "attention": spec.to_json()}
        write_json(path / _CONFIG, full)
        return cls(path, full, spec)

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether a run was begun at `path`."""
        return (path / _CONFIG).is_file()

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open a run folder, finished or not. Raises InputError for anything else."""
        config = read_json(path / _CONFIG, "a run of commvq train-codebook")
        if config.get("format") != FORMAT or config.get("version", VERSION + 1) > VERSION:
            raise InputError(
                f"{path} is not a run that this release reads",
                "give a folder made by commvq train-codebook",
            )
        try:
            spec = AttentionSpec.from_json(config["attention"])
            for key in ("model", "preset", "plans", "layers"):
                config[key]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path / _CONFIG} is damaged ({error!r})", "train again") from error
        return cls(path, config, spec)

    def plans(self) -> dict[int, dict[str, Any]]:
        """{layer index: {"key": {"codec", "config"}, "value": ...}}."""
        return {int(index): plan for index, plan in self.config["plans"].items()}

    def units(self) -> list[Unit]:
        """Every unit that a whole artifact needs, in order."""
        return [
            Unit(layer.index, side, head)
            for layer in self.spec.compressible
            for side in SIDES
            for head in range(layer.kv_heads)
        ]

    def missing_units(self) -> list[Unit]:
        """The units that are not there yet."""
        return [unit for unit in self.units() if not (self.path / unit.filename).is_file()]

    def write_unit(
        self, unit: Unit, tensors: Mapping[str, Tensor], statistics: Mapping[str, float]
    ) -> None:
        """Store a fitted unit, atomically. Statistics that vary from run to run go to the log."""
        kept = {name: repr(float(value)) for name, value in statistics.items() if name != "seconds"}
        write_tensors(self.path / unit.filename, tensors, kept)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to log.jsonl."""
        line = (json.dumps(dict(record)) + "\n").encode()
        descriptor = os.open(self.path / _LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line)  # one write: lines of several writers do not mix
        finally:
            os.close(descriptor)

    def distortion(self, unit: Unit) -> float:
        """Held-out relative error of a unit under its metric."""
        from safetensors import safe_open

        try:
            with safe_open(self.path / unit.filename, framework="pt") as handle:
                return float((handle.metadata() or {})["distortion"])
        except Exception as error:
            raise InputError(
                f"{self.path / unit.filename} is not a readable unit ({error})",
                "delete it and run commvq train-codebook --resume",
            ) from error

    def codec(self, layer: LayerSpec, side: Side) -> tuple[Codec, float]:
        """A layer's codec from its units, and its mean distortion."""
        plan = self.plans()[layer.index][side]
        kind = CODECS[plan["codec"]]
        assert issubclass(kind, FittedCodec)
        units = [Unit(layer.index, side, head) for head in range(layer.kv_heads)]
        tensors = [read_tensors(self.path / unit.filename, "the run") for unit in units]
        distortion = sum(self.distortion(unit) for unit in units) / len(units)
        try:
            return kind.join(side_spec(layer, side), plan["config"], tensors), distortion
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{self.path}, layer {layer.index}, {side}s: {error}",
                "delete the layer's files and run commvq train-codebook --resume",
            ) from error
