"""Run tasks of lm-evaluation-harness through several caches, and write what they gave."""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commvq_core.errors import InputError, first_line
from commvq_core.evaluation.codecs import EvalCodec
from commvq_core.evaluation.journal import key_sha256
from commvq_core.evaluation.runner import check_result_path, versions
from commvq_core.files import sha256_of_text, write_json
from commvq_core.progress import Progress, Silent

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel


@dataclass(frozen=True)
class HarnessOptions:
    """What `commvq lm-eval` passes on to lm-eval.

    `include_path` is a folder of task files (.yaml) beside lm-eval's own tasks. `num_fewshot` None
    is each task's own number; `max_length` None the model's. Raises InputError for impossible
    values.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    max_length: int | None = None
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise InputError("no task was named", "give --tasks such as hellaswag,gsm8k")
        for name, value in (("--limit", self.limit), ("--max-length", self.max_length)):
            if value is not None and value < 1:
                raise InputError(f"{name} {value}", "give at least 1")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(
                f"{self.include_path} is not a folder", "give --include-path a folder of task files"
            )


def check_tasks(options: HarnessOptions) -> Any:
    """lm-eval's TaskManager, once every task was found and its data read.

    Raises InputError when lm-eval is not installed, a task is unknown, or its data can't be read.
    """
    if find_spec("lm_eval") is None:
        raise InputError("this needs the package lm-eval", "pip install 'commvq[lm-eval]'")
    from lm_eval.tasks import TaskManager

    if options.include_path is not None:
        # To read the thousands of lm-eval's own task files takes many seconds; spare it if we can.
        own = TaskManager(include_path=options.include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in options.tasks) and not _failing(own, options):
            return own
    manager = TaskManager(include_path=options.include_path)
    for name in options.tasks:
        if not manager.match_tasks([name]):
            raise InputError(
                f"lm-eval has no task {name}",
                "check the name (lm-eval ls tasks), or give --include-path with its task file",
            )
    for name, error in _failing(manager, options).items():
        raise InputError(
            f"task {name} can't be loaded ({first_line(error)})",
            "check its task file, its data, and the connection where they are on the hub",
        ) from error
    return manager


def _failing(manager: Any, options: HarnessOptions) -> dict[str, Exception]:
    """The tasks that can't be loaded, and why: lm-eval raises whatever the data's reader does."""
    failing = {}
    for name in options.tasks:
        try:
            manager.load([name])
        except Exception as error:
            failing[name] = error
    return failing


def check_harness_path(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise InputError unless a run may write `out`; answers of an unfinished one count as well."""
    check_result_path(out, overwrite=overwrite, resume=resume)
    if _stores(out) and not overwrite and not resume:
        raise InputError(
            f"{out} was begun and not finished", "add --resume to continue, or --overwrite"
        )


def run_harness(
    loaded: LoadedModel,
    codecs: Sequence[EvalCodec],
    options: HarnessOptions,
    manager: Any,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every codec on the same requests; the JSON object of `evaluate`, written to `out`.

    `manager` is what `check_tasks` returned. `metrics` of a codec are {task: {metric: value}} under
    lm-eval's own names. With `resume`, the answers of an interrupted run are taken from files
    beside `out`. Raises InputError when `out` exists and neither flag says what to do.
    """
    check_harness_path(out, overwrite=overwrite, resume=resume)
    for store in [] if resume else _stores(out):
        store.unlink()
    progress = progress or Silent()
    key = {
        "model": loaded.source,
        "model_fingerprint": loaded.spec.fingerprint,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "options": asdict(options),
        "versions": _versions(),
    }
    results, seen, about = [], set(), {}
    for codec in codecs:
        progress.message(f"lm-eval {', '.join(options.tasks)}: {codec.name}")
        store = _store(out, {**key, "codec": codec.identity})
        began = time.monotonic()
        found = _simple_evaluate(loaded, codec, options, manager, store, progress)
        samples = _samples(found["samples"])
        seen.add(sha256_of_text(json.dumps([s["prompt"] for s in samples])))
        about = {
            "task_versions": found["versions"],
            "num_fewshot": found["n-shot"],
            "examples": {name: count["effective"] for name, count in found["n-samples"].items()},
        }
        results.append(
            {
                "codec": codec.name,
                "bits_per_element": codec.bits_per_element,
                "resident_bytes": codec.resident_bytes,
                "layers_with_their_own_cache": list(codec.own_cache),
                "metrics": {name: _metrics(value) for name, value in found["results"].items()},
                "seconds": round(time.monotonic() - began, 3),
                "identity": codec.identity,
                "examples": samples,
            }
        )
    assert len(seen) == 1  # lm-eval's requests don't depend on the codec
    result = {
        "model": loaded.source,
        "task": "lm-eval",
        "settings": {**asdict(options), **about, "dtype": key["dtype"], "device": key["device"]}
        | {"examples_sha256": seen.pop()},
        "results": results,
        "versions": _versions(),
        "model_fingerprint": loaded.spec.fingerprint,
        "run_key": key_sha256({**key, "codecs": [codec.identity for codec in codecs]}),
    }
    write_json(out, result)
    for store in _stores(out):
        store.unlink()
    return result


def _simple_evaluate(
    loaded: LoadedModel,
    codec: EvalCodec,
    options: HarnessOptions,
    manager: Any,
    store: Path,
    progress: Progress,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from commvq_core.evaluation.lm_eval_model import CommVQLM

    model = CommVQLM(
        loaded.model,
        tokenizer=loaded.tokenizer,
        open_cache=codec.open,
        batch_size=options.batch_size,
        max_length=options.max_length,
        progress=progress,
    )
    found = simple_evaluate(
        model=model,
        tasks=list(options.tasks),
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.chat,
        use_cache=str(store).removesuffix(_STORE),
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    assert found is not None
    return dict(found)


_STORE = "_rank0.db"  # what lm-eval puts behind the name of its store of answers


def _store(out: Path, key: Mapping[str, Any]) -> Path:
    return out.parent / f".{out.name}.{key_sha256(dict(key))[:12]}{_STORE}"


def _stores(out: Path) -> list[Path]:
    """The answers that unfinished runs left beside `out`."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.*{_STORE}"))


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's numbers; "acc,none" becomes "acc", other filters keep their name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, (int, float))
    }


def _samples(by_task: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One record an example: what was asked, what was expected, and what came."""
    return [
        {
            "task": task,
            "id": sample["doc_id"],
            "prompt": sample["prompt_hash"],
            "expected": str(sample["target"]),
            "prediction": json.loads(json.dumps(sample["filtered_resps"], default=str)),
        }
        for task, samples in by_task.items()
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {**versions(), "lm-eval": version("lm-eval")}
