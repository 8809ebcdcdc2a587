"""A compressed cache on a GPU gives what it gives on a CPU; skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from commvq_core import CommVQCache
from commvq_core.bench.shapes import random_codecs
from commvq_core.models import describe_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


def model_on(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).to(device, dtype).eval()


def logits(folder: Path, device: str, prefill: int, chunk: int = 2048) -> tuple[Tensor, int]:
    """Of two rows of 300 tokens: a prompt in pieces of `chunk`, then one at a time."""
    model = model_on(folder, device)
    ids = torch.randint(2, 300, (2, 300), generator=torch.Generator().manual_seed(0)).to(device)
    codecs = random_codecs(describe_model(model), 1.0)
    found = []
    with torch.no_grad(), CommVQCache(model, codecs, window=32, prefill_chunk=chunk) as cache:
        found.append(model(ids[:, :prefill], past_key_values=cache).logits)
        for step in range(prefill, ids.shape[1]):
            found.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
        coded = cache.compressed_layers[0].code_length
    return torch.cat(found, dim=1).cpu(), coded


@pytest.mark.parametrize(("prefill", "chunk"), [(1, 2048), (200, 2048), (250, 70)])
def test_a_gpu_gives_what_a_cpu_gives(tiny_model_dir: Path, prefill: int, chunk: int) -> None:
    want, coded = logits(tiny_model_dir, "cpu", prefill, chunk)
    got, also_coded = logits(tiny_model_dir, "cuda", prefill, chunk)
    assert coded == also_coded == 268
    # A code that falls the other way at a tie moves a logit more than rounding does.
    error = (got - want).abs().flatten()
    assert float(error.median()) < 2e-3 * float(want.abs().max())
    assert float((got.argmax(-1) == want.argmax(-1)).float().mean()) > 0.97


def test_text_is_generated(tiny_model_dir: Path) -> None:
    model = model_on(tiny_model_dir, "cuda", torch.bfloat16)
    ids = torch.randint(2, 300, (1, 260), generator=torch.Generator().manual_seed(0)).cuda()
    with CommVQCache(model, random_codecs(describe_model(model), 1.0), window=32) as cache:
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=40, min_new_tokens=40, do_sample=False
        )
    assert out.shape == (1, 300)
