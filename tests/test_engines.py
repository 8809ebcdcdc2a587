"""Engines: every job done once, failures handed on, workers that never outstay their welcome."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from commvq_core.engines import ENGINES, available_cores, check_engine, run_local
from commvq_core.errors import InputError
from commvq_core.training import train_codebooks
from tests import runs


def square(job: int) -> tuple[int, int]:
    """The job's square, and the threads that it could use."""
    return job * job, torch.get_num_threads()


def refuse_three(job: int) -> int:
    if job == 3:
        raise InputError("three is no job", "give another")
    return job


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once_on_one_thread(workers: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        done = dict(run_local(square, range(5), workers))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert done == {job: (job * job, 1) for job in range(5)}


def test_no_jobs_need_no_workers() -> None:
    assert list(run_local(square, [], 0)) == []
    assert available_cores() >= 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_raises_its_own_error_here(workers: int) -> None:
    with pytest.raises(InputError, match="three is no job: give another") as caught:
        list(run_local(refuse_three, range(5), workers))
    assert caught.value.mend == "give another"


def test_leaving_early_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        jobs = run_local(square, range(5), 1)
        next(jobs)
        jobs.close()  # type: ignore[attr-defined]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_ray_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--engine ray needs the package ray: pip install") as no:
        train_codebooks(tmp_path / "calib", tmp_path / "run", runs.config(engine="ray"))
    assert "\n" not in str(no.value)
    assert list(tmp_path.iterdir()) == []
    check_engine("local")


class FakeRay(ModuleType):
    """As much of Ray as the engine uses; jobs run when they are waited for."""

    def __init__(self, *, initialized: bool) -> None:
        super().__init__("ray")
        self.__spec__ = SimpleNamespace(name="ray")  # type: ignore[assignment]
        self.initialized = initialized
        self.log: list[Any] = []
        self.exceptions = SimpleNamespace(RayTaskError=self.TaskError)

    class TaskError(Exception):
        def __init__(self, cause: Exception) -> None:
            self.cause = cause

    def is_initialized(self) -> bool:
        return self.initialized

    def init(self, **options: Any) -> None:
        self.log.append(("init", options))

    def shutdown(self) -> None:
        self.log.append("shutdown")

    def remote(self, **options: Any) -> Any:
        assert options == {"num_cpus": 1}
        return lambda function: SimpleNamespace(remote=lambda *args: (function, *args))

    def wait(self, waiting: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return waiting[-num_returns:], waiting[:-num_returns]

    def get(self, reference: Any) -> Any:
        function, *arguments = reference
        try:
            return function(*arguments)
        except Exception as error:
            raise self.TaskError(error) from error


def use_ray(monkeypatch: pytest.MonkeyPatch, *, initialized: bool = False) -> FakeRay:
    ray = FakeRay(initialized=initialized)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return ray


def test_ray_does_every_job_on_the_cores_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = use_ray(monkeypatch)
    check_engine("ray")
    assert dict(ENGINES["ray"](square, range(4), 3)) == {job: (job * job, 1) for job in range(4)}
    assert ray.log == [("init", {"num_cpus": 3, "log_to_driver": False}), "shutdown"]


def test_ray_asks_no_cores_of_a_cluster_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = use_ray(monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    list(ENGINES["ray"](square, [1], 3))
    assert ray.log[0] == ("init", {"num_cpus": None, "log_to_driver": False})


def test_a_ray_session_that_was_there_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = use_ray(monkeypatch, initialized=True)
    list(ENGINES["ray"](square, [1], 0))
    assert ray.log == []


def test_a_job_that_fails_on_ray_raises_its_own_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = use_ray(monkeypatch)
    with pytest.raises(InputError, match="three is no job"):
        list(ENGINES["ray"](refuse_three, range(5), 0))
    assert ray.log[-1] == "shutdown"
