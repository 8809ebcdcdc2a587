"""Recording sees what every architecture's attention computes, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from commvq_core.calibration.collect import query_energy_sum, value_gram
from commvq_core.calibration.recorder import Recorded, recording
from commvq_core.errors import InputError
from commvq_core.models import LayerSpec, attention_modules, describe_model
from commvq_core.rope import to_pairs
from tests.calibration.models import ARCHITECTURES, Projections, build

TOKENS = 23  # more than the sliding windows, and no number of heads


def token_ids(tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 64, (1, tokens), generator=generator)


def record(model: Any, ids: torch.Tensor) -> dict[int, tuple[LayerSpec, Recorded]]:
    seen: dict[int, tuple[LayerSpec, Recorded]] = {}
    layers = {layer.index: layer for layer in describe_model(model).compressible}
    with recording(model, layers, lambda layer, r: seen.update({layer.index: (layer, r)})):
        model(input_ids=ids, use_cache=False)
    return seen


def naive_energy(query: torch.Tensor, layer: LayerSpec) -> torch.Tensor:
    """The sum of |q_pair|^2 over tokens and query heads, by loops; query [tokens, heads, dim]."""
    pairs = to_pairs(query.double(), rotary_dim=layer.rotary_dim, layout=layer.pair_layout)
    total = torch.zeros(layer.kv_heads, layer.head_dim // 2, dtype=torch.float64)
    for head in range(layer.heads):
        for pair in range(layer.head_dim // 2):
            both = pairs[:, head, 2 * pair : 2 * pair + 2]
            total[head * layer.kv_heads // layer.heads, pair] += (both * both).sum()
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_before_rope_are_what_the_projections_gave(name: str) -> None:
    model = build(name)
    modules = dict(attention_modules(model))
    layers = describe_model(model).compressible
    projections = {
        layer.index: Projections(modules[layer.index], layer.heads, layer.kv_heads, layer.head_dim)
        for layer in layers
    }
    seen = record(model, token_ids())
    assert sorted(seen) == [layer.index for layer in layers]
    for index, (layer, recorded) in seen.items():
        truth = projections[index]
        key, value = recorded.key[0].transpose(0, 1), recorded.value[0].transpose(0, 1)
        assert key.dtype == torch.float32
        torch.testing.assert_close(key, truth.key, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value, truth.value, rtol=0, atol=0)
        energy = query_energy_sum(recorded.query[0], layer, recorded.scale)
        expected = naive_energy(truth.query, layer)
        torch.testing.assert_close(energy, expected, rtol=1e-5, atol=1e-6)


def test_yarn_lengthens_what_attention_sees_and_the_recording_takes_it_out() -> None:
    # Guards the test above: with a scale of 1 it could not tell whether the scale is handled.
    _, recorded = record(build("llama-yarn"), token_ids())[0]
    assert recorded.scale == pytest.approx(0.1 * torch.log(torch.tensor(4.0)).item() + 1, rel=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_value_metric_is_the_product_of_the_output_weights(name: str) -> None:
    model = build(name)
    modules = dict(attention_modules(model))
    for layer in describe_model(model).compressible:
        weight = modules[layer.index].get_submodule("o_proj").weight.detach().double()
        expected = torch.zeros(layer.kv_heads, layer.head_dim, layer.head_dim, dtype=torch.float64)
        for head in range(layer.heads):
            part = weight[:, head * layer.head_dim : (head + 1) * layer.head_dim]
            expected[head * layer.kv_heads // layer.heads] += part.T @ part
        gram = value_gram(modules[layer.index], layer)
        assert gram.dtype == torch.float32
        torch.testing.assert_close(gram.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_value_metric_measures_the_error_after_the_output_projection() -> None:
    model = build("llama")
    layer = describe_model(model).layers[0]
    module = dict(attention_modules(model))[0]
    error = torch.randn(layer.head_dim, generator=torch.Generator().manual_seed(3))
    group = layer.heads // layer.kv_heads
    expected = 0.0
    for head in range(group, 2 * group):  # the query heads of KV head 1
        inputs = torch.zeros(layer.heads * layer.head_dim)
        inputs[head * layer.head_dim : (head + 1) * layer.head_dim] = error
        expected += module.get_submodule("o_proj")(inputs).square().sum().item()
    got = float(error @ value_gram(module, layer)[1] @ error)
    assert got == pytest.approx(expected, rel=1e-5)


def test_attention_without_an_ordinary_output_projection_is_refused() -> None:
    model = build("llama")
    layer = describe_model(model).layers[0]
    module = dict(attention_modules(model))[0]
    module.o_proj = torch.nn.Identity()
    with pytest.raises(InputError, match="layer 0 has no output projection of 64 inputs"):
        value_gram(module, layer)


def fingerprint_of_state(model: Any) -> tuple[Any, ...]:
    """Everything that recording touches."""
    return (
        [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        [module.training for module in model.modules()],
        sorted(AttentionInterface._global_mapping),
        sorted(AttentionMaskInterface._global_mapping),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recording_changes_no_output(name: str) -> None:
    model = build(name)
    ids = token_ids()
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
    layers = {layer.index: layer for layer in describe_model(model).compressible}
    with recording(model, layers, lambda layer, recorded: None):
        watched = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(plain, watched)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "gemma3-sliding"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_also_after_an_exception(
    name: str, error: type[BaseException]
) -> None:
    model = build(name)
    layers = {layer.index: layer for layer in describe_model(model).compressible}
    model.train().get_submodule("model.layers.1").eval()
    before = fingerprint_of_state(model)
    with recording(model, layers, lambda layer, recorded: None):
        model(input_ids=token_ids(), use_cache=False)
    assert fingerprint_of_state(model) == before

    def fail(layer: LayerSpec, recorded: Recorded) -> None:
        assert not model.training
        raise error("stop")

    with pytest.raises(error, match="stop"):
        with recording(model, layers, fail):
            model(input_ids=token_ids(), use_cache=False)
    assert fingerprint_of_state(model) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_models_own_attention_function_still_runs(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    model = build("llama")
    model.set_attn_implementation(implementation)
    layers = {layer.index: layer for layer in describe_model(model).compressible}
    called = []
    eager = modeling_llama.eager_attention_forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        called.append("eager")
        return eager(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", watched)
    with recording(model, layers, lambda layer, recorded: None):
        model(input_ids=token_ids(), use_cache=False)
    assert called == (["eager"] * 2 if implementation == "eager" else [])


def test_two_models_can_be_recorded_at_once() -> None:
    first, second = build("llama", seed=1), build("qwen3-k-norm", seed=2)
    alone = record(second, token_ids())[1][1].key
    seen = []
    layers = {layer.index: layer for layer in describe_model(first).compressible}
    with recording(first, layers, lambda layer, recorded: seen.append(layer.index)):
        both = record(second, token_ids())[1][1].key
        first(input_ids=token_ids(), use_cache=False)
    assert seen == [0, 1]
    assert torch.equal(alone, both)
