"""Models: loaded, described and fingerprinted, or refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from commvq_core.errors import InputError
from commvq_core.models import (
    AttentionSpec,
    LayerSpec,
    attention_modules,
    describe_model,
    load_model,
)
from tests.cache.families import build, build_config, build_from


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_a_folder_is_loaded_ready_to_run(tiny_model_dir: Path) -> None:
    loaded = load_model(str(tiny_model_dir), device="cpu")
    assert loaded.source == str(tiny_model_dir)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.spec == describe_model(loaded.model)
    ids = loaded.tokenizer("the rain", return_tensors="pt").input_ids
    assert loaded.model(ids).logits.shape[-1] == loaded.spec.vocab_size
    layer = LayerSpec(0, 4, 2, 32, 32, "half", None, True)
    assert loaded.spec.layers == (layer, replace(layer, index=1))
    assert (loaded.spec.model_type, loaded.spec.hidden_size) == ("llama", 64)


def test_a_hub_id_goes_to_transformers_as_it_is(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        load = getattr(transformers, name).from_pretrained

        def from_hub(source: Any, *args: Any, load: Any = load, **kwargs: Any) -> Any:
            asked.append(str(source))
            found = tiny_model_dir if source == "someone/model" else source
            return load(found, *args, **kwargs)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_hub)
    assert load_model("someone/model", device="cpu").source == "someone/model"
    assert set(asked) == {"someone/model", str(tiny_model_dir)}
    assert asked[:2] == ["someone/model"] * 2


@pytest.mark.parametrize(
    ("stored", "asked", "given"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),  # a CPU computes fp16 slowly
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(
    tmp_path: Path, tiny_model_dir: Path, stored: torch.dtype, asked: str, given: torch.dtype
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    assert load_model(str(folder), device="cpu", dtype=asked).model.dtype == given


def test_attention_modules_come_in_the_order_of_the_layers() -> None:
    found = attention_modules(build("qwen3-moe"))
    assert [index for index, _ in found] == [0, 1]
    assert {type(module).__name__ for _, module in found} == {"Qwen3MoeAttention"}


def test_a_description_goes_through_json_unchanged() -> None:
    spec = describe_model(build("cohere2"))
    assert AttentionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert [layer.index for layer in spec.compressible] == [1]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("layers"),
        lambda s: s.update(layers=3),
        lambda s: s.update(layers=[3]),
        lambda s: s.update(unknown=1),
        lambda s: s.update(fingerprint=7),
        lambda s: s.update(hidden_size=True),
        lambda s: s.update(layers=s["layers"] * 2),
        lambda s: s["layers"][0].pop("heads"),
        lambda s: s["layers"][0].update(heads=0),
        lambda s: s["layers"][0].update(head_dim=16.0),
        lambda s: s["layers"][0].update(rotary_dim=-2),
        lambda s: s["layers"][0].update(rotary_dim=3),
        lambda s: s["layers"][0].update(compressible=1),
        lambda s: s["layers"][0].update(pair_layout="thirds"),
        lambda s: s["layers"][0].update(sliding_window="16"),
    ],
)
def test_a_description_that_makes_no_sense_is_not_read(change: Any) -> None:
    value = json.loads(json.dumps(describe_model(build("llama")).to_json()))
    change(value)
    with pytest.raises((KeyError, TypeError, ValueError)):
        AttentionSpec.from_json(value)


def fingerprint(dtype: torch.dtype = torch.float32, **fields: Any) -> str:
    return describe_model(build_from(build_config("LlamaConfig", **fields), dtype)).fingerprint


def test_a_fingerprint_is_the_same_for_every_dtype_and_any_weights() -> None:
    base = fingerprint()
    assert fingerprint(torch.bfloat16) == fingerprint(torch.float16) == base
    tuned = build("llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert describe_model(tuned).fingerprint == base
    assert fingerprint(num_attention_heads=4, intermediate_size=128) == base


def test_a_fingerprint_tells_shapes_and_rotations_apart() -> None:
    found = {
        fingerprint(),
        fingerprint(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        fingerprint(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        fingerprint(num_key_value_heads=4),
        fingerprint(num_attention_heads=2, num_key_value_heads=2),
        fingerprint(head_dim=32),
        fingerprint(num_hidden_layers=3),
        fingerprint(vocab_size=201),
        describe_model(build("qwen3")).fingerprint,
    }
    assert len(found) == 9


_ROPE = {"rope_theta": 10000.0}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "latent attention": (
        "DeepseekV3Config",
        {**_MLA, "v_head_dim": 8, "num_hidden_layers": 1, "first_k_dense_replace": 1},
        "DeepseekV3ForCausalLM uses multi-head latent attention",
    ),
    "dynamic NTK": (
        "LlamaConfig",
        {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 2.0}},
        "uses dynamic-NTK RoPE",
    ),
    "learnt positions": ("GPT2Config", {"n_embd": 64, "n_head": 4}, "without rotary embeddings"),
    "alibi": ("BloomConfig", {"n_head": 4}, "does not use rotary position embeddings"),
    "no attention": ("MambaConfig", {}, "has no attention layers that commvq knows"),
    "sliding windows only": (
        "MistralConfig",
        {"sliding_window": 16},
        "no attention layer of MistralForCausalLM keeps a plain cache",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_attention_that_codes_cannot_serve_is_refused_in_one_line(name: str) -> None:
    config_class, fields, message = UNSUPPORTED[name]
    with pytest.raises(InputError, match=message) as refused:
        describe_model(build_from(build_config(config_class, **fields)))
    assert "\n" not in str(refused.value)


def test_an_encoder_decoder_is_refused_in_one_line() -> None:
    config = transformers.T5Config(
        d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1, vocab_size=64
    )
    model: Any = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder"):
        describe_model(model)


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        load_model(str(source), **{"device": "cpu", **options})
    assert "\n" not in str(refused.value)
    assert refused.value.mend
    return str(refused.value)


def test_an_encoder_decoder_on_disk_is_refused(copied: Path) -> None:
    (copied / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')
    assert "can't be loaded as a causal language model" in refusal(copied)


def test_places_without_a_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    for source in ("gone/deep/er", "/gone", "./gone", "../gone", "~/gone-from-home"):
        assert f"{source} does not exist: give a hub id, a folder or a .gguf" in refusal(source)
    assert "empty has no config.json" in refusal(tmp_path / "empty")
    assert "notes.txt is not a model" in refusal(tmp_path / "notes.txt")
    assert "has no config.json" in refusal("")


def test_a_hub_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to the hub\nlong explanation")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    line = refusal("someone/no-such-model")
    assert "someone/no-such-model can't be loaded" in line
    assert "(We couldn't connect to the hub): check the name, the files and the network" in line


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "no-such-architecture"}', "{}"])
def test_a_folder_with_a_damaged_config_is_refused(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    assert "can't be loaded as a causal language model" in refusal(copied)


def test_a_folder_without_weights_or_with_weights_cut_short_is_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "can't be loaded as a causal language model" in refusal(copied)
    weights.unlink()
    assert "can't be loaded as a causal language model" in refusal(copied)


def test_a_checkpoint_that_lacks_weights_is_refused_not_filled_with_random_numbers(
    copied: Path,
) -> None:
    tensors = load_file(copied / "model.safetensors")
    lost = "model.layers.1.self_attn.v_proj.weight"
    tensors.pop(lost)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert f"lacks 1 of the model's weights ({lost})" in refusal(copied)


def test_a_folder_without_a_tokenizer_is_refused(copied: Path) -> None:
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert "can't be loaded as a causal language model" in refusal(copied)


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "cpu:x", "", "meta-device"])
def test_devices_that_are_not_there_are_refused(tiny_model_dir: Path, device: str) -> None:
    assert f"device {device}".strip() in refusal(tiny_model_dir, device=device)


@pytest.mark.parametrize("dtype", ["int8", "float64", "", "torch.float32"])
def test_dtypes_that_are_not_offered_are_refused(tiny_model_dir: Path, dtype: str) -> None:
    assert "is not known: give auto, float32, bfloat16, float16" in refusal(
        tiny_model_dir, dtype=dtype
    )
