"""Published quantizers beside ours in one evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commvq_core.cache import backends
from commvq_core.cache.quantized import OwnQuantizedCache, bits_per_element, own_quantized_cache
from commvq_core.calibration.store import CalibrationStore
from commvq_core.codecs.rivals import RIVALS
from commvq_core.errors import InputError
from commvq_core.evaluation.codecs import check_codecs, load_artifacts, resolve_codecs
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.rivals import rival_artifact
from commvq_core.evaluation.runner import evaluate
from commvq_core.evaluation.tasks.perplexity import Perplexity
from commvq_core.models import LoadedModel
from tests.cli.helpers import refusal, succeed_json

SIDE_BY_SIDE = ("kivi-2", "int-3", "kvquant-2", "turboquant-2")
INSTALLED = [name for name, backend in backends.BACKENDS.items() if backend.installed]


def test_rivals_run_side_by_side_on_the_same_examples(
    loaded: LoadedModel, tiny_artifact: Path, tiny_calibration: Path, short: EvalOptions
) -> None:
    codecs = resolve_codecs(
        loaded,
        artifacts=load_artifacts([tiny_artifact]),
        names=SIDE_BY_SIDE,
        window=16,
        sinks=2,
        calibration=tiny_calibration,
    )
    result = evaluate(loaded, codecs, Perplexity(short))
    json.dumps(result, allow_nan=False)
    names = [entry["codec"] for entry in result["results"]]
    assert names == ["fp16", *SIDE_BY_SIDE, "commvq-0.5bit"]
    bits = [entry["bits_per_element"] for entry in result["results"][1:5]]
    # Two heads of 32 dims: two fp16 a group or head, one a head; of KVQuant's keys 24 of 32 * 64
    # are outliers (two bytes of index), of its values 2 of 64 (one), and two fp16 a token.
    kvquant = (2 + 24 * 32 / (32 * 64) + 2 + 2 * 24 / 64 + 32 / 64) / 2
    assert bits == pytest.approx([3.0, 4.0, kvquant, 2.5])
    perplexities = {entry["metrics"]["perplexity"] for entry in result["results"]}
    assert len(perplexities) == 6
    identity = result["results"][1]["identity"]
    assert (identity["window"], identity["sinks"]) == (16, 2)
    assert identity["settings"]["key"] == {"width": 2, "group": 32, "per": "channel"}


@pytest.mark.parametrize("name", ["kivi-4", "int-8", "turboquant-4", "kvquant-4"])
def test_many_bits_are_nearly_fp16(
    name: str, loaded: LoadedModel, tiny_calibration: Path, short: EvalOptions
) -> None:
    codecs = resolve_codecs(loaded, names=[name], window=16, sinks=2, calibration=tiny_calibration)
    entry = evaluate(loaded, codecs, Perplexity(short))["results"][1]
    assert abs(entry["metrics"]["delta_percent"]) < 1.0


def test_the_bytes_of_a_cache_are_its_bits(loaded: LoadedModel) -> None:
    """Codes of 512 tokens, the window in fp16, sinks in fp16, 4 bytes a position."""
    (_, codec) = resolve_codecs(loaded, names=["kivi-2"], window=32, sinks=4)
    ids = torch.randint(3, 200, (1, 544))
    with codec.open(False) as cache, torch.no_grad():
        loaded.model(input_ids=ids, past_key_values=cache)
        scalars = 2 * 2 * 2 * 32  # layers, sides, heads, dims
        codes = 512 * scalars * codec.bits_per_element / 8
        assert cache.nbytes == codes + (32 + 4) * scalars * 2 + 544 * 4


def test_what_all_layers_share_counts_once(loaded: LoadedModel) -> None:
    _, kivi, integers = resolve_codecs(loaded, names=["kivi-2", "int-2"])
    assert kivi.resident_bytes == 0
    assert integers.resident_bytes == 32 * 32 * 4


def test_one_side_alone(loaded: LoadedModel, tiny_calibration: Path) -> None:
    for name in SIDE_BY_SIDE:
        _, keys = resolve_codecs(loaded, names=[name], only="key", calibration=tiny_calibration)
        _, values = resolve_codecs(loaded, names=[name], only="value", calibration=tiny_calibration)
        _, both = resolve_codecs(loaded, names=[name], calibration=tiny_calibration)
        assert keys.name == f"{name}-keys"
        mean = (keys.bits_per_element + values.bits_per_element) / 2
        assert mean == pytest.approx(both.bits_per_element)


def test_levels_come_from_the_calibration(loaded: LoadedModel, tiny_calibration: Path) -> None:
    store = CalibrationStore.open(tiny_calibration)
    keys, values = rival_artifact("kvquant-2", loaded.spec, store).codecs[1]
    middle, half = keys.tensors()["ends"]
    stored = store.load(1, "key").float()
    # Canonical order: pairs of a head side by side.
    pairs = torch.stack((stored[..., :16], stored[..., 16:]), dim=-1).flatten(1)
    low, high = pairs.quantile(torch.tensor([0.005, 0.995]), dim=0)
    assert torch.allclose(middle - half, low, atol=0.05)
    assert torch.allclose(middle + half, high, atol=0.05)
    assert values.tensors()["levels"].diff().min() > 0


def test_what_a_codec_needs_is_said_in_one_line(
    loaded: LoadedModel, tiny_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"kvquant-3 learns .* give --calibration CALIB"):
        check_codecs(["kivi-2", "kvquant-3"])
    with pytest.raises(InputError, match=r"codec kivi-3 is not known: give one of fp16, kivi-1"):
        check_codecs(["kivi-3"])
    with pytest.raises(InputError, match="is no calibration"):
        check_codecs(["kvquant-3"], tmp_path)
    assert check_codecs(["kivi-2"], tmp_path) is None
    missing = backends.Backend("no-such-package", (2,))
    monkeypatch.setitem(backends.BACKENDS, "quanto", missing)
    with pytest.raises(InputError, match=r"quanto cache needs .*: pip install no-such-package"):
        check_codecs(["hf-quanto-2"])


def test_a_calibration_of_another_model_is_refused(
    loaded: LoadedModel, tiny_calibration: Path
) -> None:
    from dataclasses import replace

    store = CalibrationStore.open(tiny_calibration)
    with pytest.raises(InputError, match="is of another model"):
        rival_artifact("kvquant-2", replace(loaded.spec, fingerprint="other"), store)


def test_the_command_line_runs_rivals(
    tiny_model_dir: Path, tiny_text_file: Path, tiny_calibration: Path, tmp_path: Path
) -> None:
    common = ["eval", tiny_model_dir, "--task", "perplexity", "--dataset", tiny_text_file]
    common += ["--limit", 1, "--max-length", 96, "--window", 16, "--out", tmp_path / "p.json"]
    assert "--calibration" in refusal(*common, "--codec", "kvquant-2")
    chosen = ["--codec", "kvquant-2", "--codec", "kivi-4", "--calibration", tiny_calibration]
    result = succeed_json(*common, *chosen)
    assert [entry["codec"] for entry in result["results"]] == ["fp16", "kvquant-2", "kivi-4"]


# transformers' own.


def test_a_package_that_is_there_is_found() -> None:
    assert backends.Backend("torch", ()).installed
    assert not backends.Backend("no-such-package", ()).installed


def test_hqq_is_installed_for_these_tests() -> None:
    assert "hqq" in INSTALLED


@pytest.mark.parametrize("backend", INSTALLED)
def test_transformers_own_cache_strict_is_its_own_decoding(
    backend: str, loaded: LoadedModel
) -> None:
    """Whole at once through the strict cache, or token by token: the same logits."""
    model: Any = loaded.model
    ids = torch.randint(3, 200, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with own_quantized_cache(model, backend, 4, strict=True) as cache:
            parts = [model(input_ids=p, past_key_values=cache).logits for p in ids.split(70, 1)]
        hooks = len(model.get_decoder()._forward_pre_hooks)
        plain = OwnQuantizedCache(model, backend, 4)
        steps = [model(input_ids=ids[:, [i]], past_key_values=plain).logits for i in range(150)]
        exact = model(input_ids=ids).logits
    once = torch.cat(parts, dim=1)
    assert hooks == 0
    assert torch.allclose(once, torch.cat(steps, dim=1), atol=1e-4)
    assert (once - exact).abs().max() > 1e-2
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("backend", INSTALLED)
def test_transformers_own_cache_counts_what_it_holds(backend: str, loaded: LoadedModel) -> None:
    """Groups are a head's 32 dims here: 2 bits, and two fp16 a group."""
    assert bits_per_element(loaded.model, backend, 2) == 3.0
    cache = OwnQuantizedCache(loaded.model, backend, 2)
    states = torch.randn(1, 2, 256, 32)
    for layer in range(2):
        cache.update(states, states, layer)
    assert cache.nbytes == 2 * 2 * 2 * 256 * 32 * 3 // 8
    (_, codec) = resolve_codecs(loaded, names=[f"hf-{backend}-2"])
    assert codec.identity == {"codec": f"hf-{backend}-2", "group": 64, "window": 128, "sinks": 0}
    with pytest.raises(InputError, match="codes both sides"):
        resolve_codecs(loaded, names=[f"hf-{backend}-2"], only="key")


def test_models_that_transformers_own_cache_refuses_are_refused_in_one_line() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 16}
    sliding = MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=8))
    with pytest.raises(InputError, match="can't serve this model"):
        OwnQuantizedCache(sliding, INSTALLED[0], 4)


def test_every_rival_has_a_name_of_method_and_width() -> None:
    assert {"kivi-2", "kivi-4", "int-2", "int-8", "kvquant-2", "turboquant-3"} <= set(RIVALS)
