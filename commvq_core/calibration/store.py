"""The CALIB folder: keys and values of every layer on disk, chunk by chunk.

::

    manifest.json
    layer_000/chunk_00000.safetensors   keys, values [n, kv_heads, head_dim], fp16 or bf16;
                                        query_energy_sum [kv_heads, head_dim/2] float64,
                                        query_count [1] int64
    layer_000/statistics.safetensors    query_energy [kv_heads, head_dim/2] float32,
                                        value_gram [kv_heads, head_dim, head_dim] float32

Keys are stored before RoPE, in the model's own order of dims. A shard is written whole or not at
all and the manifest counts a chunk only when all its shards are, so an interrupted run can go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from commvq_core.calibration.manifest import Manifest
from commvq_core.errors import InputError
from commvq_core.files import (
    check_output,
    clear_output,
    is_blank,
    read_json,
    read_tensors,
    remove_temporary,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from commvq_core.models import AttentionSpec, LayerSpec

MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
_MAKE = "the calibration"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class LayerChunk:
    """What one layer did in one chunk.

    `keys`, `values` [n, kv_heads, head_dim] floating point, keys before RoPE; `query_energy_sum`
    [kv_heads, head_dim/2] float64, the sum of |q_pair|^2 over `query_count` queries.
    """

    keys: Tensor
    values: Tensor
    query_energy_sum: Tensor
    query_count: int


class CalibrationStore:
    """A CALIB folder, being written (`create`, `open(require_complete=False)`) or read (`open`)."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.spec: AttentionSpec = manifest.attention
        self._layers = {layer.index: layer for layer in self.spec.compressible}

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> CalibrationStore:
        """Start an empty store. Raises InputError when something is at `path` already."""
        check_output(path, overwrite=False)
        write_json(path / MANIFEST, manifest.to_json())
        return cls(path, manifest)

    @classmethod
    def open(cls, path: Path, *, require_complete: bool = True) -> CalibrationStore:
        """Open a store and check that every shard it counts is there, whole and of its shape.

        Raises InputError for a folder that is no CALIB, a run that is not finished (unless
        `require_complete` is False), and a shard that is missing or damaged.
        """
        if not (path / MANIFEST).is_file():
            what = "is no calibration" if path.exists() else "does not exist"
            raise InputError(f"{path} {what}", "give a folder that `calibrate` wrote")
        place = path / MANIFEST
        store = cls(path, Manifest.from_json(read_json(place, _MAKE), str(place)))
        if require_complete and not store.manifest.complete:
            done, chunks = store.manifest.chunks_done, store.manifest.chunks
            raise InputError(
                f"the calibration {path} is not finished ({done} of {chunks} chunks)",
                "run the same `calibrate` command again with --resume",
            )
        store._check_shards()
        return store

    @classmethod
    def clear(cls, path: Path) -> None:
        """Remove a CALIB folder to make room for another.

        Raises InputError, and removes nothing, when `path` holds anything but a calibration.
        """
        clear_output(path, MANIFEST, "calibration")

    @staticmethod
    def is_blank(path: Path) -> bool:
        """Whether nothing is at `path`, or a folder without files of anyone's."""
        return is_blank(path)

    def remove_temporary_files(self) -> None:
        """Remove what a killed run was in the middle of writing."""
        for folder in [self.path, *self.path.glob("layer_*")]:
            remove_temporary(folder)

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers that are stored."""
        return tuple(self._layers.values())

    @property
    def token_count(self) -> int:
        """How many tokens are stored for each layer."""
        return sum(self.manifest.chunk_tokens(c) for c in range(self.manifest.chunks_done))

    def write_chunk(self, chunk: int, layers: Mapping[int, LayerChunk]) -> None:
        """Write the next chunk, one shard a layer, then count it in the manifest.

        Raises InputError when the disk is full or a layer's keys or values are not finite; the
        chunks written before are whole then.
        """
        assert chunk == self.manifest.chunks_done, "chunks are written in order"
        assert layers.keys() == self._layers.keys(), "a chunk holds every stored layer"
        dtype = _DTYPES[self.manifest.dtype]
        for index, layer in layers.items():
            tensors = {
                "keys": narrow(layer.keys, dtype, f"keys of layer {index}"),
                "values": narrow(layer.values, dtype, f"values of layer {index}"),
                "query_energy_sum": layer.query_energy_sum.double(),
                "query_count": torch.tensor([layer.query_count]),
            }
            write_tensors(self._shard(index, chunk), tensors)
        self._write_manifest(self.manifest.chunk_done())

    def write_statistics(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a layer's `query_energy` and `value_gram` (see the shapes above)."""
        spec = self._layers[layer]
        shapes = _statistics_shapes(spec)
        assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
        write_tensors(
            self._folder(layer) / STATISTICS, {name: t.float() for name, t in tensors.items()}
        )

    def finish(self) -> None:
        """Mark the calibration complete. Every chunk and statistic must be written."""
        assert self.manifest.chunks_done == self.manifest.chunks
        self._write_manifest(replace(self.manifest, complete=True))

    def load(
        self,
        layer: int,
        side: Literal["key", "value"],
        heads: slice = slice(None),
        most: int | None = None,
    ) -> Tensor:
        """Stored keys or values of a layer, [tokens, heads, head_dim].

        All tokens, or at most `most` of them, evenly spread; read shard by shard, so that the
        memory is that of the result. The dtype is the manifest's; float32 where some chunks had to
        be stored as bf16 because they overflowed fp16.
        """
        from safetensors import safe_open

        spec, name = self._layers[layer], f"{side}s"
        paths = [self._shard(layer, chunk) for chunk in range(self.manifest.chunks_done)]
        dtypes = set()
        for path in paths:
            with safe_open(path, "pt") as shard:
                dtypes.add(_STORED[shard.get_slice(name).get_dtype()])
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        step = 1 if most is None else -(-self.token_count // most)
        count = len(range(spec.kv_heads)[heads])
        # Filled in place: joining a list of chunks would need the memory twice.
        result = torch.empty(-(-self.token_count // step), count, spec.head_dim, dtype=dtype)
        seen = filled = 0
        for path in paths:
            with safe_open(path, "pt") as shard:
                part = shard.get_slice(name)[:, heads]
            kept = part[-seen % step :: step]
            result[filled : filled + len(kept)] = kept
            seen, filled = seen + len(part), filled + len(kept)
        return result

    def query_energy(self, layer: int) -> Tensor:
        """[kv_heads, head_dim/2] float32: the mean of |q_pair|^2 over a KV head's query heads.

        Pairs are in canonical order (rope.to_pairs) and queries are taken before RoPE's scale.
        """
        return self._statistics(layer)["query_energy"]

    def value_gram(self, layer: int) -> Tensor:
        """[kv_heads, head_dim, head_dim] float32: what o_proj does to an error of the values.

        The sum over a KV head's query heads h of W_h^T W_h, with W_h the columns of o_proj that
        head h feeds: |W_h e|^2 summed over h is e^T gram e.
        """
        return self._statistics(layer)["value_gram"]

    def query_sums(self, layer: int) -> tuple[Tensor, int]:
        """The sum of |q_pair|^2 over all chunks, [kv_heads, head_dim/2] float64, and the count."""
        spec = self._layers[layer]
        total, count = torch.zeros(spec.kv_heads, spec.head_dim // 2, dtype=torch.float64), 0
        for chunk in range(self.manifest.chunks_done):
            tensors = read_tensors(self._shard(layer, chunk), _MAKE)
            total += tensors["query_energy_sum"]
            count += int(tensors["query_count"])
        return total, count

    def _statistics(self, layer: int) -> dict[str, Tensor]:
        return read_tensors(self._folder(layer) / STATISTICS, _MAKE)

    def _write_manifest(self, manifest: Manifest) -> None:
        write_json(self.path / MANIFEST, manifest.to_json())
        self.manifest = manifest

    def _folder(self, layer: int) -> Path:
        return self.path / f"layer_{layer:03d}"

    def _shard(self, layer: int, chunk: int) -> Path:
        return self._folder(layer) / f"chunk_{chunk:05d}.safetensors"

    def _check_shards(self) -> None:
        for spec in self.layers:
            head = (spec.kv_heads, spec.head_dim)
            for chunk in range(self.manifest.chunks_done):
                count = self.manifest.chunk_tokens(chunk)
                expected: dict[str, tuple[int, ...]] = {
                    "keys": (count, *head),
                    "values": (count, *head),
                    "query_energy_sum": (spec.kv_heads, spec.head_dim // 2),
                    "query_count": (1,),
                }
                _check_file(self._shard(spec.index, chunk), expected)
            if self.manifest.complete:
                _check_file(self._folder(spec.index) / STATISTICS, _statistics_shapes(spec))


def narrow(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`x` as `dtype`, or as bf16 where it overflows fp16.

    Raises InputError when it holds infinities or NaN; `name` says whose they are.
    """
    largest = float(x.abs().max()) if x.numel() else 0.0
    if not largest < float("inf"):
        raise InputError(f"the {name} are not finite", "calibrate with --dtype float32 or bfloat16")
    if dtype == torch.float16 and largest > torch.finfo(dtype).max:
        dtype = torch.bfloat16
    return x.to(dtype)


def _statistics_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    return {
        "query_energy": (spec.kv_heads, spec.head_dim // 2),
        "value_gram": (spec.kv_heads, spec.head_dim, spec.head_dim),
    }


def _check_file(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check the header of a shard, which also tells whether the file has its full length."""
    from safetensors import SafetensorError, safe_open

    mend = "run `calibrate` again with --overwrite"
    try:
        with safe_open(path, "pt") as shard:
            found = {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
            kinds = [shard.get_slice(n).get_dtype() for n in ("keys", "values") if n in found]
    except (SafetensorError, OSError) as error:
        state = f"damaged ({error})" if path.is_file() else "missing"
        raise InputError(f"{path} is {state}", mend) from error
    if found != expected:
        raise InputError(f"{path} holds {found}, not {dict(expected)}", mend)
    if not set(kinds) <= _STORED.keys():
        raise InputError(f"{path} holds {', '.join(kinds)}, neither fp16 nor bf16", mend)
