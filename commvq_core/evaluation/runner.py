"""Run a task through several caches, every one on the same examples."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commvq_core import __version__
from commvq_core.cache.saved import weights_sha256
from commvq_core.errors import InputError
from commvq_core.evaluation.beginnings import Beginnings
from commvq_core.evaluation.codecs import BASELINE, EvalCodec
from commvq_core.evaluation.journal import Journal, key_sha256, partial_path
from commvq_core.evaluation.tasks.base import Record, Task
from commvq_core.files import check_output, read_json, write_json
from commvq_core.progress import Progress, Silent

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel


def check_result_path(out: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Raise InputError unless an evaluation may write `out`. Touches nothing.

    An unfinished evaluation of the same name counts as existing.
    """
    if out.is_dir():
        raise InputError(f"{out} is a folder", "give --out the name of a .json file")
    check_output(out, overwrite=overwrite, resume=resume)
    if partial_path(out).exists() and not overwrite and not resume:
        raise InputError(
            f"{out} was begun and not finished", "add --resume to continue, or --overwrite"
        )


def evaluate_to_file(
    loaded: LoadedModel,
    codecs: Sequence[EvalCodec],
    task: Task,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`evaluate`, written to the JSON file `out` and returned.

    With `resume`, an interrupted evaluation goes on after its last finished example, and a finished
    one is returned as it is. Raises InputError when `out` exists and neither flag says what to do,
    or when it was made with other settings.
    """
    check_result_path(out, overwrite=overwrite, resume=resume)
    task.progress = progress or Silent()
    examples = task.prepare(loaded)
    key = run_key(loaded, codecs, task)
    if resume and out.exists():
        stored = read_json(out, "the evaluation")
        if stored.get("run_key") != key_sha256(key):
            raise InputError(
                f"{out} is of an evaluation with other settings",
                "give the same settings, or --overwrite to start again",
            )
        (progress or Silent()).message(f"{out} is complete already")
        return stored
    journal = Journal(out, key, resume=resume)
    records = _run(loaded, codecs, task, examples, journal, progress or Silent())
    result = _result(loaded, codecs, task, records, key)
    write_json(out, result)
    journal.remove()
    return result


def evaluate(
    loaded: LoadedModel,
    codecs: Sequence[EvalCodec],
    task: Task,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run `task` through every codec; the first one must be the fp16 cache (see resolve_codecs).

    Returns the JSON object of design: model, task, settings, results (one a codec, with metrics,
    bits_per_element, resident_bytes, seconds, cache_bytes, every example's record) and versions.
    """
    task.progress = progress or Silent()
    examples = task.prepare(loaded)
    key = run_key(loaded, codecs, task)
    records = _run(loaded, codecs, task, examples, None, progress or Silent())
    return _result(loaded, codecs, task, records, key)


def run_key(loaded: LoadedModel, codecs: Sequence[EvalCodec], task: Task) -> dict[str, Any]:
    """All that decides a result, after `task.prepare`."""
    return {
        "model": loaded.source,
        "model_fingerprint": loaded.spec.fingerprint,
        "weights_sha256": weights_sha256(loaded.model),
        "device": loaded.model.device.type,
        "dtype": _dtype(loaded),
        "task": task.name,
        "settings": task.settings(),
        "codecs": [codec.identity for codec in codecs],
        "commvq": __version__,
    }


def _run(
    loaded: LoadedModel,
    codecs: Sequence[EvalCodec],
    task: Task,
    examples: Sequence[Any],
    journal: Journal | None,
    progress: Progress,
) -> list[list[Record]]:
    """The records of every codec, in the examples' order, taking those that the journal has."""
    assert [codec.name for codec in codecs[:1]] == [BASELINE]
    batches = _batches(task, examples)
    order = [at for batch in batches for at in batch]
    everything = [list(journal.records(at)) if journal else [] for at in range(len(codecs))]
    done = [len(records) for records in everything]
    task.beginnings = Beginnings()
    caches = codecs[0].name if len(codecs) == 1 else f"through {len(codecs)} caches"
    with progress.task(
        f"{task.name} {caches}",
        total=len(examples) * len(codecs),
        unit=task.unit,
        done=sum(done),
    ) as bar:
        end = 0
        for batch in batches:
            end += len(batch)
            # One cache after another, so that they can share what they compute alike.
            for index, codec in enumerate(codecs):
                if end <= done[index]:
                    continue
                new = _run_batch(loaded, codec, task, [examples[at] for at in batch])
                everything[index] += new
                if journal:
                    journal.add(index, new)
                bar.advance(len(batch))
    task.beginnings = None
    return [
        [record for _, record in sorted(zip(order, records, strict=True), key=itemgetter(0))]
        for records in everything
    ]


def _batches(task: Task, examples: Sequence[Any]) -> list[list[int]]:
    """The indices of the examples that run side by side, batch after batch.

    One by one, they run in order. Otherwise those of one kind and of nearly the same size do, for
    the others of a batch are padded to its longest.
    """
    if task.batch_size == 1:
        return [[at] for at in range(len(examples))]
    kinds: dict[Any, list[int]] = {}
    for at, example in enumerate(examples):
        kinds.setdefault(task.batch_key(example), []).append(at)
    batches = []
    for kind in kinds.values():
        kind.sort(key=lambda at: task.size(examples[at]))
        starts = range(0, len(kind), task.batch_size)
        batches += [kind[start : start + task.batch_size] for start in starts]
    return batches


def _run_batch(
    loaded: LoadedModel, codec: EvalCodec, task: Task, batch: Sequence[Any]
) -> list[Record]:
    """Records with the seconds and bytes that fall to each example of the batch."""
    assert task.beginnings is not None
    task.beginnings.spared = 0.0
    began = time.monotonic()
    with codec.open(task.strict) as cache:
        records = task.run_batch(loaded, cache, batch)
        nbytes = int(cache.nbytes) // _rows(cache, len(batch))
    seconds = round((time.monotonic() - began + task.beginnings.spared) / len(batch), 4)
    return [record | {"cache_bytes": nbytes, "seconds": seconds} for record in records]


def _rows(cache: Any, most: int) -> int:
    """How many rows a cache holds still, of the batch that it began with."""
    for layer in cache.layers:
        if isinstance(getattr(layer, "keys", None), Tensor):
            return min(most, layer.keys.shape[0])
    return most


def _result(
    loaded: LoadedModel,
    codecs: Sequence[EvalCodec],
    task: Task,
    records: Sequence[Sequence[Record]],
    key: dict[str, Any],
) -> dict[str, Any]:
    baseline = records[0]
    results = []
    for codec, own in zip(codecs, records, strict=True):
        # At the longest context: there a cache's fixed part weighs least.
        longest = max(range(len(own)), key=lambda index: own[index]["context"])
        results.append(
            {
                "codec": codec.name,
                "bits_per_element": codec.bits_per_element,
                "resident_bytes": codec.resident_bytes,
                "layers_with_their_own_cache": list(codec.own_cache),
                "metrics": task.metrics(own, baseline),
                "seconds": round(sum(record["seconds"] for record in own), 3),
                "context": own[longest]["context"],
                "cache_bytes": own[longest]["cache_bytes"],
                "fp16_cache_bytes": baseline[longest]["cache_bytes"],
                "identity": codec.identity,
                "examples": list(own),
            }
        )
    return {
        "model": loaded.source,
        "task": task.name,
        "settings": {
            **task.settings(),
            "strict_cache": task.strict,
            "device": loaded.model.device.type,
            "dtype": _dtype(loaded),
        },
        "results": results,
        "versions": versions(),
        "model_fingerprint": loaded.spec.fingerprint,
        "weights_sha256": key["weights_sha256"],
        "run_key": key_sha256(key),
    }


def versions() -> dict[str, str]:
    """Versions of what an evaluation runs on."""
    import transformers

    return {
        "commvq": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _dtype(loaded: LoadedModel) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")
