"""The tasks, one file each. A new task is a file here and a line in TASKS."""

from __future__ import annotations

from pathlib import Path

from commvq_core.errors import InputError
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.tasks.base import Task
from commvq_core.evaluation.tasks.divergence import Divergence
from commvq_core.evaluation.tasks.gsm8k import GSM8K
from commvq_core.evaluation.tasks.infinitebench import InfiniteBench
from commvq_core.evaluation.tasks.kv import KeyValue
from commvq_core.evaluation.tasks.longbench import LongBench
from commvq_core.evaluation.tasks.niah import Needle
from commvq_core.evaluation.tasks.passkey import Passkey
from commvq_core.evaluation.tasks.perplexity import Perplexity
from commvq_core.evaluation.tasks.ruler import Ruler
from commvq_core.files import check_output
from commvq_core.plots import require_matplotlib

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(Perplexity, Divergence, Needle, KeyValue, LongBench, InfiniteBench),
        *(Passkey, Ruler, GSM8K),
    )
}


def make_task(name: str, options: EvalOptions) -> Task:
    """The task called `name`; raises InputError for an unknown name or options it can't use."""
    if name not in TASKS:
        raise InputError(f"task {name} is not known", f"give one of {', '.join(TASKS)}")
    options.refuse_useless(name, TASKS[name].uses)
    return TASKS[name](options)


def check_grid(task: Task, path: Path, *, overwrite: bool) -> None:
    """Raise InputError unless the task's grid can be drawn to `path`. Touches nothing."""
    if not task.has_grid:
        names = ", ".join(name for name, kind in TASKS.items() if kind.has_grid)
        raise InputError(
            f"task {task.name} has no grid to draw", f"leave out --png, or use {names}"
        )
    check_output(path, overwrite=overwrite)
    require_matplotlib()
