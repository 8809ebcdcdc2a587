"""Load an artifact, and believe nothing in it: every field, shape, dtype and number is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from commvq_core.artifact.schema import (
    CONFIG_FILE,
    FORMAT,
    TENSOR_FILE,
    VERSION,
    Artifact,
    tensor_name,
)
from commvq_core.codecs.base import Codec
from commvq_core.codecs.registry import CODECS
from commvq_core.errors import InputError, first_line
from commvq_core.files import read_json, read_tensors
from commvq_core.models import AttentionSpec, LayerSpec
from commvq_core.sides import Side, side_spec

_MEND = "export the artifact again, or download it again"


def load_artifact(source: str | Path) -> Artifact:
    """Load from a folder or, if there is none of that name, from the hub.

    Reads JSON and safetensors only. Raises InputError saying which field is wrong.
    """
    folder = _locate(source)
    config = read_json(folder / CONFIG_FILE, "an artifact")
    if config.get("format") != FORMAT:
        raise InputError(f"{folder} is not an artifact", "give a folder made by commvq export")
    version = config.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise InputError(
            f"{folder} has format version {version}, this release reads up to {VERSION}",
            "upgrade commvq",
        )
    try:
        spec = AttentionSpec.from_json(config["attention"])
        entries = {int(entry["index"]): entry for entry in config["layers"]}
        name = str(config["name"])
        if config["fingerprint"] != spec.fingerprint:
            raise ValueError("fingerprint differs from attention.fingerprint")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG_FILE} is damaged ({error!r})", _MEND) from error
    tensors = read_tensors(folder / TENSOR_FILE, "an artifact")
    codecs = {
        layer.index: (
            _codec(folder, layer, "key", entries, tensors),
            _codec(folder, layer, "value", entries, tensors),
        )
        for layer in spec.compressible
    }
    local = Path(source).expanduser().is_dir()
    return Artifact(name, config, spec, codecs, str(folder.resolve()) if local else str(source))


def _codec(
    folder: Path,
    layer: LayerSpec,
    side: Side,
    entries: dict[int, dict[str, Any]],
    tensors: dict[str, Tensor],
) -> Codec:
    where = f"layer {layer.index}, {side}s"
    entry = entries.get(layer.index, {}).get(side)
    if not isinstance(entry, dict):
        raise InputError(f"{folder / CONFIG_FILE} says nothing of {where}", _MEND)
    kind = CODECS.get(str(entry.get("codec")))
    if kind is None:
        raise InputError(f"{where}: codec {entry.get('codec')!r} is not known", "upgrade commvq")
    prefix = tensor_name(layer.index, side, "")
    # Copies begin where a cache line does, which tensors of a file rarely do: attention reads whole
    # lines of codebooks, and would take up to a tenth longer over two halves.
    own = {name[len(prefix) :]: t.clone() for name, t in tensors.items() if name.startswith(prefix)}
    try:
        return kind.from_tensors(side_spec(layer, side), entry.get("config", {}), own)
    except ValueError as error:
        raise InputError(f"{folder / TENSOR_FILE}, {where}: {error}", _MEND) from error


def _locate(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = str(source)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(
            f"artifact {source} does not exist", "give a folder made by commvq export, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = [CONFIG_FILE, TENSOR_FILE]
        return Path(snapshot_download(text, allow_patterns=wanted))
    except Exception as error:
        first = first_line(error)
        raise InputError(
            f"artifact {source} is neither a folder nor on the hub ({first})",
            "give a folder made by commvq export, or check the id and the network",
        ) from error
