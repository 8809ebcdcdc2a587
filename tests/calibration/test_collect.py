"""`calibrate`: what it stores, and what it refuses before it writes anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commvq_core.calibration.collect import CalibrationConfig, calibrate, sampled_tokens
from commvq_core.calibration.data import iter_documents, tokenize_sequences
from commvq_core.calibration.store import CalibrationStore
from commvq_core.errors import InputError
from commvq_core.models import LoadedModel, attention_modules, describe_model, load_model
from tests.calibration.models import Projections, build
from tests.calibration.stores import contents


def sequences_of(loaded: LoadedModel, config: CalibrationConfig) -> list[torch.Tensor]:
    documents = iter_documents(config.datasets)
    return tokenize_sequences(
        loaded.tokenizer, documents, tokens=config.tokens, seq_len=config.seq_len
    )


def truth(
    loaded: LoadedModel, sequences: list[torch.Tensor], layer: int
) -> dict[str, torch.Tensor]:
    """What a layer's projections give for every token, [tokens, heads, head_dim]."""
    spec = loaded.spec.layers[layer]
    module = dict(attention_modules(loaded.model))[layer]
    projections = Projections(module, spec.heads, spec.kv_heads, spec.head_dim)
    parts: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}
    with torch.inference_mode():
        for sequence in sequences:
            loaded.model(input_ids=sequence[None])
            for name, kept in parts.items():
                kept.append(getattr(projections, name))
    projections.remove()
    return {name: torch.cat(kept) for name, kept in parts.items()}


