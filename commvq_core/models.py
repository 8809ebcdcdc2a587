"""Load a model from the hub, a folder or a .gguf file, and describe its attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from commvq_core.errors import InputError, first_line
from commvq_core.files import sha256_of_text
from commvq_core.gguf_file import check_gguf
from commvq_core.probe import ProbedLayer, probe_rotation, uncast_frequencies
from commvq_core.progress import Progress, Silent
from commvq_core.rope import LAYOUTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer. `rotary_dim` 0 means the layer does not rotate its keys.

    `compressible` is False for layers that keep transformers' own cache (sliding windows).
    """

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    pair_layout: str
    sliding_window: int | None
    compressible: bool

    def __post_init__(self) -> None:
        for name, kind in _LAYER_TYPES.items():
            if type(getattr(self, name)) not in kind:
                raise TypeError(f"{name} is {getattr(self, name)!r}")
        if min(self.index, self.rotary_dim) < 0 or min(self.heads, self.kv_heads) < 1:
            raise ValueError(f"impossible geometry {self}")
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2 or self.head_dim < 1:
            raise ValueError(f"impossible geometry {self}")
        if self.pair_layout not in LAYOUTS:
            raise ValueError(f"pair_layout is {self.pair_layout!r}, not {' or '.join(LAYOUTS)}")


_LAYER_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("index", "heads", "kv_heads", "head_dim", "rotary_dim"), (int,)),
    "pair_layout": (str,),
    "sliding_window": (int, type(None)),
    "compressible": (bool,),
}


