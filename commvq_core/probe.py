"""Find out how a model rotates its keys by asking it, not by knowing its name.

One forward pass over a batch of single-token rows: every row is the same token at another position.
With one token a row attention has nothing to choose from, so the hidden states of all rows agree in
every layer, and the keys differ by their rotation alone. A layer whose keys agree does not rotate
(SmolLM3, Cohere 2); one whose keys agree after un-rotating in a pair layout rotates that way; any
other is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from commvq_core.errors import InputError
from commvq_core.rope import LAYOUTS, Rotary, pair_table, unrotate, unrotated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POSITIONS = (0, 1, 2, 5, 17, 100)
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ProbedLayer:
    """What one attention layer did. `keys` [rows, kv_heads, 1, head_dim] as it cached them."""

    rotary: Rotary
    kv_heads: int
    head_dim: int


@contextmanager
def capture_position_embeddings(
    modules: Sequence[tuple[int, nn.Module]],
) -> Iterator[dict[int, Tables]]:
    """While open, the dict holds each layer's last (cos, sin), as its attention module got them."""
    seen: dict[int, Tables] = {}
    handles = []
    try:
        for index, module in modules:

            def hook(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index
            ) -> None:
                tables = kwargs.get("position_embeddings")
                if tables is None:
                    tables = next((arg for arg in args if _is_tables(arg)), None)
                if tables is not None:
                    seen[index] = tables

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode; afterwards each is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(part, Tensor) and part.is_floating_point() for part in value)
    )


def probe_rotation(
    model: PreTrainedModel, modules: Sequence[tuple[int, nn.Module]]
) -> dict[int, ProbedLayer]:
    """Probe every layer in `modules` (layer index, attention module).

    Returns a ProbedLayer for each layer that cached keys of its own. Raises InputError for a model
    whose keys can't be un-rotated.
    """
    from transformers import DynamicCache

    limit = int(
        getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 0
    )
    positions = [p for p in _POSITIONS if not limit or p < limit]
    device = next(model.parameters()).device
    # An ordinary token: 0 is padding in many vocabularies, and a padding row embeds to zeros.
    token = min(11, model.get_input_embeddings().weight.shape[0] - 1)
    ids = torch.full((len(positions), 1), token, dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config)
    try:
        with (
            torch.inference_mode(),
            _evaluating(model),
            capture_position_embeddings(modules) as tables,
        ):
            model(
                input_ids=ids,
                position_ids=torch.tensor(positions, device=device)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} failed on a one-token forward pass ({error})",
            "commvq supports decoder-only models that take input_ids and past_key_values",
        ) from error
    known = _KnownRotations.of(model)
    found: dict[int, ProbedLayer] = {}
    for index, _ in modules:
        layer = cache.layers[index] if index < len(cache.layers) else None
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            continue  # shares another layer's keys, or is not softmax attention
        if keys.shape != values.shape:
            raise InputError(
                f"layer {index} has keys of {keys.shape[-1]} dims, values of {values.shape[-1]}",
                "models with multi-head latent attention are not supported",
            )
        rotary = _explain(index, keys.float(), tables.get(index), positions, known, keys.dtype)
        # One object for all layers that rotate alike: they share their tables (cache.positions).
        rotary = next((old.rotary for old in found.values() if old.rotary.same(rotary)), rotary)
        found[index] = ProbedLayer(rotary, keys.shape[1], keys.shape[-1])
    return found


def _explain(
    index: int,
    keys: Tensor,
    tables: Tables | None,
    positions: list[int],
    known: _KnownRotations,
    dtype: torch.dtype,
) -> Rotary:
    """The rotation that makes all rows of `keys` [rows, kv_heads, 1, head_dim] agree."""
    tolerance = 1e-3 if dtype == torch.float32 else 4e-2
    if _disagreement(keys) < tolerance:
        return unrotated()
    if tables is None:
        raise InputError(
            f"layer {index} makes its keys depend on the position without rotary embeddings",
            "commvq needs a model with RoPE (its attention must receive position_embeddings)",
        )
    cos, sin = (table.expand(len(positions), *table.shape[1:]).float() for table in tables)
    width = cos.shape[-1]
    trials: list[tuple[float, int, str]] = []
    for rotary_dim in (width, 2 * width):
        if rotary_dim > keys.shape[-1] or rotary_dim % 2:
            continue
        for layout in LAYOUTS:
            try:
                back = unrotate(
                    keys, cos[:, None], sin[:, None], rotary_dim=rotary_dim, layout=layout
                )
            except ValueError:
                continue
            trials.append((_disagreement(back), rotary_dim, layout))
    error, rotary_dim, layout = min(trials, default=(float("inf"), 0, ""))
    if error >= tolerance:
        raise InputError(
            f"layer {index}: un-rotating the keys leaves them {error:.1%} apart",
            "this model's position embedding is not plain RoPE and is not supported",
        )
    pair_cos = pair_table(cos, rotary_dim)[:, 0]
    pair_sin = pair_table(sin, rotary_dim)[:, 0]
    pair_tables = (pair_cos.cpu(), pair_sin.cpu())
    inv_freq, scale = _frequencies(index, pair_tables, positions, known, dtype, tables[0].dtype)
    return Rotary(rotary_dim, layout, inv_freq, scale)


