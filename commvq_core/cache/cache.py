"""CommVQCache: a transformers cache whose old tokens are codes."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from commvq_core.cache.kept import KeptLayer
from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.patch import Patch, running_cache
from commvq_core.cache.positions import Positions
from commvq_core.cache.prefill import PREFILL_CHUNK
from commvq_core.codecs.base import Codec
from commvq_core.codecs.digest import LayerCodecs, codecs_sha256
from commvq_core.errors import InputError
from commvq_core.models import AttentionSpec, describe_and_probe, longest_rotation
from commvq_core.rope import unrotated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from commvq_core.artifact import Artifact


class CommVQCache(Cache):
    """A compressed key-value cache for `model`, for model.generate(past_key_values=cache).

    `codecs` maps a layer's index to its codecs of keys and values; layers that it leaves out keep
    transformers' own cache. The first `sinks` tokens of each row and the newest `window` stay
    exact; older ones are codes. With `strict`, every query of a long chunk sees what it would see
    if the tokens had come one by one (exact for its own last `window` tokens only), which is what
    evaluation needs; without, a chunk sees itself exactly, as prefill wants. Prompts of more than
    `prefill_chunk` tokens run in pieces of that many, which see the pieces before them as codes.
    `exact_dtype` stores window and sinks in another dtype than the model's. `keep_decoded` holds
    what codes decode to beside them, for evaluating codecs that are slow to decode (see KeptLayer).

    Works as a context manager, or until `close()`; the model is then as it was before the first
    cache. Several caches may live on one model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codecs: LayerCodecs,
        *,
        window: int = 128,
        sinks: int = 4,
        strict: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
        exact_dtype: torch.dtype | None = None,
        keep_decoded: bool = False,
    ) -> None:
        if window < 1 or sinks < 0 or prefill_chunk < 1:
            raise InputError(
                f"window {window}, sinks {sinks}, prefill_chunk {prefill_chunk}",
                "give a window and chunk of 1 or more, sinks of 0 or more",
            )
        spec, probed = _describe(model)
        self.positions = Positions(longest_rotation(model.config))
        self.prefill_chunk = prefill_chunk
        layers: list[Any] = DynamicCache(config=model.config).layers
        for layer in spec.compressible:
            if layer.index not in codecs:
                continue
            key_codec, value_codec = codecs[layer.index]
            layers[layer.index] = (KeptLayer if keep_decoded else CommVQLayer)(
                key_codec.to(model.device),
                value_codec.to(model.device),
                probed[layer.index].rotary if key_codec.before_rope else unrotated(),
                self.positions,
                window=window,
                sinks=sinks,
                strict=strict,
                exact_dtype=exact_dtype,
            )
        super().__init__(layers=layers)
        self._settings = {
            "window": window,
            "sinks": sinks,
            "strict": strict,
            "prefill_chunk": prefill_chunk,
            "exact_dtype": None if exact_dtype is None else str(exact_dtype).removeprefix("torch."),
        }
        self.artifact: str | None = None
        self.token_ids: Tensor | None = None
        self._model = weakref.ref(model)
        self._attach()

    @classmethod
    def from_pretrained(
        cls, artifact: str | Path | Artifact, model: PreTrainedModel, **options: Any
    ) -> CommVQCache:
        """A cache with the codebooks of an artifact (folder, hub id, or loaded).

        `options` as in the constructor. Raises InputError when the artifact is damaged or was made
        for another model.
        """
        from commvq_core.artifact import load_artifact

        loaded = load_artifact(artifact) if isinstance(artifact, (str, Path)) else artifact
        loaded.check_fits(_describe(model)[0])
        cache = cls(model, loaded.coded_layers, **options)
        cache.artifact = loaded.source
        return cache

    def save(self, path: str | Path, *, token_ids: Tensor | None = None) -> None:
        """Write the cache to a safetensors file, from which `load` continues.

        `token_ids` int [batch, tokens] are kept with it (`cache.token_ids` after loading), for
        generate() wants the whole sequence again. Raises InputError for a model with layers whose
        state is not keys and values, and when the file can't be written.
        """
        from commvq_core.cache.saved import weights_sha256, write_cache

        model = self._model()
        assert model is not None
        write_cache(self, Path(path), weights_sha256(model), token_ids)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        artifact: str | Path | Artifact | None = None,
    ) -> CommVQCache:
        """The cache that `save` wrote, as if it had never gone.

        `artifact` holds the codebooks it was made with; None: the folder or hub id that it was made
        from. Raises InputError for another model, other codebooks, and a damaged file.
        """
        from commvq_core.cache.saved import (
            artifact_of,
            fill_cache,
            read_header,
            read_options,
            weights_sha256,
        )

        path = Path(path)
        header = read_header(path)
        artifact = artifact_of(path, header) if artifact is None else artifact
        cache = cls.from_pretrained(artifact, model, **read_options(path, header))
        try:
            fill_cache(cache, path, header, weights_sha256(model))
        except InputError:
            cache.close()
            raise
        return cache

    def settings(self) -> dict[str, Any]:
        """The options it was made with, as JSON."""
        return dict(self._settings)

    @property
    def strict(self) -> bool:
        """Whether chunks see what they would see token by token; may be changed between passes."""
        return bool(self._settings["strict"])

    @strict.setter
    def strict(self, value: bool) -> None:
        self._settings["strict"] = value
        for layer in self.compressed_layers:
            layer.strict = value

    @property
    def codecs_sha256(self) -> str:
        """Which codebooks its codes belong to."""
        return codecs_sha256(
            {
                index: (layer.key_codec, layer.value_codec)
                for index, layer in enumerate(self.layers)
                if isinstance(layer, CommVQLayer)
            }
        )

    @property
    def device(self) -> torch.device:
        """Where its model is."""
        model = self._model()
        assert model is not None
        return model.device

    def _attach(self) -> None:
        model = self._model()
        assert model is not None
        patch = Patch.acquire(model)
        # Also runs when the cache is collected without close().
        self._release = weakref.finalize(self, patch.release)

    def close(self) -> None:
        """Detach from the model. The cache's data stays readable; the model can't run on it."""
        self._release()

    def __enter__(self) -> CommVQCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> CommVQCache:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if name not in ("_model", "_release"):
                setattr(twin, name, copy.deepcopy(value, memo))
        twin._model = self._model
        twin._attach()
        return twin

    def check_runs_on(self, model: PreTrainedModel | None) -> None:
        """Raise InputError unless the cache is open and was made for this model."""
        if model is not self._model():
            raise InputError(
                "this CommVQCache was made for another model", "make one with this model"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers; see CommVQLayer.update."""
        if running_cache() is not self:
            raise InputError(
                "this CommVQCache is closed, or not attached to the model that runs",
                "use it inside `with CommVQCache.from_pretrained(...) as cache`",
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def compressed_layers(self) -> list[CommVQLayer]:
        """The layers that hold codes."""
        return [layer for layer in self.layers if isinstance(layer, CommVQLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes stored for the context now: codes, windows, sinks, positions, other layers."""
        others = [
            tensor
            for layer in self.layers
            if not isinstance(layer, CommVQLayer)
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(tensor, Tensor)
        ]
        return (
            sum(layer.nbytes for layer in self.compressed_layers)
            + sum(tensor.numel() * tensor.element_size() for tensor in others)
            + self.positions.nbytes
        )

    @property
    def bits_per_element(self) -> float:
        """Bits a scalar of K and V costs once it is a code, averaged over the compressed layers."""
        return mean_bits(
            [c for layer in self.compressed_layers for c in (layer.key_codec, layer.value_codec)]
        )

    @property
    def resident_bytes(self) -> int:
        """Bytes of codebooks that stay loaded whatever the context."""
        return sum(
            layer.key_codec.resident_bytes + layer.value_codec.resident_bytes
            for layer in self.compressed_layers
        )

    # What transformers asks of a whole cache, where the positions must follow the layers.

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens."""
        super().crop(tokens_to_remove)
        self.positions.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch, as beam search asks for."""
        super().reorder_cache(beam_idx)
        self.positions.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch."""
        super().batch_select_indices(indices)
        self.positions.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.positions.repeat(repeats)

    def reset(self) -> None:
        """Forget everything; the cache can be used again."""
        super().reset()
        self.positions.crop(0)


def mean_bits(codecs: list[Codec]) -> float:
    """Bits an element over several codecs, each weighted by the elements it stores a token."""
    weights = [codec.spec.kv_heads * codec.spec.head_dim for codec in codecs]
    total = sum(codec.bits_per_element * w for codec, w in zip(codecs, weights, strict=True))
    return total / max(1, sum(weights))


_described: weakref.WeakKeyDictionary[Any, tuple[AttentionSpec, dict[int, Any]]] = (
    weakref.WeakKeyDictionary()
)


def _describe(model: PreTrainedModel) -> tuple[AttentionSpec, dict[int, Any]]:
    """Probing costs a forward pass: once a model, not once a cache."""
    if model not in _described:
        _described[model] = describe_and_probe(model)
    return _described[model]
