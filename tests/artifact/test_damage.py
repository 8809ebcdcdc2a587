"""A damaged artifact is refused by the name of what is wrong with it; none is half believed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commvq_core.artifact import Artifact, load_artifact
from commvq_core.errors import InputError
from commvq_core.models import AttentionSpec
from tests.artifact.artifacts import Config, Tensors, artifact, edit_config, edit_tensors

KEY = "layers.2.key.codebooks"
SCALES = "layers.2.value.scales"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        load_artifact(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def entry(config: Config, side: str) -> Any:
    """What config.json says of one side of layer 2."""
    return next(layer for layer in config["layers"] if layer["index"] == 2)[side]


def set_to(tensors: Tensors, name: str, value: float) -> None:
    tensors[name].view(-1)[-1] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "layer 2, keys: tensor codebooks is missing"),
        (lambda t: t.pop("layers.0.value.inverse"), "layer 0, values: tensor inverse is missing"),
        (lambda t: t.update({KEY: t[KEY][:, :, :, :255]}), "codebooks has shape [2, 1, 1, 255, 8]"),
        (lambda t: t.update({KEY: t[KEY][:1]}), "tensor codebooks has shape [1, 1, 1, 256, 8]"),
        (lambda t: t.update({KEY: t[KEY].float()}), "codebooks has dtype torch.float32"),
        (lambda t: t.update({KEY: t[KEY].half()}), "codebooks has dtype torch.float16"),
        (lambda t: t.update({KEY: t[KEY].byte()}), "codebooks has dtype torch.uint8"),
        (lambda t: t.pop(SCALES), "tensor scales is missing"),
        (lambda t: t.update({SCALES: t[SCALES].half()}), "scales has dtype torch.float16"),
        (lambda t: set_to(t, SCALES, float("nan")), "scales holds NaN or infinity"),
        (lambda t: set_to(t, SCALES, float("-inf")), "scales holds NaN or infinity"),
        (lambda t: set_to(t, "layers.2.key.inverse", 0.0), "factor that is not positive"),
        (lambda t: set_to(t, "layers.2.key.inverse", 9.0), "inverse differs within a pair"),
        (lambda t: t["layers.2.value.inverse"].zero_(), "inverse holds a singular matrix"),
    ],
)
def test_a_damaged_tensor_is_named(folder: Path, change: Any, message: str) -> None:
    edit_tensors(folder, change)
    line = refusal(folder)
    assert message in line
    assert "codebooks.safetensors, layer " in line
    assert line.endswith(": export the artifact again, or download it again")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_tensors_that_are_cut_short_are_refused(folder: Path, keep: int) -> None:
    path = folder / "codebooks.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "codebooks.safetensors is not a readable safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="commvq-run"), "is not an artifact: give a folder made by"),
        (lambda c: c.pop("format"), "is not an artifact"),
        (
            lambda c: c.update(version=2),
            "has format version 2, this release reads up to 1",
        ),
        (lambda c: c.update(version=0), "has format version 0"),
        (lambda c: c.update(version="1"), "has format version 1"),
        (lambda c: c.update(version=None), "has format version None"),
        (lambda c: c.pop("name"), "config.json is damaged (KeyError('name'))"),
        (lambda c: c.pop("layers"), "is damaged (KeyError('layers'))"),
        (lambda c: c.update(layers=7), "config.json is damaged"),
        (lambda c: c.update(layers=["x"]), "config.json is damaged"),
        (lambda c: c["layers"].pop(), "says nothing of layer 2, keys"),
        (lambda c: c["layers"][1].pop("value"), "says nothing of layer 2, values"),
        (lambda c: c["layers"][0].update(index="first"), "config.json is damaged"),
        (lambda c: c.pop("attention"), "is damaged (KeyError('attention'))"),
        (lambda c: c["attention"].pop("fingerprint"), "fingerprint"),
        (lambda c: c.update(fingerprint="f" * 64), "fingerprint differs"),
        (lambda c: c["attention"]["layers"][0].pop("head_dim"), "head_dim"),
        (lambda c: c["attention"]["layers"][0].update(head_dim="8"), "head_dim is '8'"),
        (lambda c: c["attention"]["layers"][0].update(kv_heads=0), "impossible geometry"),
        (lambda c: c["attention"]["layers"][0].update(rotary_dim=10), "impossible geometry"),
        (lambda c: c["attention"]["layers"][0].update(index=2), "two layers have the same index"),
        (
            lambda c: entry(c, "key").update(codec="magic"),
            "keys: codec 'magic' is not known",
        ),
        (lambda c: entry(c, "key").update(codec=None), "codec None is not known"),
        (lambda c: entry(c, "key").pop("config"), "does not describe an additive codec"),
        (lambda c: entry(c, "key").update(config=[]), "does not describe an additive codec"),
        (lambda c: entry(c, "value")["config"].update(stages=2), "codebooks has shape"),
        (lambda c: entry(c, "value")["config"].update(sub_dim=3), "sub_dim is 3, not an even"),
        (lambda c: entry(c, "value")["config"].update(beam="4"), "beam is '4', not a whole number"),
    ],
)
def test_a_damaged_field_is_named(folder: Path, change: Any, message: str) -> None:
    edit_config(folder, change)
    assert message in refusal(folder)


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"null"):
        (folder / "config.json").write_bytes(content)
        assert "config.json" in refusal(folder)


def test_files_and_folders_that_are_not_there_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "codebooks.safetensors").unlink()
    assert "codebooks.safetensors does not exist" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json does not exist" in refusal(folder)
    (tmp_path / "file").touch()
    for gone in (tmp_path / "gone", tmp_path / "file"):
        assert "does not exist: give a folder made by commvq export" in refusal(gone)


def test_what_an_older_release_wrote_still_loads(folder: Path) -> None:
    """Fields that a reader has no use for may be missing, and unknown ones are passed over."""

    def rewrite(config: Config) -> None:
        for name in ("resident_bytes", "training", "commvq_version", "method"):
            config.pop(name)
        config["from_the_future"] = True

    edit_config(folder, rewrite)
    assert load_artifact(folder).bits_per_element == 1.0


def other_model(spec: AttentionSpec, **changes: Any) -> AttentionSpec:
    return replace(spec, fingerprint="f" * 64, **changes)


def test_another_model_is_refused_with_the_field_in_which_it_differs(sound: Path) -> None:
    loaded: Artifact = load_artifact(sound)
    spec = loaded.spec
    loaded.check_fits(spec)
    wider = tuple(replace(layer, kv_heads=1) for layer in spec.layers)
    cases = {
        "model_type llama there, qwen2 in the model": other_model(spec, model_type="qwen2"),
        "hidden_size 32 there, 64 in the model": other_model(spec, hidden_size=64),
        "vocab_size 64 there, 65 in the model": other_model(spec, vocab_size=65),
        "3 layers there, 2 in the model": other_model(spec, layers=spec.layers[:2]),
        "layer 0 has kv_heads 2 there, 1 in the model": other_model(spec, layers=wider),
        "the rotary frequencies differ": other_model(spec),
    }
    for difference, model in cases.items():
        with pytest.raises(InputError, match="are for another model, someone/model") as refused:
            loaded.check_fits(model)
        assert difference in str(refused.value)
        assert "\n" not in str(refused.value)


def test_config_json_is_written_without_nan(sound: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((sound / "config.json").read_text(), parse_constant=refuse)