def test_the_store_holds_what_the_projections_gave(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    manifest = calibrate(loaded, tmp_path / "calib", config)
    store = CalibrationStore.open(tmp_path / "calib")
    assert manifest == store.manifest
    assert (manifest.complete, manifest.chunks, store.token_count) == (True, 5, 300)
    sequences = sequences_of(loaded, config)
    for layer in loaded.spec.layers:
        expected = truth(loaded, sequences, layer.index)
        keys, values = store.load(layer.index, "key"), store.load(layer.index, "value")
        assert keys.dtype == values.dtype == torch.float16
        torch.testing.assert_close(keys.float(), expected["key"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values.float(), expected["value"], rtol=1e-3, atol=1e-3)


def test_the_query_energy_is_the_mean_over_tokens_and_query_heads(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    calibrate(loaded, tmp_path / "calib", config)
    store = CalibrationStore.open(tmp_path / "calib")
    sequences = sequences_of(loaded, config)
    for layer in loaded.spec.layers:
        query = truth(loaded, sequences, layer.index)["query"].double()
        half, group = layer.head_dim // 2, layer.heads // layer.kv_heads
        energy = store.query_energy(layer.index)
        assert energy.dtype == torch.float32
        for head in range(layer.kv_heads):
            mine = query[:, head * group : (head + 1) * group]
            for pair in range(half):
                squares = mine[..., pair] ** 2 + mine[..., pair + half] ** 2
                assert float(energy[head, pair]) == pytest.approx(float(squares.mean()), rel=1e-5)


def test_the_value_metric_is_stored(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    calibrate(loaded, tmp_path / "calib", config)
    store = CalibrationStore.open(tmp_path / "calib")
    weight = dict(attention_modules(loaded.model))[1].get_submodule("o_proj").weight.detach()
    parts = weight.split(32, dim=1)
    expected = torch.stack([a.T @ a + b.T @ b for a, b in (parts[:2], parts[2:])])
    torch.testing.assert_close(store.value_gram(1), expected, rtol=1e-5, atol=1e-5)


def test_the_manifest_says_where_everything_came_from(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    manifest = calibrate(loaded, tmp_path / "calib", replace(config, seed=7, sample=0.5))
    assert manifest.model == loaded.source
    assert manifest.attention == loaded.spec
    assert (manifest.tokens, manifest.seq_len, manifest.sample, manifest.seed) == (300, 32, 0.5, 7)
    (source,) = manifest.sources
    assert source["name"] == config.datasets[0]
    assert source["documents"] == 1
    assert len(source["sha256"]) == 64


def test_sampling_keeps_the_same_tokens_of_every_layer(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    calibrate(loaded, tmp_path / "calib", replace(config, sample=0.25, seed=3))
    store = CalibrationStore.open(tmp_path / "calib")
    sequences = sequences_of(loaded, config)
    rows, start = [], 0
    for number, sequence in enumerate(sequences):
        chosen = sampled_tokens(0.25, len(sequence), 3, number)
        assert len(chosen) == round(0.25 * len(sequence))
        rows.append(chosen + start)
        start += len(sequence)
    chosen = torch.cat(rows)
    assert store.token_count == len(chosen)
    for layer in loaded.spec.layers:
        expected = truth(loaded, sequences, layer.index)
        for side in ("key", "value"):
            got = store.load(layer.index, side).float()  # type: ignore[arg-type]
            torch.testing.assert_close(got, expected[side][chosen], rtol=1e-3, atol=1e-3)


def test_the_query_energy_is_taken_over_all_tokens_however_few_are_stored(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    calibrate(loaded, tmp_path / "all", config)
    calibrate(loaded, tmp_path / "few", replace(config, sample=0.1))
    every, few = (CalibrationStore.open(tmp_path / name) for name in ("all", "few"))
    assert torch.equal(every.query_energy(1), few.query_energy(1))


def test_samples_are_sorted_spread_and_follow_seed_and_sequence() -> None:
    first = sampled_tokens(0.5, 1000, 0, 0)
    assert len(first) == 500
    assert torch.equal(first, first.unique())
    assert 200 < int((first < 500).sum()) < 300
    assert torch.equal(first, sampled_tokens(0.5, 1000, 0, 0))
    assert not torch.equal(first, sampled_tokens(0.5, 1000, 0, 1))
    assert not torch.equal(first, sampled_tokens(0.5, 1000, 1, 0))
    assert torch.equal(sampled_tokens(1.0, 5, 0, 0), torch.arange(5))
    assert len(sampled_tokens(1e-9, 5, 0, 0)) == 1


def test_layers_with_a_sliding_window_are_not_stored(tmp_path: Path, loaded: LoadedModel) -> None:
    model = build("gemma3-sliding", vocab_size=300)
    other = LoadedModel(model, loaded.tokenizer, describe_model(model), "gemma")
    calibrate(other, tmp_path / "calib", CalibrationConfig(tokens=64, seq_len=32))
    store = CalibrationStore.open(tmp_path / "calib")
    assert [layer.index for layer in store.layers] == [1]
    assert not (tmp_path / "calib" / "layer_000").exists()


def test_a_model_in_bf16_gives_a_calibration_in_bf16(
    tmp_path: Path, tiny_model_dir: Path, config: CalibrationConfig
) -> None:
    half = load_model(str(tiny_model_dir), device="cpu", dtype="bfloat16")
    assert calibrate(half, tmp_path / "calib", config).dtype == "bfloat16"
    store = CalibrationStore.open(tmp_path / "calib")
    assert store.load(0, "key").dtype == store.load(0, "value").dtype == torch.bfloat16


def test_two_runs_give_the_same_bytes(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    calibrate(loaded, tmp_path / "a", replace(config, sample=0.5))
    calibrate(loaded, tmp_path / "b", replace(config, sample=0.5))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    calibrate(loaded, tmp_path / "c", replace(config, sample=0.5, seed=1))
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_an_existing_output_is_kept_unless_told_otherwise(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    out = tmp_path / "calib"
    calibrate(loaded, out, config)
    before = contents(out)
    with pytest.raises(InputError, match="exists already"):
        calibrate(loaded, out, replace(config, seed=1, sample=0.5))
    assert contents(out) == before
    with pytest.raises(InputError, match="contradict"):
        calibrate(loaded, out, config, overwrite=True, resume=True)
    manifest = calibrate(loaded, out, replace(config, tokens=64), overwrite=True)
    assert manifest.tokens == 64
    assert len(list(out.rglob("chunk_*"))) == 2, "shards of the old run are gone"


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_files_that_are_no_calibration_are_never_touched(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig, flags: dict[str, Any]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    for out in (tmp_path / "folder", tmp_path / "folder" / "thesis.txt"):
        with pytest.raises(InputError, match=r"exists already|is no calibration"):
            calibrate(loaded, out, config, **flags)
    assert contents(tmp_path) == before


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"datasets": ("gone.txt",)}, r"gone.txt does not exist"),
    "empty file": ({"datasets": ("empty.txt",)}, r"empty.txt is empty"),
    "binary file": ({"datasets": ("binary.txt",)}, r"binary.txt is binary"),
    "not JSON": ({"datasets": ("bad.jsonl",)}, r"bad.jsonl:1 is not JSON"),
    "no column": ({"text_column": "body", "datasets": ("good.jsonl",)}, r"good.jsonl:1 has no col"),
    "little text": ({"datasets": ("good.jsonl",)}, r"fewer than the 300 asked for"),
    "too long": ({"tokens": 9000, "seq_len": 5000}, r"5,000 tokens .* model's 4,096 positions"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_writes_and_removes_nothing(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    overwrite: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_bytes(b"")
    Path("binary.txt").write_bytes(b"\x7fELF\0\0")
    Path("bad.jsonl").write_text("{text}\n")
    Path("good.jsonl").write_text('{"text": "a few words"}\n')
    if overwrite:
        calibrate(loaded, Path("calib"), replace(config, tokens=64))
    before = contents(tmp_path)
    change, message = BAD_INPUT[name]
    with pytest.raises(InputError, match=message) as caught:
        calibrate(loaded, Path("calib"), replace(config, **change), overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
    assert Path("calib").exists() == overwrite


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"sample": 0.0}, r"--sample 0.0 is no share: give a number in \(0, 1\]"),
        ({"sample": 1.5}, "--sample 1.5"),
        ({"sample": float("nan")}, "--sample nan"),
        ({"seq_len": 0}, "--seq-len 0"),
        ({"datasets": ()}, "no text was named"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationConfig(**change)


def test_keys_that_are_not_finite_are_refused_and_the_model_is_left_as_it_was(
    tmp_path: Path, tiny_model_dir: Path, config: CalibrationConfig
) -> None:
    broken = load_model(str(tiny_model_dir), device="cpu")
    broken.model.get_submodule("model.layers.1.self_attn.k_proj").weight.data[5, 5] = float("inf")
    with pytest.raises(InputError, match="the keys of layer 1 are not finite"):
        calibrate(broken, tmp_path / "calib", config)
    assert broken.model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in broken.model.modules())


def test_a_layer_that_bypasses_the_attention_interface_is_refused(
    tmp_path: Path, tiny_model_dir: Path, config: CalibrationConfig
) -> None:
    odd = load_model(str(tiny_model_dir), device="cpu")
    odd.model.get_submodule("model.layers.1.self_attn").forward = lambda hidden_states, **_: (
        hidden_states,
        None,
    )
    with pytest.raises(InputError, match="layer 1 does not use transformers' attention interface"):
        calibrate(odd, tmp_path / "calib", config)


def test_the_shared_fixture_is_a_finished_calibration(tiny_calibration: Path) -> None:
    store = CalibrationStore.open(tiny_calibration)
    assert (store.token_count, len(store.layers)) == (4096, 2)
    assert store.load(0, "key").shape == (4096, 2, 32)