@dataclass(frozen=True)
class AttentionSpec:
    """A model's attention as far as a compressed cache depends on it.

    `fingerprint` is a SHA-256 over everything here, RoPE's frequencies included; two checkpoints
    with the same fingerprint can exchange codebooks (a base model and its fine-tune).
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AttentionSpec:
        """Read what `to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""
        layers = tuple(LayerSpec(**layer) for layer in value["layers"])
        spec = cls(**{**value, "layers": layers})
        for name, kind in (
            ("model_type", str),
            ("hidden_size", int),
            ("vocab_size", int),
            ("fingerprint", str),
        ):
            if type(getattr(spec, name)) is not kind:
                raise TypeError(f"{name} is {getattr(spec, name)!r}")
        if len({layer.index for layer in layers}) < len(layers):
            raise ValueError("two layers have the same index")
        return spec

    @property
    def compressible(self) -> tuple[LayerSpec, ...]:
        """The layers whose keys and values get codes."""
        return tuple(layer for layer in self.layers if layer.compressible)


@dataclass
class LoadedModel:
    """A model ready to run, with its tokenizer; `source` is what the user typed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: AttentionSpec
    source: str


def attention_modules(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(layer index, attention module) of every attention layer, in order."""
    found: list[tuple[int, nn.Module]] = []
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and type(module).__name__.endswith("Attention"):
            found.append((index, module))
    return sorted(found, key=lambda item: item[0])


def describe_model(model: PreTrainedModel) -> AttentionSpec:
    """Describe the attention of a causal language model, by probing it (see probe.py).

    Raises InputError, in one line, for what a compressed cache can't serve: encoder-decoders,
    multi-head latent attention, RoPE that changes with the context's length, no RoPE at all.
    """
    spec, _ = describe_and_probe(model)
    return spec


def describe_and_probe(model: PreTrainedModel) -> tuple[AttentionSpec, dict[int, ProbedLayer]]:
    """`describe_model`, and what the probe found of each layer's rotation."""
    from transformers import DynamicCache

    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder", "commvq supports decoder-only models")
    if getattr(config, "kv_lora_rank", None):
        raise InputError(
            f"{name} uses multi-head latent attention, whose cache is compressed already",
            "choose a model with ordinary multi-head or grouped-query attention",
        )
    _refuse_dynamic_rope(name, config)
    modules = attention_modules(model)
    if not modules:
        raise InputError(
            f"{name} has no attention layers that commvq knows", "choose another model"
        )
    probed = probe_rotation(model, modules)
    if not any(layer.rotary.rotary_dim for layer in probed.values()):
        raise InputError(
            f"{name} does not use rotary position embeddings", "commvq needs a model with RoPE"
        )
    own_layers = DynamicCache(config=model.config).layers
    layers = []
    for index, layer in sorted(probed.items()):
        window = getattr(own_layers[index], "sliding_window", None)
        layers.append(
            LayerSpec(
                index=index,
                heads=int(config.num_attention_heads),
                kv_heads=layer.kv_heads,
                head_dim=layer.head_dim,
                rotary_dim=layer.rotary.rotary_dim,
                pair_layout=layer.rotary.layout,
                sliding_window=None if window is None else int(window),
                compressible=type(own_layers[index]).__name__ == "DynamicLayer",
            )
        )
    if not any(layer.compressible for layer in layers):
        raise InputError(
            f"no attention layer of {name} keeps a plain cache (a sliding window or other state)",
            "there is no growing cache to compress; use the model as it is",
        )
    fields = {
        "model_type": config.model_type,
        "hidden_size": int(config.hidden_size),
        "vocab_size": int(config.vocab_size),
    }
    # Four digits: enough to tell rotations apart, few enough to agree on every device.
    frequencies = [
        [f"{float(f):.4g}" for f in uncast_frequencies(model, probed[layer.index].rotary.inv_freq)]
        for layer in layers
    ]
    described = [fields, [asdict(layer) for layer in layers], frequencies]
    fingerprint = sha256_of_text(repr(described))
    return AttentionSpec(**fields, layers=tuple(layers), fingerprint=fingerprint), probed


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """What a config says of its rotary embeddings, one entry or one a kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def longest_rotation(config: Any) -> int | None:
    """How many positions rotate alike: longrope takes other frequencies past so many, else None."""
    text = config.get_text_config(decoder=True)
    limits = [
        entry.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        for entry in _rope_parameters(text)
        if entry.get("rope_type") == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=None)


def _refuse_dynamic_rope(name: str, config: Any) -> None:
    for entry in _rope_parameters(config):
        if entry.get("rope_type") == "dynamic":
            raise InputError(
                f"{name} uses dynamic-NTK RoPE, which changes with the context's length",
                "set rope_type to a fixed scaling (linear, yarn, llama3) or choose another model",
            )


def load_model(
    source: str, *, device: str = "auto", dtype: str = "auto", progress: Progress | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    `source` is a folder, a .gguf file or a hub id. `device` "auto" is CUDA where there is one;
    `dtype` "auto" is the checkpoint's, but float32 for fp16 and GGUF checkpoints on a CPU, which
    computes fp16 slowly. Raises InputError when there is no such model or it can't be compressed.
    """
    progress = progress or Silent()
    target = choose_device(device)
    path = Path(source).expanduser()
    if path.is_file():
        folder, extra = _gguf(path)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{source} has no config.json", "give a folder that a model was saved to"
            )
        folder, extra = str(path), {}
    elif source.count("/") > 1 or source.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise InputError(f"{source} does not exist", "give a hub id, a folder or a .gguf file")
    else:
        folder, extra = source, {}
    progress.message(f"loading {source}")
    model, tokenizer = _from_pretrained(source, folder, extra, target, dtype)
    return LoadedModel(model, tokenizer, describe_model(model), source)


def choose_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises InputError for what this machine has not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"device {device} can't be used ({first})", "give auto, cpu or cuda"
        ) from error
    return target


def choose_dtype(dtype: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """What a checkpoint of dtype `stored` is loaded as; see load_model. Raises InputError."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in names:
        return names[dtype]
    if dtype != "auto":
        raise InputError(f"dtype {dtype} is not known", f"give auto, {', '.join(names)}")
    if device.type == "cpu":
        return torch.bfloat16 if stored == torch.bfloat16 else torch.float32
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def _gguf(path: Path) -> tuple[str, dict[str, Any]]:
    """Check a .gguf file and return what from_pretrained needs to read it."""
    if path.suffix != ".gguf":
        raise InputError(f"{path} is not a model", "give a hub id, a folder or a .gguf file")
    if find_spec("gguf") is None:
        raise InputError("reading .gguf files needs the package gguf", "pip install 'commvq[gguf]'")
    check_gguf(path)
    return str(path.parent), {"gguf_file": path.name}


def _from_pretrained(
    source: str, folder: str, extra: dict[str, Any], device: torch.device, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, **extra)
        stored = None if extra else getattr(config, "dtype", None)
        chosen = choose_dtype(dtype, stored, device)
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        # The config goes in, since reading it from a .gguf file takes seconds.
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=chosen, output_loading_info=True, **extra
        )
    except InputError:
        raise
    except Exception as error:
        first = first_line(error)
        raise InputError(
            f"{source} can't be loaded as a causal language model ({first})",
            "check the name, the files and the network",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers only warns, and goes on with random numbers in their place.
        raise InputError(
            f"{source} lacks {len(missing)} of the model's weights ({missing[0]})",
            "download it again, or choose a causal language model",
        )
    return model.to(device).eval(), tokenizer
