"""Codecs by name. docs/add-a-codec.md says how to add one."""

from __future__ import annotations

from commvq_core.codecs.additive import AdditiveCodec
from commvq_core.codecs.base import Codec, FittedCodec
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.codecs.neural import NeuralValueCodec
from commvq_core.codecs.published import PublishedKeyCodec

CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (AdditiveCodec, IdentityCodec, PublishedKeyCodec, NeuralValueCodec)
}

# Which codec a preset uses for keys and for values.
PRESETS: dict[str, tuple[type[FittedCodec], type[FittedCodec]]] = {
    "default": (AdditiveCodec, AdditiveCodec),
    "published": (PublishedKeyCodec, NeuralValueCodec),
}
