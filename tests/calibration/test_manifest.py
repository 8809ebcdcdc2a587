"""The manifest of a CALIB folder: what it derives and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commvq_core.calibration.manifest import Manifest
from commvq_core.calibration.store import CalibrationStore
from commvq_core.errors import InputError
from tests.calibration.stores import attention_spec, manifest


def test_it_survives_json() -> None:
    original = manifest(tokens=100, sample=0.25)
    value = json.loads(json.dumps(original.to_json()))
    assert Manifest.from_json(value, "manifest.json") == original
    assert list(value)[:2] == ["format", "version"]


def test_chunks_divide_all_tokens_and_sampling_counts_each_sequence() -> None:
    plan = manifest(tokens=100, seq_len=16, chunk_sequences=3, sample=0.25)
    assert plan.chunks == 3
    lengths = [plan.sequence_lengths(chunk) for chunk in range(3)]
    assert lengths == [[16, 16, 16], [16, 16, 16], [4]]
    assert [plan.chunk_tokens(chunk) for chunk in range(3)] == [12, 12, 1]


def test_a_sample_keeps_at_least_one_token_of_each_sequence() -> None:
    assert manifest(tokens=64, seq_len=16, chunk_sequences=4, sample=0.001).chunk_tokens(0) == 4


def test_differences_name_settings_and_not_progress() -> None:
    first = manifest(tokens=64)
    assert first.differences(first.chunk_done()) == []
    assert first.differences(manifest(tokens=64, seed=5)) == ["seed"]
    assert first.differences(manifest(tokens=64, model="other/model")) == ["model"]


def test_a_manifest_from_disk_does_not_differ_from_the_one_that_was_written() -> None:
    written = manifest(spec=attention_spec().to_json())  # holds tuples, which JSON has not
    assert isinstance(attention_spec().to_json()["layers"], tuple)
    read = Manifest.from_json(json.loads(json.dumps(written.to_json())), "manifest.json")
    assert written.differences(read) == []
    assert written == read


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "other"}, "is no calibration"),
    "newer": ({"version": 2}, r"format version 2, and this commvq reads up to 1: upgrade commvq"),
    "no version": ({"version": None}, "format version None"),
    "unknown field": ({"colour": 1}, "field colour is missing or unknown"),
    "tokens as text": ({"tokens": "64"}, "field tokens is '64'"),
    "tokens as bool": ({"tokens": True}, "field tokens is True"),
    "complete as int": ({"complete": 1}, "field complete is 1"),
    "no tokens": ({"tokens": 0}, "field tokens is 0"),
    "no share": ({"sample": 0}, "field sample is 0"),
    "sequences": ({"seq_len": 0}, "field seq_len is 0"),
    "chunk size": ({"chunk_sequences": 0}, "field chunk_sequences is 0"),
    "dtype": ({"dtype": "int8"}, "field dtype is 'int8'"),
    "chunks": ({"chunks": 9}, "field chunks is 9"),
    "too far": ({"chunks_done": 9}, "field chunks_done is 9"),
    "too early": ({"complete": True}, "field complete is True"),
    "spec": ({"spec": {}}, "field spec describes no attention layers"),
    "layers": ({"spec": {"layers": [1]}}, "field spec describes no attention layers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest_names_the_field(tmp_path: Path, name: str) -> None:
    changes, message = BROKEN[name]
    value = {**manifest(tokens=64).to_json(), **changes}
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        CalibrationStore.open(tmp_path, require_complete=False)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    value = manifest(tokens=64).to_json()
    del value["seed"]
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"manifest\.json: field seed is missing or unknown"):
        CalibrationStore.open(tmp_path, require_complete=False)


def test_a_manifest_that_is_cut_short_is_reported(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "commvq-cal')
    with pytest.raises(InputError, match="is not readable JSON"):
        CalibrationStore.open(tmp_path)
