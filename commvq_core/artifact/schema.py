"""An artifact in memory, and the names its files use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from commvq_core.codecs.base import Codec
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.errors import InputError
from commvq_core.models import AttentionSpec
from commvq_core.sides import Side

FORMAT = "commvq-artifact"
VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "codebooks.safetensors"
CARD_FILE = "README.md"


def tensor_name(layer: int, side: str, tensor: str) -> str:
    """The name of a codec's tensor in `codebooks.safetensors`."""
    return f"layers.{layer}.{side}.{tensor}"


def artifact_name(bits: float, preset: str = "default") -> str:
    """ "commvq-1bit", or "published-1.06bit", as results and benchmarks call it."""
    return f"{'commvq' if preset == 'default' else preset}-{round(bits, 2):g}bit"


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. `codecs` maps a layer index to its (key codec, value codec).

    `source` is the folder or hub id that it was loaded from, or None.
    """

    name: str
    config: dict[str, Any]
    spec: AttentionSpec
    codecs: dict[int, tuple[Codec, Codec]]
    source: str | None = None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the models this artifact is for."""
        return self.spec.fingerprint

    @property
    def coded_layers(self) -> dict[int, tuple[Codec, Codec]]:
        """`codecs`, but for layers whose keys and values both stay exact."""
        return {
            index: pair
            for index, pair in self.codecs.items()
            if not all(isinstance(codec, IdentityCodec) for codec in pair)
        }

    @property
    def bits_per_element(self) -> float:
        """Bits a scalar of K and V costs, averaged over what has codes."""
        from commvq_core.cache.cache import mean_bits

        codecs = [codec for pair in self.codecs.values() for codec in pair]
        coded = [codec for codec in codecs if not isinstance(codec, IdentityCodec)]
        return mean_bits(coded or codecs)

    @property
    def resident_bytes(self) -> int:
        """Bytes of codebooks that stay loaded whatever the context."""
        return sum(codec.resident_bytes for pair in self.codecs.values() for codec in pair)

    def only(self, side: Side) -> Artifact:
        """The same with codes for that side alone; the other is stored as it is, in float32."""
        codecs: dict[int, tuple[Codec, Codec]] = {}
        for index, (key, value) in self.codecs.items():
            if side == "key":
                codecs[index] = (key, IdentityCodec(value.spec))
            else:
                codecs[index] = (IdentityCodec(key.spec), value)
        return replace(self, name=f"{self.name}-{side}s", codecs=codecs)

    def check_fits(self, spec: AttentionSpec) -> None:
        """Raise InputError, naming a field that differs, when a model is not the artifact's."""
        if spec.fingerprint == self.fingerprint:
            return
        mine, theirs = self.spec.to_json(), spec.to_json()
        for field in ("model_type", "hidden_size", "vocab_size"):
            if mine[field] != theirs[field]:
                difference = f"{field} {mine[field]} there, {theirs[field]} in the model"
                break
        else:
            if len(mine["layers"]) != len(theirs["layers"]):
                difference = (
                    f"{len(mine['layers'])} layers there, {len(theirs['layers'])} in the model"
                )
            else:
                difference = next(
                    (
                        f"layer {a['index']} has {field} {a[field]} there, {b[field]} in the model"
                        for a, b in zip(mine["layers"], theirs["layers"], strict=True)
                        for field in a
                        if a[field] != b[field]
                    ),
                    "the rotary frequencies differ",
                )
        raise InputError(
            f"the codebooks are for another model, {self.config.get('model')} ({difference})",
            "train codebooks for this model, or load the model they were made for",
        )
