"""Run many independent jobs, on this machine's cores or on a Ray cluster.

Every job runs on one thread, so that its result does not depend on how many run beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from typing import TypeVar

import torch

from commvq_core.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")
Engine = Callable[[Callable[[Job], Result], Sequence[Job], int], Iterator[tuple[Job, Result]]]


def check_engine(name: str) -> None:
    """Raise InputError when there is no engine of that name or it is not installed."""
    if name not in ENGINES:
        raise InputError(f"engine {name!r} is not known", f"give {' or '.join(ENGINES)}")
    if name == "ray" and find_spec("ray") is None:
        raise InputError(
            "--engine ray needs the package ray", "pip install 'commvq[ray]', or use --engine local"
        )


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_local(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, result) as jobs finish. `workers` 0 takes every core; 1 stays in this process.

    The first exception of a job is raised here and ends the others.
    """
    workers = min(workers or available_cores(), max(1, len(jobs)))
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for job in jobs:
                yield job, function(job)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        futures = {pool.submit(function, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this worker when the process that started it is gone.

    A pool's worker holds both ends of its queue, and so would wait for ever for a killed parent.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_ray(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    """The same on Ray: the cluster of RAY_ADDRESS if set, else one on this machine.

    The nodes must see the same files. `workers` 0 takes every core of the cluster.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            num_cpus=None if "RAY_ADDRESS" in os.environ else workers or None, log_to_driver=False
        )
    try:
        remote = ray.remote(num_cpus=1)(_on_one_thread)
        waiting = {remote.remote(function, job): job for job in jobs}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            for reference in done:
                job = waiting.pop(reference)
                try:
                    yield job, ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause or error from error
    finally:
        if started:
            ray.shutdown()


def _on_one_thread(function: Callable[[Job], Result], job: Job) -> Result:
    torch.set_num_threads(1)
    return function(job)


ENGINES: dict[str, Engine] = {"local": run_local, "ray": run_ray}
