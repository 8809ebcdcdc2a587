"""What a task is: examples, how one is run through a cache, and what the records add up to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from commvq_core.evaluation.options import EvalOptions
from commvq_core.progress import Progress, Silent

if TYPE_CHECKING:
    from commvq_core.evaluation.beginnings import Beginnings
    from commvq_core.models import LoadedModel

Record = dict[str, Any]  # what one example gave: JSON only


class Task(ABC):
    """One evaluation. Examples depend on the options and the tokenizer alone, never on a codec.

    `name` as on the command line, `unit` what an example is called in progress bars, `strict`
    whether caches are opened strictly (see CommVQCache), `uses` the options it reads of those that
    only some tasks have a use for (see EvalOptions.refuse_useless), `has_grid` whether its metrics
    hold a grid that can be drawn.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "examples"
    strict: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset()
    progress: Progress = Silent()  # where a long `prepare` tells of itself; set by the runner
    has_grid: ClassVar[bool] = False
    beginnings: Beginnings | None = None  # shared by the caches of a run; set by the runner

    @property
    def batch_size(self) -> int:
        """How many examples may run side by side at most; see `batch_key`."""
        return 1

    def batch_key(self, example: Any) -> Any:
        """Only examples with the same key run side by side."""
        return None

    def size(self, example: Any) -> int:
        """How long an example is: those of nearly the same size run side by side."""
        return 0

    @abstractmethod
    def __init__(self, options: EvalOptions) -> None:
        """Raises InputError for options that this task has no use for."""

    def check(self) -> None:
        """Raise InputError for files that lack, before a model is loaded."""
        return

    @abstractmethod
    def prepare(self, loaded: LoadedModel) -> Sequence[Any]:
        """The examples, in order. Raises InputError when the text does not do."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """After `prepare`: all that decides the examples and how they are run, as JSON."""

    @abstractmethod
    def run(self, loaded: LoadedModel, cache: Any, example: Any) -> Record:
        """Run one example with a fresh cache."""

    def run_batch(self, loaded: LoadedModel, cache: Any, examples: Sequence[Any]) -> list[Record]:
        """Run several examples side by side with a fresh cache; each record as `run` gives it."""
        (example,) = examples
        return [self.run(loaded, cache, example)]

    @abstractmethod
    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """What the records of all examples add up to; `baseline` are those of the fp16 cache."""
