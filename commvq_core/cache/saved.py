"""A cache as a safetensors file: codes, windows, sinks, positions, and whose they are.

A saved cache is only worth something to the model and the codebooks that made it, so both are
named by hashes and checked. The header is JSON in the file's metadata; docs/format.md lists it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commvq_core.cache.layer import CommVQLayer
from commvq_core.errors import InputError
from commvq_core.files import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from commvq_core.cache.cache import CommVQCache

FORMAT = "commvq-cache"
VERSION = 1
# Layers of transformers' own that a cache may hold beside ours, and their state beside the tensors.
_PLAIN = {"DynamicLayer": (), "DynamicSlidingWindowLayer": ("cumulative_length",)}
_SAMPLES = 8  # numbers of each weight that tell two checkpoints apart


def write_cache(
    cache: CommVQCache, path: Path, fingerprint: str, token_ids: Tensor | None = None
) -> None:
    """Write a cache, atomically. Raises InputError for layers whose state is not keys and values.

    `fingerprint` is weights_sha256 of its model; `token_ids` int [batch, tokens], what the cache
    was made from, if whoever continues is to need it.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        entry: dict[str, Any] = {"kind": type(layer).__name__}
        if isinstance(layer, CommVQLayer):
            state = layer.state()
            if state:
                entry["model_dtype"] = str(layer.model_dtype).removeprefix("torch.")
        elif entry["kind"] in _PLAIN:
            names = ("keys", "values") if layer.is_initialized else ()
            state = {name: getattr(layer, name) for name in names}
            entry.update({name: int(getattr(layer, name)) for name in _PLAIN[entry["kind"]]})
        else:
            raise InputError(
                f"layer {index} keeps a state that can't be saved ({entry['kind']})",
                "save caches of models whose layers are all attention",
            )
        layers.append(entry)
        tensors.update({f"layers.{index}.{name}": tensor for name, tensor in state.items()})
    if cache.positions.ids is not None:
        tensors["positions"] = cache.positions.ids
    if token_ids is not None:
        tensors["token_ids"] = token_ids.to(torch.int32)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint,
        "codecs": cache.codecs_sha256,
        "artifact": cache.artifact,
        "settings": cache.settings(),
        "layers": layers,
    }
    # Clones, since views of one store would share their memory in the file's eyes.
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    write_tensors(path, own, {"commvq": json.dumps(header, sort_keys=True)})


def read_header(path: Path) -> dict[str, Any]:
    """The header of a saved cache. Raises InputError for any other file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path} does not exist", "give a file that a cache was saved to")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("commvq", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error})", "save the cache again"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path} is no saved cache", "give a file that a cache was saved to")
    if header.get("version") != VERSION:
        raise InputError(
            f"{path} has format version {header.get('version')}, this release reads {VERSION}",
            "upgrade commvq",
        )
    return header


def artifact_of(path: Path, header: Mapping[str, Any]) -> str:
    """The folder or hub id of the codebooks a cache was made with. Raises InputError."""
    source = header.get("artifact")
    if not isinstance(source, str):
        raise InputError(f"{path} names no codebooks", "give the artifact it was made with")
    return source


def read_options(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's options from a header. Raises InputError for what was never written."""
    kinds = {"window": int, "sinks": int, "strict": bool, "prefill_chunk": int}
    stored = header.get("settings")
    try:
        options = {name: stored[name] for name in kinds}  # type: ignore[index]
        wrong = [name for name, kind in kinds.items() if type(options[name]) is not kind]
        dtype = stored["exact_dtype"]  # type: ignore[index]
        options["exact_dtype"] = None if dtype is None else getattr(torch, dtype)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r})", "save the cache again") from error
    if wrong:
        raise InputError(f"{path} is damaged (setting {wrong[0]})", "save the cache again")
    return options


def fill_cache(cache: CommVQCache, path: Path, header: Mapping[str, Any], fingerprint: str) -> None:
    """Fill an empty cache from `path`. Raises InputError unless model and codebooks are the same.

    `fingerprint` is weights_sha256 of the cache's model.
    """
    for field, mine, what in (
        ("model", fingerprint, "model"),
        ("codecs", cache.codecs_sha256, "codebooks"),
    ):
        if header.get(field) != mine:
            raise InputError(
                f"{path} was saved with another {what}"
                if field == "model"
                else f"{path} was saved with other {what}",
                f"load it with the {what} that it was saved with",
            )
    tensors = read_tensors(path, "the saved cache")
    device = cache.device
    try:
        entries = header["layers"]
        if len(entries) != len(cache.layers):
            raise ValueError(f"{len(entries)} layers, not {len(cache.layers)}")
        for index, (entry, layer) in enumerate(zip(entries, cache.layers, strict=True)):
            prefix = f"layers.{index}."
            state = {
                name.removeprefix(prefix): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            if entry["kind"] != type(layer).__name__:
                raise ValueError(f"layer {index} is a {entry['kind']}")
            if isinstance(layer, CommVQLayer):
                dtype = getattr(torch, entry.get("model_dtype", "float32"))
                layer.restore(state, dtype)
            elif state:
                layer.lazy_initialization(state["keys"], state["values"])
                layer.keys, layer.values = state["keys"], state["values"]
                for name in _PLAIN[entry["kind"]]:
                    setattr(layer, name, int(entry[name]))
        ids = tensors.get("positions")
        if cache.get_seq_length() and (
            ids is None or ids.dim() != 2 or ids.shape[1] != cache.get_seq_length()
        ):
            raise ValueError("tensor positions is missing or misshapen")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cache.reset()
        raise InputError(f"{path} is damaged ({error})", "save the cache again") from error
    cache.positions.restore(None if ids is None else ids.to(device))
    cache.token_ids = tensors.get("token_ids")


def weights_sha256(model: PreTrainedModel) -> str:
    """A hash over a few numbers of every weight: tells checkpoints apart, not dtypes or devices."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // _SAMPLES)
        few = flat[::step][:_SAMPLES].float().to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {few.tolist()}".encode())
    return digest.hexdigest()
