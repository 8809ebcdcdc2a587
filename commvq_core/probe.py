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
from commvq_core.rope import LAYOUTS, Rotary, pair_table, unrotate

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
    buffers = _frequency_buffers(model)
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
        rotary = _explain(index, keys.float(), tables.get(index), positions, buffers, keys.dtype)
        found[index] = ProbedLayer(rotary, keys.shape[1], keys.shape[-1])
    return found


def _explain(
    index: int,
    keys: Tensor,
    tables: Tables | None,
    positions: list[int],
    buffers: list[Tensor],
    dtype: torch.dtype,
) -> Rotary:
    """The rotation that makes all rows of `keys` [rows, kv_heads, 1, head_dim] agree."""
    tolerance = 1e-3 if dtype == torch.float32 else 4e-2
    if _disagreement(keys) < tolerance:
        return Rotary(0, "half", torch.zeros(0))
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
    inv_freq, scale = _frequencies(index, pair_cos, pair_sin, positions, buffers, dtype)
    return Rotary(rotary_dim, layout, inv_freq, scale)


def _disagreement(keys: Tensor) -> float:
    """The largest distance of a row from row 0, relative to row 0's norm (0 for dead keys)."""
    norm = keys[:1].norm().clamp_min(1e-20)
    return float((keys - keys[:1]).flatten(1).norm(dim=1).max() / norm)


def _frequency_buffers(model: nn.Module) -> list[Tensor]:
    """The model's tables of inverse frequencies, the live ones before the originals."""
    named = [(name, buffer) for name, buffer in model.named_buffers() if "inv_freq" in name]
    named.sort(key=lambda item: "original" in item[0])
    return [buffer.detach().float().cpu().clone() for _, buffer in named if buffer.dim() == 1]


def _frequencies(
    index: int,
    cos: Tensor,
    sin: Tensor,
    positions: list[int],
    buffers: list[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, float]:
    """Inverse frequencies and scale that reproduce the tables `cos`, `sin` [rows, pairs]."""
    cos, sin = cos.double().cpu(), sin.double().cpu()
    scale = float((cos * cos + sin * sin).mean().sqrt())
    tolerance = (1e-4 if dtype == torch.float32 else 2e-2) * scale
    rows = torch.tensor(positions, dtype=torch.float64)[:, None]

    def fits(frequencies: Tensor) -> bool:
        angles = rows * frequencies.double()
        return bool(
            (angles.cos() * scale - cos).abs().max() < tolerance
            and (angles.sin() * scale - sin).abs().max() < tolerance
        )

    for buffer in buffers:
        if buffer.numel() == cos.shape[-1] and fits(buffer):
            return buffer, scale
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
    return frequencies.float(), scale
