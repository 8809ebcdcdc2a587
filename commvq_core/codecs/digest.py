"""A hash of codebooks: two caches with the same one understand each other's codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

from commvq_core.codecs.base import Codec

LayerCodecs = Mapping[int, tuple[Codec, Codec]]  # layer index -> (key codec, value codec)


def codecs_sha256(codecs: LayerCodecs) -> str:
    """SHA-256 over what codes are decoded with: every codec's settings and tensors."""
    digest = hashlib.sha256()
    for index, pair in sorted(codecs.items()):
        for codec in pair:
            header = [index, codec.spec.side, codec.name, codec.config()]
            digest.update(json.dumps(header, sort_keys=True).encode())
            for name, tensor in sorted(codec.tensors().items()):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
