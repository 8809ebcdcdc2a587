"""The tasks, one file each. A new task is a file here and a line in TASKS."""

from __future__ import annotations

from commvq_core.errors import InputError
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.tasks.base import Task
from commvq_core.evaluation.tasks.divergence import Divergence
from commvq_core.evaluation.tasks.infinitebench import InfiniteBench
from commvq_core.evaluation.tasks.kv import KeyValue
from commvq_core.evaluation.tasks.longbench import LongBench
from commvq_core.evaluation.tasks.niah import Needle
from commvq_core.evaluation.tasks.perplexity import Perplexity

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Perplexity, Divergence, Needle, KeyValue, LongBench, InfiniteBench)
}


def make_task(name: str, options: EvalOptions) -> Task:
    """The task called `name`; raises InputError for an unknown name or options it can't use."""
    if name not in TASKS:
        raise InputError(f"task {name} is not known", f"give one of {', '.join(TASKS)}")
    options.refuse_useless(name, TASKS[name].uses)
    return TASKS[name](options)
