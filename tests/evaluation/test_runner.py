"""The runner: the same examples for every codec, what is recorded, and resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commvq_core.cache.saved import weights_sha256
from commvq_core.codecs.digest import codecs_sha256
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.errors import InputError
from commvq_core.evaluation.codecs import (
    EvalCodec,
    load_artifacts,
    parse_side,
    resolve_codecs,
)
from commvq_core.evaluation.options import EvalOptions, parse_lengths, parse_numbers
from commvq_core.evaluation.report import grid_rows, summary_rows
from commvq_core.evaluation.runner import evaluate, evaluate_to_file
from commvq_core.evaluation.tasks import TASKS, make_task
from commvq_core.evaluation.tasks.base import Record, Task
from commvq_core.evaluation.tasks.divergence import Divergence
from commvq_core.evaluation.tasks.perplexity import Perplexity
from commvq_core.models import LoadedModel
from commvq_core.sides import SIDES


class Counting(Task):
    """A task that remembers what it was asked, and can fail."""

    name = "perplexity"
    strict = True

    def __init__(self, options: EvalOptions, fail_at: int | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def prepare(self, loaded: LoadedModel) -> Sequence[int]:
        return [10, 20, 30]

    def settings(self) -> dict[str, Any]:
        return {"limit": 3}

    def run(self, loaded: LoadedModel, cache: Any, example: int) -> Record:
        if self.fail_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append((type(cache).__name__, example))
        return {"value": example, "context": example}

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        return {"sum": sum(record["value"] for record in records)}


CACHES = ("HalfPrecisionCache", "CommVQCache")
EVERYTHING = [(cache, example) for example in (10, 20, 30) for cache in CACHES]


def test_every_codec_gets_the_same_examples(loaded: LoadedModel, codecs: list[EvalCodec]) -> None:
    task = Counting(EvalOptions())
    result = evaluate(loaded, codecs, task)
    assert task.asked == EVERYTHING
    assert [entry["metrics"]["sum"] for entry in result["results"]] == [60, 60]


def test_what_decides_a_result_is_recorded(
    loaded: LoadedModel, codecs: list[EvalCodec], short: EvalOptions
) -> None:
    result = evaluate(loaded, codecs, Perplexity(short))
    json.dumps(result, allow_nan=False)
    assert result["model"] == loaded.source
    assert result["model_fingerprint"] == loaded.spec.fingerprint
    assert result["weights_sha256"] == weights_sha256(loaded.model)
    assert set(result["versions"]) == {"commvq", "torch", "transformers", "python"}
    settings = result["settings"]
    assert (settings["max_length"], settings["limit"]) == (128, 2)
    assert len(settings["examples_sha256"]) == len(settings["sources"][0]["sha256"]) == 64
    identity = result["results"][1]["identity"]
    assert (identity["window"], identity["sinks"]) == (32, 2)
    assert len(identity["sha256"]) == 64


def test_bytes_are_those_of_the_longest_context(
    loaded: LoadedModel, codecs: list[EvalCodec]
) -> None:
    class Growing(Counting):
        def run(self, loaded: LoadedModel, cache: Any, example: int) -> Record:
            cache.__dict__["tokens"] = example
            return super().run(loaded, cache, example)

    entry = evaluate(loaded, codecs, Growing(EvalOptions()))["results"][0]
    assert entry["context"] == 30
    assert entry["cache_bytes"] == entry["examples"][2]["cache_bytes"]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    first = Counting(EvalOptions(), fail_at=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(loaded, codecs, first, out)
    assert not out.exists()
    with pytest.raises(InputError, match="--resume"):
        evaluate_to_file(loaded, codecs, Counting(EvalOptions()), out)
    second = Counting(EvalOptions())
    result = evaluate_to_file(loaded, codecs, second, out, resume=True)
    assert first.asked + second.asked == EVERYTHING
    assert json.loads(out.read_text()) == result
    assert list(tmp_path.iterdir()) == [out]


class Pairs(Counting):
    """Runs two examples side by side, where both are round or neither is, the small ones first."""

    @property
    def batch_size(self) -> int:
        return 2

    def batch_key(self, example: int) -> bool:
        return example % 20 == 0

    def size(self, example: int) -> int:
        return example

    def prepare(self, loaded: LoadedModel) -> Sequence[int]:
        return [90, 30, 50, 20, 10, 70]

    def run_batch(self, loaded: LoadedModel, cache: Any, examples: Sequence[int]) -> list[Record]:
        if self.fail_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append((type(cache).__name__, sum(examples)))
        return [{"value": example, "context": example} for example in examples]


def test_examples_of_one_kind_run_side_by_side_and_resume_at_whole_batches(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    first = Pairs(EvalOptions(), fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(loaded, codecs[:1], first, out)
    second = Pairs(EvalOptions())
    (entry,) = evaluate_to_file(loaded, codecs[:1], second, out, resume=True)["results"]
    assert [total for _, total in first.asked] == [10 + 30, 50 + 70]
    assert [total for _, total in second.asked] == [90, 20]
    assert [record["value"] for record in entry["examples"]] == [90, 30, 50, 20, 10, 70]


def test_bytes_are_an_examples_share_of_what_is_left_of_a_batch(
    loaded: LoadedModel, codecs: list[EvalCodec]
) -> None:
    """Rows that have ended leave their batch, and their bytes with them."""

    class Leaving(Pairs):
        leaves = False

        def run_batch(
            self, loaded: LoadedModel, cache: Any, examples: Sequence[int]
        ) -> list[Record]:
            ids = torch.arange(2, 82).expand(len(examples), -1)
            with torch.inference_mode():
                loaded.model(input_ids=ids, past_key_values=cache)
            if self.leaves and len(examples) > 1:
                cache.batch_select_indices(torch.tensor([1]))
            return super().run_batch(loaded, cache, examples)

    whole, left = Leaving(EvalOptions()), Leaving(EvalOptions())
    left.leaves = True
    found = [evaluate(loaded, codecs[:1], task)["results"][0]["examples"] for task in (whole, left)]
    sizes = [{record["cache_bytes"] for record in records} for records in found]
    assert len(sizes[0]) == 1
    assert sizes[0] == sizes[1]


def test_a_finished_evaluation_is_not_run_again(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    result = evaluate_to_file(loaded, codecs, Counting(EvalOptions()), out)
    again = Counting(EvalOptions())
    assert evaluate_to_file(loaded, codecs, again, out, resume=True) == result
    assert again.asked == []


def test_resuming_with_other_settings_is_refused(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(loaded, codecs, Counting(EvalOptions(), fail_at=1), out)
    with pytest.raises(InputError, match="other settings"):
        evaluate_to_file(loaded, codecs[:1], Counting(EvalOptions()), out, resume=True)
    result = evaluate_to_file(loaded, codecs, Counting(EvalOptions()), out, overwrite=True)
    with pytest.raises(InputError, match="other settings"):
        evaluate_to_file(loaded, codecs[:1], Counting(EvalOptions()), out, resume=True)
    assert json.loads(out.read_text()) == result


def test_resuming_with_other_weights_is_refused(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(loaded, codecs, Counting(EvalOptions(), fail_at=1), out)
    weight = next(loaded.model.parameters()).data.view(-1)
    kept = float(weight[0])
    weight[0] += 1
    try:
        with pytest.raises(InputError, match="other settings"):
            evaluate_to_file(loaded, codecs, Counting(EvalOptions()), out, resume=True)
    finally:
        weight[0] = kept
    evaluate_to_file(loaded, codecs, Counting(EvalOptions()), out, resume=True)


def test_an_overwritten_evaluation_starts_anew(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(loaded, codecs, Counting(EvalOptions(), fail_at=5), out)
    task = Counting(EvalOptions())
    evaluate_to_file(loaded, codecs, task, out, overwrite=True)
    assert task.asked == EVERYTHING


def test_fp16_is_always_first_and_only_once(loaded: LoadedModel, tiny_artifact: Path) -> None:
    artifacts = load_artifacts([tiny_artifact])
    found = resolve_codecs(loaded, artifacts=artifacts, names=["fp16", "fp16"])
    assert [codec.name for codec in found] == ["fp16", "commvq-0.5bit"]


def test_artifacts_of_the_same_name_are_told_apart(
    loaded: LoadedModel, tiny_artifact: Path, tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(tiny_artifact)
    artifacts = load_artifacts([tiny_artifact, twin])
    names = [codec.name for codec in resolve_codecs(loaded, artifacts=artifacts)]
    assert names == ["fp16", "commvq-0.5bit", f"commvq-0.5bit:{twin}"]


def test_one_side_alone_leaves_the_other_exact(
    loaded: LoadedModel, tiny_artifact: Path, short: EvalOptions
) -> None:
    artifacts = load_artifacts([tiny_artifact])
    lost = {}
    for side in (None, *SIDES):
        codecs = resolve_codecs(loaded, artifacts=artifacts, window=32, sinks=2, only=side)
        assert codecs[1].name == ("commvq-0.5bit" if side is None else f"commvq-0.5bit-{side}s")
        assert codecs[1].bits_per_element == 0.5
        lost[side] = evaluate(loaded, codecs, Divergence(short))["results"][1]["metrics"]["kl_mean"]
    assert 0 < lost["key"] < lost[None]
    assert 0 < lost["value"] < lost[None]
    exact = {
        index: pair[0] for index, pair in artifacts[str(tiny_artifact)].only("value").codecs.items()
    }
    assert {codec.name for codec in exact.values()} == {"identity"}
    assert parse_side("key") == "key"
    with pytest.raises(InputError, match="give key or value"):
        parse_side("keys")


def test_layers_that_keep_their_own_cache_are_named(
    loaded: LoadedModel, tiny_artifact: Path, short: EvalOptions
) -> None:
    (artifact,) = load_artifacts([tiny_artifact]).values()
    layers = (artifact.spec.layers[0], replace(artifact.spec.layers[1], compressible=False))
    first = {0: artifact.codecs[0]}
    mixed = replace(artifact, spec=replace(artifact.spec, layers=layers), codecs=first)
    exact = (IdentityCodec(artifact.codecs[1][0].spec), IdentityCodec(artifact.codecs[1][1].spec))
    partial = replace(artifact, name="partial", codecs={**first, 1: exact})
    codecs = resolve_codecs(
        loaded, artifacts={"mixed": mixed, "partial": partial}, window=32, sinks=2
    )
    result = evaluate(loaded, codecs, Perplexity(short))
    named = [entry["layers_with_their_own_cache"] for entry in result["results"]]
    assert named == [[], [1], [1]]
    found = [entry["metrics"]["perplexity"] for entry in result["results"]]
    assert found[1] == found[2] != found[0]
    assert [entry["bits_per_element"] for entry in result["results"][1:]] == [0.5, 0.5]


def test_an_artifacts_hash_covers_its_numbers(tiny_artifact: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(tiny_artifact, same)
    shutil.copytree(tiny_artifact, other)
    tensors = load_file(other / "codebooks.safetensors")
    next(t for name, t in tensors.items() if "codebook" in name).view(-1)[-1] += 1
    save_file(tensors, other / "codebooks.safetensors")
    artifacts = load_artifacts([tiny_artifact, same, other])
    first, second, third = (codecs_sha256(artifact.codecs) for artifact in artifacts.values())
    assert first == second != third


def test_the_compressed_cache_keeps_its_exact_part_in_16_bits(
    loaded: LoadedModel, codecs: list[EvalCodec]
) -> None:
    full, small = codecs
    sizes = []
    for codec in (full, small):
        with codec.open(False) as cache, torch.inference_mode():
            loaded.model(input_ids=torch.arange(2, 22)[None], past_key_values=cache)
            sizes.append(cache.nbytes)
    # Everything is still inside the window, so the two differ by the positions at most.
    assert sizes[0] <= sizes[1] <= sizes[0] + 20 * 8


def test_rows_for_tables() -> None:
    entry = {
        "codec": "fp16",
        "bits_per_element": 16.0,
        "cache_bytes": 50,
        "fp16_cache_bytes": 200,
        "metrics": {"accuracy": 0.5, "kept": None, "grid": {"64": {"0": 1.0, "100": 0.0}}},
        "seconds": 1.5,
    }
    result = {"task": "niah", "results": [entry]}
    names, cells = summary_rows(result)
    assert dict(zip(names, cells[0], strict=True))["of fp16 %"] == 25.0
    assert dict(zip(names, cells[0], strict=True))["found %"] == 50.0
    assert grid_rows(result) == (
        ["cache", "tokens", "depth 0", "depth 100"],
        [["fp16", 64, 100.0, 0.0]],
    )


def test_every_task_has_columns(loaded: LoadedModel) -> None:
    from commvq_core.evaluation.report import _COLUMNS

    assert set(_COLUMNS) == set(TASKS)
    with pytest.raises(
        InputError, match="perplexity, divergence, niah, kv, longbench, infinitebench"
    ):
        make_task("nonsense", EvalOptions())


def test_lists_of_numbers() -> None:
    assert parse_lengths("1024,2048,1024", "--lengths") == (1024, 2048)
    assert parse_numbers("0,12.5", "--depths") == (0.0, 12.5)
    assert parse_numbers(None, "--depths") is None
    for text in ("", "1,,2", "a", "1.5"):
        with pytest.raises(InputError):
            parse_lengths(text, "--lengths")
    for text in ("inf", "nan"):
        with pytest.raises(InputError):
            parse_numbers(text, "--depths")