def _disagreement(keys: Tensor) -> float:
    """The largest distance of a row from row 0, relative to row 0's norm (0 for dead keys)."""
    norm = keys[:1].norm().clamp_min(1e-20)
    return float((keys - keys[:1]).flatten(1).norm(dim=1).max() / norm)


@dataclass(frozen=True)
class _KnownRotations:
    """What the model's rotary modules say of themselves, to be checked against their tables.

    `buffers` float32 on the CPU, the live ones before the originals; `scales`, 1 first.
    """

    buffers: list[Tensor]
    scales: list[float]

    @classmethod
    def of(cls, model: nn.Module) -> _KnownRotations:
        buffers = [item for item in model.named_buffers() if "inv_freq" in item[0]]
        buffers.sort(key=lambda item: "original" in item[0])
        scales = {
            value
            for module in rotary_modules(model)
            for name, value in vars(module).items()
            if name.endswith("attention_scaling") and isinstance(value, float)
        }
        tables = [buffer.detach().float().cpu().clone() for _, buffer in buffers]
        return cls([table for table in tables if table.dim() == 1], [1.0, *sorted(scales)])


def uncast_frequencies(model: nn.Module, inv_freq: Tensor) -> Tensor:
    """`inv_freq` [pairs] of a layer as it was before the model was cast, float32.

    `model.half()` also rounds the frequencies. Whether two models rotate alike must not depend on
    that, so rotary modules whose tables were rounded are made anew.
    """
    for module in rotary_modules(model):
        tables = _tables_of(module)
        if all(table.dtype == torch.float32 for table in tables):
            continue
        kind: Any = type(module)
        try:
            anew = kind(config=module.config)
        except Exception:  # not one of transformers' own: there is nothing better than its tables
            continue
        for exact in _tables_of(anew):
            if exact.shape == inv_freq.shape and torch.allclose(exact, inv_freq, rtol=1e-2, atol=0):
                return exact
    return inv_freq


def _tables_of(module: nn.Module) -> list[Tensor]:
    return [table for name, table in module.named_buffers() if "inv_freq" in name]


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold inverse frequencies."""
    return [
        module
        for module in model.modules()
        if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    ]


def _frequencies(
    index: int,
    tables: Tables,
    positions: list[int],
    known: _KnownRotations,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
) -> tuple[Tensor, float]:
    """Inverse frequencies and scale that reproduce the tables (cos, sin), each [rows, pairs]."""
    cos, sin = (table.double() for table in tables)
    measured = float((cos * cos + sin * sin).mean().sqrt())
    tolerance = (1e-4 if dtype == torch.float32 else 2e-2) * measured
    rows = torch.tensor(positions, dtype=torch.float64)[:, None]

    def fits(frequencies: Tensor) -> bool:
        angles = rows * frequencies.double()
        return bool(
            (angles.cos() * measured - cos).abs().max() < tolerance
            and (angles.sin() * measured - sin).abs().max() < tolerance
        )

    for buffer in known.buffers:
        if buffer.numel() == cos.shape[-1] and fits(buffer):
            # Tables of half precision tell the scale to some digits only: prefer a stated one.
            stated = min(known.scales, key=lambda scale: abs(scale - measured))
            near = abs(stated - measured) <= 4 * torch.finfo(table_dtype).eps * measured
            return buffer, stated if near else measured
    # No buffer: take the angle of position 1, then sharpen it with each larger position, whose
    # angle is known up to whole turns.
    frequencies = torch.atan2(sin[1], cos[1])
    for row, position in enumerate(positions[2:], start=2):
        angle = torch.atan2(sin[row], cos[row])
        turns = torch.round((frequencies * position - angle) / (2 * torch.pi))
        frequencies = (angle + 2 * torch.pi * turns) / position
    if dtype != torch.float32 or not fits(frequencies):
        raise InputError(
            f"layer {index}: the rotary tables follow no fixed frequencies that could be found",
            "models that change their RoPE with the length of the context are not supported",
        )
    return frequencies.float(), measured
