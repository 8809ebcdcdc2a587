"""What a CALIB folder says about itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from commvq_core.errors import InputError

if TYPE_CHECKING:
    from commvq_core.models import AttentionSpec

FORMAT = "commvq-calibration"
VERSION = 1
# What may differ between an unfinished run and the one that continues it.
_PROGRESS = ("chunks_done", "complete")


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    `model` is the source as the user gave it and `spec` its AttentionSpec as JSON. `tokens` were
    run through the model in sequences of `seq_len`, `chunk_sequences` sequences to a chunk;
    `round(sample * length)` tokens of each sequence, chosen by `seed`, were stored as `dtype`.
    `token_sha256` covers the token ids and `sources` tells where their text came from.
    """

    model: str
    spec: dict[str, Any]
    tokens: int
    sample: float
    seq_len: int
    seed: int
    dtype: str
    sources: tuple[dict[str, Any], ...]
    token_sha256: str
    chunk_sequences: int
    chunks: int
    chunks_done: int = 0
    complete: bool = False
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        # Lists for tuples, as it comes back from disk, so that two manifests can be compared.
        object.__setattr__(self, "spec", json.loads(json.dumps(self.spec)))

    @property
    def attention(self) -> AttentionSpec:
        """The description of the model's attention."""
        from commvq_core.models import AttentionSpec

        return AttentionSpec.from_json(self.spec)

    def sequence_lengths(self, chunk: int) -> list[int]:
        """How many tokens each sequence of a chunk has."""
        start = chunk * self.chunk_sequences * self.seq_len
        end = min(self.tokens, start + self.chunk_sequences * self.seq_len)
        return [min(self.seq_len, end - at) for at in range(start, end, self.seq_len)]

    def chunk_tokens(self, chunk: int) -> int:
        """How many tokens a chunk stores for every layer."""
        return sum(sampled_count(self.sample, length) for length in self.sequence_lengths(chunk))

    def chunk_done(self) -> Manifest:
        """The manifest after one more chunk."""
        return replace(self, chunks_done=self.chunks_done + 1)

    def differences(self, other: Manifest) -> list[str]:
        """The names of the settings in which two runs differ, progress aside."""
        names = [field.name for field in fields(self) if field.name not in _PROGRESS]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back, the format first."""
        value = asdict(self)
        head = {"format": value.pop("format"), "version": value.pop("version")}
        return {**head, **value, "sources": list(self.sources)}

    @classmethod
    def from_json(cls, value: dict[str, Any], place: str) -> Manifest:
        """Read what `to_json` wrote; `place` names the file in the InputError for anything else."""
        if value.get("format") != FORMAT:
            raise InputError(f"{place} is no calibration", "give a folder that `calibrate` wrote")
        version = value.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise InputError(
                f"{place} has format version {version}, and this commvq reads up to {VERSION}",
                "upgrade commvq",
            )
        mend = "run `calibrate` again"
        names = {field.name for field in fields(cls)}
        wrong = sorted(names.symmetric_difference(value))
        if wrong:
            raise InputError(f"{place}: field {wrong[0]} is missing or unknown", mend)
        for name, kind in _KINDS.items():
            if not isinstance(value[name], kind) or isinstance(value[name], bool) != (kind is bool):
                raise InputError(f"{place}: field {name} is {value[name]!r}", mend)
        manifest = cls(**{**value, "sources": tuple(value["sources"])})
        manifest._check(place, mend)
        return manifest

    def _check(self, place: str, mend: str) -> None:
        sane = {
            "tokens": self.tokens >= 1,
            "sample": 0 < self.sample <= 1,
            "seq_len": self.seq_len >= 1,
            "chunk_sequences": self.chunk_sequences >= 1,
            "dtype": self.dtype in ("float16", "bfloat16"),
            "chunks": self.chunks == -(-self.tokens // (self.seq_len * self.chunk_sequences or 1)),
            "chunks_done": 0 <= self.chunks_done <= self.chunks,
            "complete": not self.complete or self.chunks_done == self.chunks,
        }
        for name, fine in sane.items():
            if not fine:
                raise InputError(f"{place}: field {name} is {getattr(self, name)!r}", mend)
        try:
            fine = bool(self.attention.compressible)
        except (KeyError, TypeError, ValueError, AttributeError):
            fine = False
        if not fine:
            raise InputError(f"{place}: field spec describes no attention layers", mend)


_KINDS: dict[str, Any] = {
    "model": str,
    "spec": dict,
    "tokens": int,
    "sample": (int, float),
    "seq_len": int,
    "seed": int,
    "dtype": str,
    "sources": list,
    "token_sha256": str,
    "chunk_sequences": int,
    "chunks": int,
    "chunks_done": int,
    "complete": bool,
}


def sampled_count(sample: float, length: int) -> int:
    """How many of a sequence's `length` tokens are stored: at least one."""
    return max(1, round(sample * length))


def hash_tokens(sequences: Any) -> str:
    """Hex SHA-256 of the ids of int64 tensors, in order."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(sequence.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
