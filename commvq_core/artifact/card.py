"""The hub model card of an artifact: its README.md."""

from __future__ import annotations

from typing import Any


def model_card(config: dict[str, Any]) -> str:
    """Markdown with the hub's metadata header; `config` is the artifact's config.json."""
    layers = config["layers"]
    distortions = {
        side: sum(layer[side]["distortion"] for layer in layers) / len(layers)
        for side in ("key", "value")
    }
    errors = f"{distortions['key']:.4f} / {distortions['value']:.4f}"
    training = config["training"]
    return f"""---
library_name: commvq
tags: [kv-cache, quantization, commvq]
---

# {config["name"]} for {config["model"]}

Codebooks that hold the key-value cache of `{config["model"]}` (or any model with the same
architecture and RoPE) in **{config["bits_per_element"]:.2f} bits an element**.

| | |
|---|---|
| preset | {config["preset"]} |
| compressed layers | {len(layers)} |
| codebooks in memory | {config["resident_bytes"] / 2**20:.1f} MiB |
| relative error of keys / values, weighted, held out | {errors} |
| calibration tokens | {training["tokens"]:,} |

```python
from commvq_core import CommVQCache
with CommVQCache.from_pretrained("path/or/hub-id", model) as cache:
    out = model.generate(**inputs, past_key_values=cache)
```

Method: additive vector quantization whose key codebooks commute with RoPE
(CommVQ, arXiv 2506.18879).
"""
