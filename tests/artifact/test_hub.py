"""Artifacts on the hub, which is never asked here: its client is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from commvq_core.artifact import load_artifact, push_to_hub
from commvq_core.errors import InputError
from tests.artifact.artifacts import artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("made"))


def test_a_hub_id_is_downloaded_but_only_what_loading_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_artifact("someone/codebooks").name == "commvq-1bit"
    assert asked == [("someone/codebooks", ["config.json", "codebooks.safetensors"])]


def test_a_folder_is_never_looked_for_on_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"  # looks like a hub id
    assert load_artifact(name).name == "commvq-1bit"
    for path in ("gone", "./gone/there", "/gone/there", "a/b/c", "~/gone"):
        with pytest.raises(InputError, match="does not exist: give a folder made by"):
            load_artifact(path)


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = r"someone/codebooks is neither a folder nor on the hub \(no route\): "
    with pytest.raises(InputError, match=message) as refused:
        load_artifact("someone/codebooks")
    assert "\n" not in str(refused.value)


def test_a_hub_repository_that_is_no_artifact_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match=r"config.json does not exist: give the folder of an"):
        load_artifact("someone/model")


class Api:
    """As much of HfApi as an upload uses."""

    calls: list[tuple[str, dict[str, Any]]]
    error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        if self.error:
            raise self.error

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload", options))
        return f"https://hub/{options['repo_id']}"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    fake = type("FakeApi", (Api,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_pushing_uploads_the_whole_folder_and_gives_its_address(
    folder: Path, api: type[Api]
) -> None:
    assert push_to_hub(folder, "someone/codebooks") == "https://hub/someone/codebooks"
    (created, repository), (uploaded, options) = api.calls
    assert (created, uploaded) == ("create", "upload")
    assert repository == {"repo_id": "someone/codebooks", "exist_ok": True}
    assert options["folder_path"] == folder
    assert {entry.name for entry in Path(options["folder_path"]).iterdir()} == {
        "README.md",
        "codebooks.safetensors",
        "config.json",
    }


def test_a_push_that_fails_is_one_clear_line_and_the_artifact_stays(
    folder: Path, api: type[Api]
) -> None:
    api.error = PermissionError("401 Unauthorized\nlong story")
    with pytest.raises(InputError, match=r"could not be uploaded to a/b \(401 Unauth.*hf auth"):
        push_to_hub(folder, "a/b")
    assert load_artifact(folder).name == "commvq-1bit"
