"""The probe: what it finds out about each family's rotation, and the model it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from commvq_core.errors import InputError
from commvq_core.models import attention_modules, describe_and_probe, describe_model
from commvq_core.probe import capture_position_embeddings, probe_rotation
from commvq_core.rope import pair_table
from tests.cache.families import FAMILIES, build, build_config, build_from

# family -> (rotary dims, pair layout, compressible) of each of its two layers, from the papers and
# the configs; most are the same in both layers.
HALF_16 = (16, "half", True)
_HEADS = {f"llama-head-{dim}": [(dim, "half", True)] * 2 for dim in (64, 80, 96, 128, 256)}
EXPECTED: dict[str, list[tuple[int, str, bool]]] = {
    **_HEADS,
    "qwen2-sliding": [HALF_16, (16, "half", False)],
    "gemma2": [(16, "half", False), HALF_16],
    "gemma3": [(16, "half", False), HALF_16],
    "gpt-oss": [(16, "half", False), HALF_16],
    "phi3-partial": [(8, "half", True)] * 2,
    "glm4": [(8, "interleaved", True)] * 2,
    "cohere2": [(16, "interleaved", False), (0, "half", True)],
    "stablelm": [(4, "half", True)] * 2,
    "smollm3": [HALF_16, (0, "half", True)],
    "gpt-neox": [(4, "half", True)] * 2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_dims_layout_and_window_are_found_without_knowing_the_family(family: str) -> None:
    spec = describe_model(build(family))
    found = [(layer.rotary_dim, layer.pair_layout, layer.compressible) for layer in spec.layers]
    assert found == EXPECTED.get(family, [HALF_16] * 2)
    windows = [layer.sliding_window for layer in spec.layers]
    assert windows == [None if layer.compressible else 16 for layer in spec.layers]
    assert {layer.heads for layer in spec.layers} == {4}
    kv_heads = {"llama-one-kv-head": 1, "llama-no-gqa": 4, "gpt-neox": 4, "stablelm": 2}
    assert {layer.kv_heads for layer in spec.layers} == {kv_heads.get(family, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-yarn", "llama-llama3", "glm4", "gemma3"])
def test_the_found_frequencies_give_the_models_own_tables_at_any_position(
    family: str, dtype: torch.dtype
) -> None:
    model = build(family, dtype)
    modules = attention_modules(model)
    _, probed = describe_and_probe(model)
    positions = torch.tensor([[3, 4, 77, 511]])
    with torch.no_grad(), capture_position_embeddings(modules) as tables:
        model(input_ids=torch.full((1, 4), 7), position_ids=positions)
    assert sorted(tables) == [0, 1]
    for index, own in tables.items():
        rotary = probed[index].rotary
        for table, ours in zip(own, rotary.cos_sin(positions, dtype), strict=True):
            assert torch.equal(pair_table(table, rotary.rotary_dim).float(), ours)


def test_yarns_scale_is_found() -> None:
    _, probed = describe_and_probe(build("llama-yarn"))
    assert probed[0].rotary.scale == pytest.approx(0.1 * torch.tensor(8.0).log().item() + 1)


def test_every_module_keeps_its_own_training_mode() -> None:
    model = build("llama")
    model.train()
    frozen = [module for name, module in model.named_modules() if name.endswith("layers.1")]
    for module in frozen:
        module.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    describe_model(model)
    assert {name: module.training for name, module in model.named_modules()} == before


class Broken(nn.Module):
    """Fails in its forward pass, after its submodules were told to evaluate."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, **_: Any) -> None:
        assert not self.inner.training
        raise RuntimeError("out of\nluck")


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_that_fails_is_one_line_and_leaves_no_trace(training: bool) -> None:
    model: Any = Broken(build("llama"))
    model.train(training)
    with pytest.raises(
        InputError, match=r"Broken failed on a one-token forward pass \(out of luck"
    ):
        probe_rotation(model, attention_modules(model))
    assert all(module.training == training for module in model.modules())
    assert hooks(model) == 0


def test_a_probe_leaves_no_hooks_and_no_gradients() -> None:
    model = build("llama")
    describe_model(model)
    assert hooks(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_of_few_positions_and_few_tokens_is_probed_within_them() -> None:
    config = build_config("LlamaConfig", max_position_embeddings=6, vocab_size=5)
    assert describe_model(build_from(config)).layers[0].rotary_dim == 16


def test_a_model_without_frequency_buffers_is_read_from_its_tables() -> None:
    model = build("llama")
    want = describe_and_probe(model)[1][0].rotary.inv_freq
    embedding = model.model.rotary_emb
    frequencies = embedding.inv_freq.clone()
    del embedding.inv_freq
    if hasattr(embedding, "original_inv_freq"):
        del embedding.original_inv_freq
    embedding.inv_freq = frequencies  # a plain attribute: no buffer to be found
    got = describe_and_probe(model)[1][0].rotary.inv_freq
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def scrambled(model: Any) -> Any:
    """Rotate by something else than what the attention modules are told."""
    forward = model.model.rotary_emb.forward

    def lie(x: Any, position_ids: Any) -> Any:
        cos, sin = forward(x, position_ids)
        return cos + 0.3 * position_ids[..., None], sin

    model.model.rotary_emb.forward = lie
    return model


def test_rotation_that_follows_no_frequencies_is_refused() -> None:
    with pytest.raises(InputError, match=r"layer 0: .*(not plain RoPE|length of the context)"):
        describe_model(scrambled(build("llama")))


def test_layers_that_rotate_alike_share_one_rotation() -> None:
    """Else every layer would make tables of its own, in every forward pass."""
    for family, kinds in (("llama", 1), ("smollm3", 2), ("gemma3", 2)):
        model = build(family)
        found = probe_rotation(model, attention_modules(model))
        assert len({id(layer.rotary) for layer in found.values()}) == kinds, family
