"""Run text through a model and store what its attention sees: the `calibrate` command."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from commvq_core.calibration.data import TextSource, iter_documents, tokenize_sequences
from commvq_core.calibration.manifest import Manifest, hash_tokens, sampled_count
from commvq_core.calibration.recorder import Recorded, recording
from commvq_core.calibration.store import CalibrationStore, LayerChunk, narrow
from commvq_core.errors import InputError
from commvq_core.files import check_output
from commvq_core.models import LayerSpec, LoadedModel, attention_modules
from commvq_core.progress import Progress, Silent, Task
from commvq_core.rope import to_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_TOKENS = 4096  # some 1 GB of float32 keys and values for an 8B model
_OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj")


@dataclass(frozen=True)
class CalibrationConfig:
    """What to run and how much of it to keep.

    `tokens` are run in sequences of `seq_len`; the share `sample` of them is stored, chosen by
    `seed`. `datasets` and `text_column` are those of `data.iter_documents`. Raises InputError.
    """

    tokens: int = 65_536
    sample: float = 1.0
    seq_len: int = 2048
    seed: int = 0
    datasets: tuple[str, ...] = ("builtin",)
    text_column: str = "text"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"--tokens {self.tokens} is too few", "give at least 1")
        if not 0 < self.sample <= 1:
            raise InputError(f"--sample {self.sample} is no share", "give a number in (0, 1]")
        if self.seq_len < 1:
            raise InputError(f"--seq-len {self.seq_len} is too short", "give at least 1")
        if not self.datasets:
            raise InputError("no text was named", "give at least one --dataset")


def calibrate(
    loaded: LoadedModel,
    out: Path,
    config: CalibrationConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Store keys before RoPE, values, query energy and value metric of every compressible layer.

    Writes the CALIB folder `out` (see store.py). With `resume` an interrupted run goes on after its
    last whole chunk, to the same bytes as a run that was never interrupted. Everything that can be
    wrong with the input is found before anything is written or removed. Raises InputError.
    """
    progress = progress or Silent()
    check_output(out, overwrite=overwrite, resume=resume)
    _check_length(loaded.model, config)
    layers = {layer.index: layer for layer in loaded.spec.compressible}
    grams = _value_grams(loaded.model, layers)
    sequences, sources = _read(loaded.tokenizer, config)
    manifest = _plan(loaded, config, sequences, sources)
    store = _open(out, manifest, overwrite=overwrite, resume=resume)
    if store.manifest.complete:
        progress.message(f"{out} is complete already")
        return store.manifest
    _run(store, loaded.model, layers, sequences, progress)
    for index, gram in grams.items():
        total, count = store.query_sums(index)
        energy = (total / count).float()
        store.write_statistics(index, {"query_energy": energy, "value_gram": gram})
    store.finish()
    return store.manifest


