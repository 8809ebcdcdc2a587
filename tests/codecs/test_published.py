"""The paper's codecs: what they store, what they choose, and the whole way to a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commvq_core.artifact import export_run, load_artifact
from commvq_core.codecs.base import FitData, FittedCodec, SideSpec
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.codecs.neural import PATTERNS, NeuralValueCodec
from commvq_core.codecs.norms import join_norm, split_norm, token_norm
from commvq_core.codecs.published import PublishedKeyCodec
from commvq_core.codecs.published_attention import WholeRounds
from commvq_core.errors import InputError
from commvq_core.fit import neural
from commvq_core.rope import Rotary, rotate_pairs
from commvq_core.training import train_codebooks
from tests import reference, runs

KEYS = SideSpec("key", 2, 16, 16)
VALUES = SideSpec("value", 2, 16, 0)


def vectors(tokens: int = 1200, heads: int = 2, dim: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    middles = torch.randn(20, heads, dim, generator=generator) * 3
    chosen = torch.randint(20, (tokens,), generator=generator)
    return middles[chosen] + torch.randn(tokens, heads, dim, generator=generator)


def fitted(spec: SideSpec, bits: float, **knobs: int) -> Any:
    kind: type[FittedCodec] = PublishedKeyCodec if spec.side == "key" else NeuralValueCodec
    plan = {**kind.plan(spec, bits), **knobs}
    metric = torch.eye(spec.head_dim).expand(spec.kv_heads, -1, -1)
    tensors = kind.fit(spec, plan, FitData(vectors(), metric, seed=1))
    return kind.join(spec, plan, [tensors])


@pytest.fixture(scope="module")
def keys() -> Any:
    return fitted(KEYS, 2.25, steps=10)


@pytest.fixture(scope="module")
def values() -> Any:
    return fitted(VALUES, 1.0, steps=150)


def relative_error(codec: Any, x: torch.Tensor) -> float:
    rows = x.transpose(0, 1)[None]
    error = codec.decode(codec.encode(rows)) - rows
    return float(error.square().sum() / rows.square().sum())


def test_both_learn_what_they_see(keys: Any, values: Any) -> None:
    assert relative_error(keys, vectors()) < 0.12
    assert relative_error(values, vectors()) < 0.55
    assert relative_error(fitted(VALUES, 1.0, steps=2), vectors()) > 0.7


def test_opening_a_cache_copies_no_codebooks(keys: Any, values: Any) -> None:
    """A cache moves its codecs to the model's device, where they are already."""
    assert keys.to("cpu") is keys
    assert values.to(torch.device("cpu")) is values
    assert keys.to("meta").theta.device.type == "meta"


def test_fewer_bits_are_the_first_rounds_of_more() -> None:
    long, short = (fitted(KEYS, bits, steps=4).theta for bits in (2.25, 0.75))
    assert long.shape[1] == 3
    torch.testing.assert_close(long[:, :1], short, rtol=0, atol=0)


def test_training_in_bfloat16_loses_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for fast in (False, True):
        monkeypatch.setattr(neural, "_fast_bfloat16", lambda fast=fast: fast)
        errors.append(relative_error(fitted(VALUES, 1.0, steps=150), vectors()))
    assert errors[0] != errors[1]
    assert errors[1] < 1.03 * errors[0]


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "bits", "rounds", "code_bytes"),
    [(8, 128, 1.0, 11, 134), (8, 128, 2.0, 21, 254), (3, 64, 1.0, 5, 25), (3, 64, 0.75, 4, 20)],
)
def test_a_round_of_keys_costs_twelve_bits(
    kv_heads: int, head_dim: int, bits: float, rounds: int, code_bytes: int
) -> None:
    spec = SideSpec("key", kv_heads, head_dim, head_dim)
    plan = PublishedKeyCodec.plan(spec, bits)
    assert plan["rounds"] == rounds
    stored = 16 + 12 * rounds * kv_heads
    assert code_bytes == -(-stored // 8)
    expected = 8 * code_bytes / (kv_heads * head_dim)
    assert PublishedKeyCodec.bits(spec, plan) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bits", "groups", "hidden"), [(1.0, 512, 2048), (2.0, 1024, 4096), (4.0, 2048, 4096)]
)
def test_values_have_the_papers_geometry(bits: float, groups: int, hidden: int) -> None:
    spec = SideSpec("value", 8, 128, 0)
    plan = NeuralValueCodec.plan(spec, bits)
    assert (plan["groups"], plan["hidden"]) == (groups, hidden)
    assert NeuralValueCodec.bits(spec, plan) == pytest.approx(bits + 16 / 1024)


