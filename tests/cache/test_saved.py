"""A saved cache goes on as if it had never stopped, and only where it belongs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from commvq_core.artifact import load_artifact
from commvq_core.cache.cache import CommVQCache
from commvq_core.errors import InputError
from tests.cache.families import build, build_like, oracle
from tests.cache.ways import prompt

OPTIONS = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def saved(model: PreTrainedModel, tiny_artifact: Path, tmp_path: Path) -> Path:
    path = tmp_path / "cache.safetensors"
    with CommVQCache.from_pretrained(tiny_artifact, model, window=16, sinks=2) as cache:
        ids = model.generate(prompt(1, 60), past_key_values=cache, **OPTIONS)
        cache.save(path, token_ids=ids)
    return path


@pytest.mark.parametrize("tokens", [3, 17, 60])
@pytest.mark.parametrize("rows", [1, 3])
def test_going_on_gives_the_tokens_of_never_having_stopped(
    model: PreTrainedModel, tiny_artifact: Path, tmp_path: Path, tokens: int, rows: int
) -> None:
    """Shorter than the sinks and window, and longer."""
    path, more = tmp_path / "cache.safetensors", prompt(rows, 5, 4)
    ids = prompt(rows, tokens)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, : tokens // 2] = 0
    for exact_dtype in (None, torch.float16):
        settings = {"window": 16, "sinks": 4, "exact_dtype": exact_dtype}
        with CommVQCache.from_pretrained(tiny_artifact, model, **settings) as cache:
            first = model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
            cache.save(path, token_ids=first)
            turn = torch.cat((first, more), dim=1)
            whole = torch.cat((mask, torch.ones(rows, 11, dtype=torch.long)), dim=1)
            want = model.generate(turn, attention_mask=whole, past_key_values=cache, **OPTIONS)
            nbytes = cache.nbytes
        with CommVQCache.load(path, model) as again:
            assert torch.equal(again.token_ids.long(), first)
            assert again.settings() == cache.settings()
            got = model.generate(turn, attention_mask=whole, past_key_values=again, **OPTIONS)
            assert torch.equal(want, got)
            assert again.nbytes <= nbytes


def test_single_tokens_get_their_codes_at_the_step_they_would_have(
    model: PreTrainedModel, tiny_artifact: Path, tmp_path: Path
) -> None:
    path, coded = tmp_path / "cache.safetensors", []

    def steps(cache: CommVQCache, count: int) -> list[int]:
        lengths = []
        for _ in range(count):
            model(input_ids=prompt(1, 1), past_key_values=cache)
            lengths.append(cache.layers[0].code_length)
        return lengths

    with (
        torch.no_grad(),
        CommVQCache.from_pretrained(tiny_artifact, model, window=16, sinks=2) as cache,
    ):
        model(input_ids=prompt(1, 30), past_key_values=cache)
        steps(cache, 5)
        cache.save(path)
        coded.append(steps(cache, 30))
    with torch.no_grad(), CommVQCache.load(path, model) as again:
        coded.append(steps(again, 30))
    assert coded[0] == coded[1] == [14] * 26 + [46] * 4


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "smollm3", "glm4"])
def test_layers_of_transformers_own_are_saved_too(family: str, tmp_path: Path) -> None:
    from tests.cache.lossy_codecs import preset_codecs

    model, path = build(family), tmp_path / "cache.safetensors"
    codecs = preset_codecs(model, "default")
    artifact = _Loaded(model, codecs)
    ids = prompt(1, 40)
    with CommVQCache(model, codecs, window=8, sinks=2) as cache, torch.no_grad():
        model(input_ids=ids[:, :33], past_key_values=cache)
        cache.save(path)
        want = model(input_ids=ids[:, 33:], past_key_values=cache).logits
    with CommVQCache.load(path, model, artifact) as again, torch.no_grad():
        assert again.token_ids is None
        got = model(input_ids=ids[:, 33:], past_key_values=again).logits
    assert torch.equal(want, got)


class _Loaded:
    """An artifact in memory, as far as a cache asks."""

    source = None

    def __init__(self, model: PreTrainedModel, codecs: object) -> None:
        self.coded_layers = codecs

    def check_fits(self, spec: object) -> None:
        pass


def test_other_weights_and_other_codebooks_are_refused(
    saved: Path, model: PreTrainedModel, tiny_artifact: Path, tmp_path: Path
) -> None:
    # The same architecture: its codebooks fit, its cache does not.
    with pytest.raises(InputError, match="another model"):
        CommVQCache.load(saved, build_like(model, noise=0.3), tiny_artifact)
    other = load_artifact(tiny_artifact)
    key = other.codecs[0][0]
    key.books.words[0, 0, 0, 0, 0] ^= 1  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="other codebooks"):
        CommVQCache.load(saved, model, other)


def test_the_same_weights_in_half_precision_are_the_same_model(
    saved: Path, model: PreTrainedModel, tiny_model_dir: Path
) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    CommVQCache.load(saved, half).close()


def test_damaged_files_are_refused_in_one_line(
    saved: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    whole = saved.read_bytes()
    tensors = load_file(saved)
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    trials: list[tuple[str, Path]] = []

    def trial(name: str, changed: dict[str, torch.Tensor], head: dict[str, str] = header) -> None:
        trials.append((name, tmp_path / f"{len(trials)}.safetensors"))
        save_file(changed, trials[-1][1], head)

    cut = tmp_path / "cut"
    cut.write_bytes(whole[: len(whole) // 2])
    trials += [("whole safetensors", cut), ("does not exist", tmp_path / "missing")]
    trial("no saved cache", tensors, {"format": "pt"})
    codes = "layers.1.key_codes"
    trial("key_codes", {**tensors, codes: tensors[codes][..., :-1].contiguous()})
    trial("key_codes", {**tensors, codes: tensors[codes].int()})
    trial("value_codes is missing", {n: t for n, t in tensors.items() if "1.value_codes" not in n})
    trial("first_valid", {n: t for n, t in tensors.items() if "first_valid" not in n})
    trial("positions", {n: t for n, t in tensors.items() if n != "positions"})
    stored = json.loads(header["commvq"])
    for change, line in (
        ({"version": 99}, "upgrade commvq"),
        ({"artifact": None}, "names no codebooks"),
        ({"settings": {}}, "damaged"),
        ({"layers": stored["layers"][:1]}, "1 layers, not 2"),
    ):
        trial(line, tensors, {"commvq": json.dumps({**stored, **change})})
    hooks = len(model.get_decoder()._forward_hooks)
    for line, path in trials:
        with pytest.raises(InputError, match=line):
            CommVQCache.load(path, model)
    assert len(model.get_decoder()._forward_hooks) == hooks


def test_saving_leaves_the_old_file_when_the_disk_is_full(
    saved: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with CommVQCache.load(saved, model) as cache, pytest.raises(InputError, match="No space"):
        cache.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_an_empty_cache_can_be_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    with oracle(model) as cache:
        cache.save(path)
        artifact = _Loaded(
            model, {i: (x.key_codec, x.value_codec) for i, x in enumerate(cache.compressed_layers)}
        )
    with CommVQCache.load(path, model, artifact) as again:
        assert again.get_seq_length() == 0
