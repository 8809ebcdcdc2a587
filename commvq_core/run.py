"""The RUN folder: one safetensors file a unit of fitting, a plan, and a log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from commvq_core.codecs.base import Codec, FittedCodec
from commvq_core.codecs.registry import CODECS
from commvq_core.errors import InputError
from commvq_core.files import (
    append_line,
    clear_output,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from commvq_core.models import AttentionSpec, LayerSpec
from commvq_core.sides import SIDES, Side, side_spec

FORMAT = "commvq-run"
VERSION = 1
_CONFIG = "run.json"
_LOG = "log.jsonl"


@dataclass(frozen=True)
class Unit:
    """One piece of fitting: the keys or values of a KV head, or of a layer (`head` None)."""

    layer: int
    side: Side
    head: int | None

    @property
    def filename(self) -> str:
        """Its file in the run folder."""
        part = "heads" if self.head is None else f"head_{self.head:02d}"
        return f"layer_{self.layer:03d}.{self.side}.{part}.safetensors"


class Run:
    """A run folder. `config` is run.json: model, training settings and the plan of each layer."""

    def __init__(self, path: Path, config: dict[str, Any], spec: AttentionSpec) -> None:
        self.path, self.config, self.spec = path, config, spec

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], spec: AttentionSpec) -> Run:
        """Begin a run folder by writing run.json, in place of a run that is at `path`.

        Raises InputError, removing nothing, when something else is.
        """
        clear_output(path, _CONFIG, "run")
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
        if config.get("format") != FORMAT:
            raise InputError(f"{path} is not a run", "give a folder made by commvq train-codebook")
        version = config.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise InputError(
                f"{path} has format version {version}, this release reads up to {VERSION}",
                "upgrade commvq",
            )
        try:
            spec = AttentionSpec.from_json(config["attention"])
            run = cls(path, config, spec)
            for field in ("model", "preset", "bits", "tokens", "seed"):
                config[field]
            for layer in spec.compressible:
                for side in SIDES:
                    kind, plan = run.plan(layer.index, side)
                    kind.bits(side_spec(layer, side), plan)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path / _CONFIG} is damaged ({error!r})", "train again") from error
        return run

    def plan(self, layer: int, side: Side) -> tuple[type[FittedCodec], dict[str, Any]]:
        """Which codec one side of a layer gets, and its config."""
        entry = self.config["plans"][str(layer)][side]
        kind = CODECS[entry["codec"]]
        if not issubclass(kind, FittedCodec):
            raise TypeError(f"codec {kind.name} is not fitted")
        return kind, entry["config"]

    def units(self) -> list[Unit]:
        """Every unit that a whole artifact needs, in order."""
        return [
            unit
            for layer in self.spec.compressible
            for side in SIDES
            for unit in self.units_of(layer, side)
        ]

    def units_of(self, layer: LayerSpec, side: Side) -> list[Unit]:
        """The units of one side of a layer, in order."""
        kind, _ = self.plan(layer.index, side)
        if kind.unit == "layer":
            return [Unit(layer.index, side, None)]
        return [Unit(layer.index, side, head) for head in range(layer.kv_heads)]

    def missing_units(self) -> list[Unit]:
        """The units that are not there yet."""
        return [unit for unit in self.units() if not (self.path / unit.filename).is_file()]

    def write_unit(
        self, unit: Unit, tensors: Mapping[str, Tensor], statistics: Mapping[str, float]
    ) -> None:
        """Store a fitted unit, atomically. Statistics that vary from run to run go to the log."""
        kept = {name: float(value) for name, value in statistics.items() if name != "seconds"}
        # One entry: safetensors writes several in an order that changes from run to run.
        metadata = {"statistics": json.dumps(kept, sort_keys=True)}
        write_tensors(self.path / unit.filename, tensors, metadata)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to log.jsonl."""
        append_line(self.path / _LOG, json.dumps(dict(record)))

    def statistic(self, unit: Unit, name: str = "distortion") -> float:
        """What the fit measured: "distortion" is the held-out relative error under the metric,
        "dead" the share of codewords that nothing uses."""
        from safetensors import safe_open

        try:
            with safe_open(self.path / unit.filename, framework="pt") as handle:
                return float(json.loads((handle.metadata() or {})["statistics"])[name])
        except Exception as error:
            raise InputError(
                f"{self.path / unit.filename} is not a readable unit ({error})",
                "delete it and run commvq train-codebook --resume",
            ) from error

    def codec(self, layer: LayerSpec, side: Side) -> tuple[Codec, float]:
        """A layer's codec from its units, and its mean distortion."""
        kind, plan = self.plan(layer.index, side)
        units = self.units_of(layer, side)
        tensors = [read_tensors(self.path / unit.filename, "the run") for unit in units]
        distortion = sum(self.statistic(unit) for unit in units) / len(units)
        try:
            return kind.join(side_spec(layer, side), plan, tensors), distortion
        except ValueError as error:
            raise InputError(
                f"{self.path}, layer {layer.index}, {side}s: {error}",
                "delete the layer's files and run commvq train-codebook --resume",
            ) from error