def test_codes_have_the_bytes_that_bits_count(keys: Any, values: Any) -> None:
    x = vectors(7).transpose(0, 1)[None]
    for codec in (keys, values):
        codes = codec.encode(x)
        assert codes.shape == (1, 1, 7, codec.code_bytes) == (1, codec.code_rows, 7, codes.shape[3])
        assert codes.dtype == torch.uint8
        assert codec.bits_per_element == pytest.approx(8 * codes.shape[3] / 32)
        assert codec.bits_per_element == pytest.approx(codec.bits(codec.spec, codec.config()))


def test_keys_choose_the_nearest_centre_round_by_round(keys: Any) -> None:
    x = vectors(40)
    got = keys.decode(keys.encode(x.transpose(0, 1)[None]))[0]
    norm = np.float64(np.float16(np.sqrt((x.double().numpy() ** 2).sum(axis=(1, 2)))))
    for head in range(2):
        residual = reference.complex_pairs(x[:, head].numpy()) / norm[:, None]
        total = np.zeros_like(residual)
        for theta in keys.theta[head]:
            centres = reference.product_centres(reference.complex_pairs(theta.numpy()))
            flat = centres.reshape(-1, 8)
            distance = (np.abs(residual[:, None] - flat[None]) ** 2).sum(axis=-1)
            chosen = flat[distance.argmin(axis=1)]
            residual, total = residual - chosen, total + chosen
        want = total * norm[:, None]
        np.testing.assert_allclose(
            reference.complex_pairs(got[head].numpy()), want, rtol=1e-3, atol=1e-3
        )


def test_rotating_theta_is_rotating_the_key(keys: Any) -> None:
    """c_ab = theta_a + i theta_b, so exp(i m w) moves into the codebook."""
    positions = torch.tensor([3, 500, 2047])
    rotary = Rotary(16, "half", 10000.0 ** (-torch.arange(0, 16, 2) / 16))
    cos, sin = rotary.cos_sin(positions)
    codes = keys.encode(vectors(3).transpose(0, 1)[None])
    rotated = rotate_pairs(keys.decode(codes), cos, sin)
    for token in range(3):
        turned = rotate_pairs(keys.theta, cos[token], sin[token])
        other = PublishedKeyCodec(KEYS, keys._config, turned)
        np.testing.assert_allclose(
            other.decode(codes)[:, :, token], rotated[:, :, token], rtol=1e-3, atol=1e-3
        )


def test_whole_rounds_add_up_within_int16_and_are_off_by_half_a_unit() -> None:
    theta = torch.randn(2, 7, 64, 40, generator=torch.Generator().manual_seed(2))
    theta *= 0.6 ** torch.arange(7)[:, None, None]
    whole = WholeRounds.of(theta)
    assert whole.words.shape == (2, 7, 64, 1, 2, 32)
    assert not whole.words[..., 20:].any()
    parts = whole.words[:, :, :, 0, :, :20].double().numpy()
    book = parts[..., 0, :] + 1j * parts[..., 1, :]
    unit = whole.unit[:, ::2].double().numpy()
    assert torch.equal(whole.unit[:, ::2], whole.unit[:, 1::2])
    error = book * unit[:, None, None] - reference.complex_pairs(theta.numpy())
    assert (np.maximum(abs(error.real), abs(error.imag)) <= 0.501 * unit[:, None, None]).all()
    # The largest that any codes give, of every round a + i b.
    largest = np.zeros((2, 20))
    for r in range(7):
        largest += abs(book[:, r].real).max(axis=1) + abs(book[:, r].imag).max(axis=1)
    assert largest.max() <= 23000
    assert largest.min() > 20000  # and no digit is given away


def test_attention_needs_both_of_the_papers_codecs(keys: Any, values: Any) -> None:
    assert keys.attention(values, 4) is not None
    assert keys.attention(IdentityCodec(VALUES), 4) is None
    assert values.attention(values, 4) is None


