"""A decoding step never asks the device for a number, which would make the host wait for it.

On CPU tensors what asks is the same operator as on a GPU, and raises here. The steps that encode
(every 16th) may ask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from commvq_core.cache.cache import CommVQCache
from commvq_core.cache.layer import ENCODE_BATCH
from tests.cache.families import build
from tests.cache.lossy_codecs import preset_codecs
from tests.cache.ways import prompt

aten = torch.ops.aten
ASKING = {
    aten._local_scalar_dense.default,  # item, int, bool, tolist of one number
    aten.nonzero.default,  # and indexing by a mask
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
}


class Asked(TorchDispatchMode):
    """Counts what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in ASKING:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_asks() -> None:
    with Asked() as asked:
        assert int(torch.arange(3)[1]) == 1
        assert bool(torch.ones(2).any())
        torch.ones(2).nonzero()
    assert len(asked.names) == 3


def asked_in_steps(family: str, rows: int, mask: Tensor | None, strict: bool = False) -> list[str]:
    """What 5 steps asked after a prompt of 60 tokens and one step."""
    model = build(family)
    asked = Asked()
    codecs = preset_codecs(model, "default")
    with CommVQCache(model, codecs, window=8, sinks=2, strict=strict) as cache, torch.no_grad():
        for start, stop in [(0, 60), *((at, at + 1) for at in range(60, 66))]:
            given: dict[str, Any] = {"input_ids": prompt(rows, stop - start, start)}
            if mask is None:
                given["position_ids"] = torch.arange(start, stop).expand(rows, -1)
            else:
                given["attention_mask"] = mask[:, :stop]
                given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
            if start > 60:
                assert cache.compressed_layers[0].steps + 1 < ENCODE_BATCH
                with asked:
                    model(**given, past_key_values=cache)
            else:
                model(**given, past_key_values=cache)
    return asked.names


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "glm4", "gemma2", "smollm3", "gpt-oss"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_asks_nothing(family: str, rows: int) -> None:
    """Also layers without rotation, soft-capping and learnt sinks."""
    assert asked_in_steps(family, rows, None) == []


@pytest.mark.parametrize("padding", [0, 17])
def test_a_mask_is_asked_once_a_step_not_once_a_layer(padding: int) -> None:
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :padding] = 0
    assert len(asked_in_steps("llama", 2, mask)) == 5
