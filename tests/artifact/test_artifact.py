"""Export and load: an artifact holds the run's codecs, and nothing half-written is ever seen."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from commvq_core.artifact import export_run, load_artifact
from commvq_core.errors import InputError
from commvq_core.run import Run
from tests import runs
from tests.artifact.artifacts import artifact
from tests.calibration import stores

FILES = {"README.md", "codebooks.safetensors", "config.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds calib, run and artifact."""
    return artifact(tmp_path_factory.mktemp("made")).parent


def test_an_artifact_holds_the_codecs_of_its_run(folder: Path) -> None:
    run, loaded = Run.open(folder / "run"), load_artifact(folder / "artifact")
    assert loaded.spec == run.spec
    assert loaded.fingerprint == run.spec.fingerprint
    assert list(loaded.codecs) == [0, 2]
    vectors = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    for layer in run.spec.compressible:
        for side, codec in zip(("key", "value"), loaded.codecs[layer.index], strict=True):
            own, distortion = run.codec(layer, side)
            codes = own.encode(vectors)
            assert torch.equal(codec.encode(vectors), codes)
            assert torch.equal(codec.decode(codes), own.decode(codes))
            entry = next(e for e in loaded.config["layers"] if e["index"] == layer.index)[side]
            assert entry["distortion"] == distortion
            assert entry["bits_per_element"] == codec.bits_per_element == 1.0


def test_an_artifact_says_what_it_costs(folder: Path, tmp_path: Path) -> None:
    summary = export_run(folder / "run", tmp_path / "artifact")
    loaded = load_artifact(tmp_path / "artifact")
    assert summary == {
        "artifact": str(tmp_path / "artifact"),
        "name": "commvq-1bit",
        "model": "someone/model",
        "preset": "default",
        "bits_per_element": 1.0,
        "resident_bytes": loaded.resident_bytes,
    }
    codecs = [codec for pair in loaded.codecs.values() for codec in pair]
    assert loaded.resident_bytes == sum(codec.resident_bytes for codec in codecs) > 0
    assert loaded.bits_per_element == 1.0
    assert loaded.name == "commvq-1bit"


def test_bits_of_keys_and_values_are_averaged_and_name_the_artifact(tmp_path: Path) -> None:
    calib = runs.calibration(tmp_path / "calib")
    run = runs.train(calib, tmp_path / "run", key_bits=1.0, value_bits=2.0)
    export_run(run, tmp_path / "artifact")
    loaded = load_artifact(tmp_path / "artifact")
    assert loaded.bits_per_element == 1.5
    assert loaded.name == "commvq-1.5bit"


def test_an_artifact_is_three_files_and_the_same_bytes_every_time(
    folder: Path, tmp_path: Path
) -> None:
    export_run(folder / "run", tmp_path / "again")
    assert set(stores.contents(tmp_path / "again")) == FILES
    assert stores.contents(tmp_path / "again") == stores.contents(folder / "artifact")
    assert [entry.name for entry in tmp_path.iterdir()] == ["again"]


def test_codebooks_begin_where_cache_lines_do(folder: Path) -> None:
    for pair in load_artifact(folder / "artifact").codecs.values():
        for codec in pair:
            assert codec.tensors()["codebooks"].data_ptr() % 64 == 0


def test_loading_reads_nothing_but_json_and_safetensors(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "artifact", tmp_path / "copy"))
    (copy / "README.md").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"never opened")
    assert load_artifact(str(copy)).name == "commvq-1bit"


def test_an_unfinished_run_is_not_exported(folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    (run / runs.UNITS[2]).unlink()
    with pytest.raises(InputError, match=r"run lacks 1 of 8 codebooks: finish it with .*--resume"):
        export_run(run, tmp_path / "artifact")
    with pytest.raises(InputError, match="give the folder of a run"):
        export_run(tmp_path / "gone", tmp_path / "artifact")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_layers_without_codebooks_stay_exact_when_asked_for(folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    (run / runs.UNITS[2]).unlink()  # a head of layer 0's values
    summary = export_run(run, tmp_path / "artifact", partial=True)
    loaded, whole = load_artifact(tmp_path / "artifact"), load_artifact(folder / "artifact")
    assert [[codec.name for codec in loaded.codecs[layer]] for layer in (0, 2)] == [
        ["additive", "identity"],
        ["additive", "additive"],
    ]
    vectors = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    key, value = loaded.codecs[0]
    assert torch.equal(key.encode(vectors), whole.codecs[0][0].encode(vectors))
    assert torch.equal(value.decode(value.encode(vectors)), vectors)
    assert summary["bits_per_element"] == loaded.bits_per_element == 1.0
    assert summary["resident_bytes"] == loaded.resident_bytes
    assert loaded.resident_bytes == whole.resident_bytes - whole.codecs[0][1].resident_bytes
    for name in runs.UNITS:
        (run / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no whole codebooks of any layer"):
        export_run(run, tmp_path / "empty", partial=True)
    assert not (tmp_path / "empty").exists()


def test_output_that_exists_is_refused_unless_told_to_overwrite_it(
    folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(folder / "artifact", tmp_path / "artifact"))
    (out / "config.json").write_text("old")
    before = stores.contents(out)
    with pytest.raises(InputError, match=r"artifact exists already: .*--overwrite"):
        export_run(folder / "run", out)
    assert stores.contents(out) == before
    export_run(folder / "run", out, overwrite=True)
    assert stores.contents(out) == stores.contents(folder / "artifact")


def test_overwriting_never_removes_what_is_no_artifact(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for out in (model, folder / "run"):
        before = stores.contents(out)
        with pytest.raises(InputError, match="is no artifact and will not be removed"):
            export_run(folder / "run", out, overwrite=True)
        assert stores.contents(out) == before


@pytest.mark.parametrize("broken", sorted(FILES))
def test_a_full_disk_keeps_the_old_artifact(
    folder: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(folder / "artifact", tmp_path / "artifact"))
    (out / "config.json").write_text("old")
    before = stores.contents(out)
    replace = Path.replace

    def full(self: Path, target: Any) -> Path:
        if Path(target).name == broken and Path(target).parent != out:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        export_run(folder / "run", out, overwrite=True)
    assert stores.contents(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_an_interrupted_export_keeps_the_old_artifact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(folder / "artifact", tmp_path / "artifact"))
    before = stores.contents(out)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_run(folder / "run", out, overwrite=True)
    assert stores.contents(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_the_card_has_a_yaml_header_and_says_what_the_artifact_is(folder: Path) -> None:
    import yaml

    card = (folder / "artifact" / "README.md").read_text()
    empty, header, body = card.split("---\n", 2)
    assert empty == ""
    metadata = yaml.safe_load(header)
    assert metadata["library_name"] == "commvq"
    assert "kv-cache" in metadata["tags"]
    config = json.loads((folder / "artifact" / "config.json").read_text())
    assert "# commvq-1bit for someone/model" in body
    assert "**1.00 bits an element**" in body
    for side in ("key", "value"):
        mean = sum(layer[side]["distortion"] for layer in config["layers"]) / 2
        assert f"{mean:.4f}" in body
    assert f"{runs.TOKENS:,}" in body
    assert body.count("```") == 2


def test_the_hub_itself_accepts_the_cards_header(folder: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "artifact" / "README.md")
    assert card.data.library_name == "commvq"
