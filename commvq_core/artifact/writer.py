"""Turn a finished run into an artifact, and put it on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from commvq_core import __version__
from commvq_core.artifact.card import model_card
from commvq_core.artifact.schema import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT,
    TENSOR_FILE,
    VERSION,
    artifact_name,
    tensor_name,
)
from commvq_core.codecs.base import Codec
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.errors import InputError, first_line
from commvq_core.files import (
    check_output,
    check_replaceable,
    replace_output,
    write_json,
    write_tensors,
    write_text,
)
from commvq_core.progress import Progress, Silent
from commvq_core.run import Run
from commvq_core.sides import SIDES, side_spec


def export_run(
    run: Path,
    out: Path,
    *,
    partial: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the artifact of the finished run folder `run` to `out`.

    The artifact is built beside `out` and moved there whole, so that an interrupted export leaves
    what was there before. `partial` takes an unfinished run too: a side of a layer that lacks a
    codebook stays exact. Returns its summary, whose bits count the sides that have codes. Raises
    InputError for a run that is unfinished, or that has nothing.
    """
    progress = progress or Silent()
    source = Run.open(run)
    missing = set(source.missing_units())
    if missing and not partial:
        raise InputError(
            f"{run} lacks {len(missing)} of {len(source.units())} codebooks",
            "finish it with commvq train-codebook --resume, or give --partial to leave those "
            "layers exact",
        )
    check_output(out, overwrite=overwrite)
    check_replaceable(out, TENSOR_FILE, "artifact")
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    coded: list[Codec] = []
    compressible = source.spec.compressible
    with progress.task("exporting", total=len(compressible), unit="layers") as task:
        for layer in compressible:
            entry: dict[str, Any] = {"index": layer.index}
            for side in SIDES:
                codec: Codec = IdentityCodec(side_spec(layer, side))
                distortion = 0.0
                if missing.isdisjoint(source.units_of(layer, side)):
                    codec, distortion = source.codec(layer, side)
                    coded.append(codec)
                entry[side] = {
                    "codec": codec.name,
                    "config": codec.config(),
                    "bits_per_element": codec.bits_per_element,
                    "distortion": distortion,
                }
                for name, tensor in codec.tensors().items():
                    tensors[tensor_name(layer.index, side, name)] = tensor
            layers.append(entry)
            task.advance()
    if not coded:
        raise InputError(
            f"{run} has no whole codebooks of any layer", "go on with commvq train-codebook"
        )
    from commvq_core.cache.cache import mean_bits

    bits = mean_bits(coded)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "name": artifact_name(bits, source.config["preset"]),
        "method": "commvq",
        "preset": source.config["preset"],
        "model": source.config["model"],
        "fingerprint": source.spec.fingerprint,
        "bits_per_element": bits,
        "resident_bytes": sum(codec.resident_bytes for codec in coded),
        "training": source.config,
        "attention": source.spec.to_json(),
        "layers": layers,
        "commvq_version": __version__,
    }
    replace_output(out, lambda folder: _write(folder, config, tensors), TENSOR_FILE, "artifact")
    summary = {key: config[key] for key in ("name", "model", "preset", "bits_per_element")}
    return {"artifact": str(out), **summary, "resident_bytes": config["resident_bytes"]}


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    write_tensors(folder / TENSOR_FILE, tensors)
    write_json(folder / CONFIG_FILE, config)
    write_text(folder / CARD_FILE, model_card(config))


def push_to_hub(artifact: Path, repo_id: str) -> str:
    """Upload an artifact folder to the hub repository `repo_id`; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo_id, folder_path=artifact, commit_message="Upload CommVQ codebooks"
        )
    except Exception as error:
        first = first_line(error)
        raise InputError(
            f"{artifact} could not be uploaded to {repo_id} ({first})",
            "check the id, the network and `hf auth login`; the artifact itself is written",
        ) from error
    return str(info)
