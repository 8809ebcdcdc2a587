"""docs/compatibility.md, written from the matrix that the tests run.

`python -m tests.cache.compatibility` writes it; a test fails when it is not what this writes.
"""

from __future__ import annotations

from pathlib import Path

from commvq_core.models import describe_model
from tests.cache.families import FAMILIES, build
from tests.cache.ways import WAYS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def page() -> str:
    """The page's text. Every family is tested in every way, so a cell has no other value."""
    lines = [
        "# Which models, and which ways to generate",
        "",
        "Made by `python -m tests.cache.compatibility` from the matrix that `make test` runs; a",
        "test fails when the two differ. Every family below, as a tiny model with random weights,",
        "gives in every way the tokens or logits that it gives with transformers' own cache, when",
        "the codec loses nothing (tests/cache/test_ways.py). With codes that lose something,",
        "Llama, GLM-4 and SmolLM3 (half and interleaved pairs, partial rotation, a layer without",
        "RoPE) do in every way what a slow float64 reference cache does, with both presets",
        "(tests/cache/test_lossy_ways.py).",
        "",
        "## Families",
        "",
        "| family | layers that get codes | rotated dims of a head | pairs | KV heads / heads |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        layers = describe_model(build(family)).layers
        coded = [layer for layer in layers if layer.compressible]
        rotated = " and ".join(
            dict.fromkeys(f"{layer.rotary_dim} of {layer.head_dim}" for layer in coded)
        )
        layouts = dict.fromkeys(layer.pair_layout for layer in coded if layer.rotary_dim)
        lines.append(
            f"| {family} | {len(coded)} of {len(layers)} | {rotated} | {', '.join(layouts)} "
            f"| {coded[0].kv_heads} / {coded[0].heads} |"
        )
    lines += [
        "",
        "Layers that get no codes have a sliding window or another state and keep transformers'",
        "own cache; `commvq inspect` and `commvq eval` name them, and bits count the others.",
        "",
        "## Ways",
        "",
        *(f"- {way}" for way in WAYS),
        "",
        "Beside the matrix: models in bfloat16 and float16 (within twice the error of plain",
        "attention), `prefill_chunk` of any size, saving and loading, random sequences of",
        "appending, cropping, choosing rows and saving (hypothesis), batches of different lengths",
        "against each prompt alone, `pipeline`, offloading layers to the CPU.",
        "",
        "## Refused, in one line",
        "",
        "- encoder-decoders, multi-head latent attention, models without RoPE or whose attention",
        "  does not go through transformers' attention interface;",
        "- RoPE that changes with the context: dynamic NTK, and longrope past its original length;",
        "- models in which every layer has a sliding window;",
        "- a cache of another model or other weights, or made with other codebooks.",
        "",
        "Not done: `torch.compile` of a decoding step. Codes grow, and `generate()` is told so",
        "(`is_compileable` is False), so that it runs the model as it is.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