def sampled_tokens(sample: float, length: int, seed: int, sequence: int) -> Tensor:
    """Which tokens of a sequence are stored: sorted int64 indices, the same for every layer.

    They depend on the seed and the sequence's number alone, so that a resumed run, or another
    machine, draws the same.
    """
    count = sampled_count(sample, length)
    if count >= length:
        return torch.arange(length)
    digest = hashlib.sha256(f"{seed}:{sequence}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(length, generator=generator)[:count].sort().values


def _check_length(model: PreTrainedModel, config: CalibrationConfig) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = min(config.seq_len, config.tokens)
    if limit and length > limit:
        raise InputError(
            f"sequences of {length:,} tokens are longer than the model's {limit:,} positions",
            f"give a --seq-len of at most {limit}",
        )


def _read(tokenizer: Any, config: CalibrationConfig) -> tuple[list[Tensor], list[TextSource]]:
    documents = iter_documents(config.datasets, text_column=config.text_column)
    sequences = tokenize_sequences(
        tokenizer, documents, tokens=config.tokens, seq_len=config.seq_len
    )
    return sequences, documents.used()


def _plan(
    loaded: LoadedModel,
    config: CalibrationConfig,
    sequences: Sequence[Tensor],
    sources: Sequence[TextSource],
) -> Manifest:
    chunk_sequences = max(1, _CHUNK_TOKENS // config.seq_len)
    return Manifest(
        model=loaded.source,
        spec=loaded.spec.to_json(),
        tokens=config.tokens,
        sample=float(config.sample),
        seq_len=config.seq_len,
        seed=config.seed,
        dtype="bfloat16" if loaded.model.dtype == torch.bfloat16 else "float16",
        sources=tuple(asdict(source) for source in sources),
        token_sha256=hash_tokens(sequences),
        chunk_sequences=chunk_sequences,
        chunks=-(-len(sequences) // chunk_sequences),
    )


def _open(out: Path, manifest: Manifest, *, overwrite: bool, resume: bool) -> CalibrationStore:
    """The store to go on with: a new one, or with `resume` the one that is there."""
    if overwrite or (resume and CalibrationStore.is_blank(out)):
        CalibrationStore.clear(out)
        return CalibrationStore.create(out, manifest)
    if not resume:
        return CalibrationStore.create(out, manifest)
    store = CalibrationStore.open(out, require_complete=False)
    mend = "repeat the options of the first run, or add --overwrite instead of --resume"
    if store.spec.fingerprint != manifest.attention.fingerprint:
        raise InputError(f"{out} is a calibration of another model ({store.manifest.model})", mend)
    if different := manifest.differences(store.manifest):
        name = different[0]
        old, new = getattr(store.manifest, name), getattr(manifest, name)
        detail = f" ({old}, now {new})" if isinstance(old, (int, float, str)) else ""
        raise InputError(f"{out} was begun with another {name}{detail}", mend)
    store.remove_temporary_files()
    return store


def _run(
    store: CalibrationStore,
    model: PreTrainedModel,
    layers: Mapping[int, LayerSpec],
    sequences: Sequence[Tensor],
    progress: Progress,
) -> None:
    """Run and write the chunks that are not done."""
    plan = store.manifest
    per_chunk = plan.chunk_sequences
    done = sum(len(sequence) for sequence in sequences[: plan.chunks_done * per_chunk])
    with progress.task("calibrating", plan.tokens, unit="token", done=done) as task:
        for chunk in range(plan.chunks_done, plan.chunks):
            first = chunk * per_chunk
            part = sequences[first : first + per_chunk]
            collector = _Collector(plan, layers)
            _forward(model, layers, part, first, collector, task)
            store.write_chunk(chunk, collector.result())


def _forward(
    model: PreTrainedModel,
    layers: Mapping[int, LayerSpec],
    sequences: Sequence[Tensor],
    first: int,
    collector: _Collector,
    task: Task,
) -> None:
    # The head is left out: logits of a large vocabulary would need more memory than the rest.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    device = next(model.parameters()).device
    with recording(model, layers, collector.listen):
        for number, sequence in enumerate(sequences, start=first):
            collector.begin(number, len(sequence))
            decoder(input_ids=sequence[None].to(device), use_cache=False)
            collector.end()
            task.advance(len(sequence))


class _Collector:
    """Gathers one chunk: sampled keys and values, and the energy of all queries."""

    def __init__(self, plan: Manifest, layers: Mapping[int, LayerSpec]) -> None:
        self._plan = plan
        self._dtype = torch.bfloat16 if plan.dtype == "bfloat16" else torch.float16
        self._keys: dict[int, list[Tensor]] = {index: [] for index in layers}
        self._values: dict[int, list[Tensor]] = {index: [] for index in layers}
        self._energy: dict[int, Tensor] = {}
        self._queries = dict.fromkeys(layers, 0)
        self._chosen = torch.empty(0, dtype=torch.long)
        self._seen: set[int] = set()

    def begin(self, number: int, length: int) -> None:
        """A sequence begins."""
        self._chosen = sampled_tokens(self._plan.sample, length, self._plan.seed, number)
        self._seen = set()

    def end(self) -> None:
        """A sequence ended. Raises InputError when a layer was not heard of."""
        if missing := sorted(self._keys.keys() - self._seen):
            raise InputError(
                f"attention layer {missing[0]} does not use transformers' attention interface",
                "this model can't be calibrated",
            )

    def listen(self, layer: LayerSpec, recorded: Recorded) -> None:
        """One layer of the sequence, as `recording` tells it."""
        index = layer.index
        self._seen.add(index)
        chosen = self._chosen.to(recorded.key.device)
        for store, x, name in (
            (self._keys, recorded.key, "keys"),
            (self._values, recorded.value, "values"),
        ):
            rows = x[0].index_select(1, chosen).transpose(0, 1).cpu()
            # Narrowed at once, since a chunk of float32 is the largest thing in memory.
            store[index].append(narrow(rows, self._dtype, f"{name} of layer {index}"))
        energy = query_energy_sum(recorded.query[0], layer, recorded.scale)
        self._energy[index] = self._energy[index] + energy if index in self._energy else energy
        self._queries[index] += recorded.query.shape[2] * (layer.heads // layer.kv_heads)

    def result(self) -> dict[int, LayerChunk]:
        """The chunk, a LayerChunk a layer."""
        return {
            index: LayerChunk(
                torch.cat(self._keys[index]),
                torch.cat(self._values[index]),
                self._energy[index],
                self._queries[index],
            )
            for index in self._keys
        }


def query_energy_sum(query: Tensor, layer: LayerSpec, scale: float = 1.0) -> Tensor:
    """The sum of |q_pair|^2 before RoPE, over tokens and the query heads of each KV head.

    `query` [heads, tokens, head_dim] after RoPE, in the model's order of dims. A rotation leaves
    the energy of a pair alone, so nothing is un-rotated; only RoPE's `scale` is divided out.
    Returns [kv_heads, head_dim/2] float64 on the CPU, pairs in canonical order.
    """
    dims = query.float().square().sum(dim=1).cpu().double()
    dims = to_pairs(dims, rotary_dim=layer.rotary_dim, layout=layer.pair_layout)
    dims[..., : layer.rotary_dim] /= scale**2
    return dims.unflatten(-1, (-1, 2)).sum(dim=-1).unflatten(0, (layer.kv_heads, -1)).sum(dim=1)


def _value_grams(model: PreTrainedModel, layers: Mapping[int, LayerSpec]) -> dict[int, Tensor]:
    modules = dict(attention_modules(model))
    return {index: value_gram(modules[index], layer) for index, layer in layers.items()}


def value_gram(attention: nn.Module, layer: LayerSpec) -> Tensor:
    """Sum over the query heads h of each KV head of W_h^T W_h, W_h the part of o_proj for head h.

    Returns [kv_heads, head_dim, head_dim] float32 on the CPU. Raises InputError when the attention
    module has no ordinary output projection.
    """
    width = layer.heads * layer.head_dim
    for name in _OUTPUT_PROJECTIONS:
        weight = getattr(getattr(attention, name, None), "weight", None)
        if (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and weight.shape[1:] == (width,)
        ):
            heads = weight.detach().float().unflatten(1, (layer.kv_heads, -1, layer.head_dim))
            return torch.einsum("okgd,okge->kde", heads, heads).cpu()
    raise InputError(
        f"attention layer {layer.index} has no output projection of {width} inputs",
        "quantized weights are not supported: load the model in float32, bfloat16 or float16",
    )