def test_values_take_the_largest_logit_and_are_deterministic(values: Any) -> None:
    x = vectors(30).transpose(0, 1)[None]
    codes = values.encode(x)
    assert torch.equal(codes, values.encode(x))
    assert torch.equal(codes[:, :, 4:9], values.encode(x[:, :, 4:9]))
    norm, packed = split_norm(codes[:, 0])
    index = packed[0].numpy()[:, :, None] >> np.arange(0, 8, 2) & 3
    bits = np.array(PATTERNS)[index.reshape(30, -1)[:, : values._config.groups]].reshape(30, -1)
    weights = {name: tensor.double().numpy() for name, tensor in values.tensors().items()}
    flat = bits @ weights["embedding"] * norm[0].numpy()[:, None] * (weights["scale"] + 1e-6)
    want = flat.reshape(30, 2, 16).transpose(1, 0, 2)
    np.testing.assert_allclose(values.decode(codes)[0].numpy(), want, rtol=1e-3, atol=1e-3)


def test_the_norm_survives_storage() -> None:
    x = torch.tensor([0.0, 1e-9, 3.0, 7e4]).view(1, 1, 4, 1).expand(1, 2, 4, 8)
    norm, unit = token_norm(x)
    assert torch.isfinite(unit).all()
    back, rest = split_norm(join_norm(norm, torch.arange(4, dtype=torch.uint8).view(1, 4, 1)))
    assert torch.equal(back, norm)
    assert torch.equal(rest.flatten(), torch.arange(4, dtype=torch.uint8))
    np.testing.assert_allclose((unit * norm[:, None, :, None])[0, :, 2], x[0, :, 2], rtol=1e-6)


@pytest.mark.parametrize("side", ["key", "value"])
def test_rebuilt_from_tensors_and_config(side: str, keys: Any, values: Any) -> None:
    codec = keys if side == "key" else values
    again = type(codec).from_tensors(codec.spec, codec.config(), codec.tensors())
    codes = codec.encode(vectors(9).transpose(0, 1)[None])
    assert torch.equal(again.decode(codes), codec.decode(codes))
    assert again.resident_bytes == codec.resident_bytes > 0
    for name, tensor in codec.tensors().items():
        with pytest.raises(ValueError, match=name):
            type(codec).from_tensors(
                codec.spec, codec.config(), {**codec.tensors(), name: tensor[:-1]}
            )
    with pytest.raises(ValueError, match="config"):
        type(codec).from_tensors(codec.spec, {"nonsense": 1}, codec.tensors())
    with pytest.raises(ValueError, match="steps is 0"):
        type(codec).from_tensors(codec.spec, {**codec.config(), "steps": 0}, codec.tensors())


def test_each_is_for_its_own_side() -> None:
    with pytest.raises(InputError, match="preset default"):
        PublishedKeyCodec.plan(VALUES, 1.0)
    with pytest.raises(InputError, match="preset default"):
        PublishedKeyCodec.plan(replace(KEYS, head_dim=15, rotary_dim=0), 1.0)
    with pytest.raises(InputError, match="preset default"):
        NeuralValueCodec.plan(KEYS, 1.0)


def test_the_preset_trains_resumes_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (PublishedKeyCodec, NeuralValueCodec):
        plan = kind.plan
        monkeypatch.setattr(
            kind, "plan", classmethod(lambda cls, s, b, plan=plan: {**plan(s, b), "steps": 3})
        )
    calib = runs.calibration(tmp_path / "calib")
    summary = train_codebooks(calib, tmp_path / "a", runs.config(preset="published"))
    assert summary["units"] == 4
    train_codebooks(calib, tmp_path / "b", runs.config(preset="published", layers=(0,)))
    train_codebooks(calib, tmp_path / "b", runs.config(preset="published"), resume=True)
    assert runs.codebooks(tmp_path / "a") == runs.codebooks(tmp_path / "b")
    assert "layer_000.key.heads.safetensors" in runs.codebooks(tmp_path / "a")
    exported = export_run(tmp_path / "a", tmp_path / "artifact")
    artifact = load_artifact(tmp_path / "artifact")
    assert artifact.bits_per_element == pytest.approx(summary["bits_per_element"])
    assert exported["bits_per_element"] == pytest.approx(summary["bits_per_element"])
    assert artifact.name == f"published-{round(artifact.bits_per_element, 2):g}bit"
    assert {codec.name for pair in artifact.codecs.values() for codec in pair} == {
        "published-key",
        "neural-value",
    }
