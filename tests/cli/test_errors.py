"""Every failure is one line and the right status, with a traceback only for those who ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from commvq_core.errors import InputError
from tests.cli.helpers import commvq, only_line, refusal, start


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["calibrate"], "MODEL"),
        (["calibrate", "model"], "--out"),
        (["calibrate", "model", "--out", "c", "--tokens", "many"], "--tokens"),
        (["calibrate", "model", "--out", "c", "--tokens", "0"], "--tokens"),
        (["calibrate", "model", "--out", "c", "--nonsense"], "--nonsense"),
        (["calibrate", "model", "extra", "--out", "c"], "extra"),
        (["train-codebook", "calib", "--out"], "--out"),
        (["eval", "model", "--out", "x.json"], "--task"),
        (["generate"], "MODEL"),
        (["inspect"], "CALIB"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_culprit(arguments: list[str], named: str) -> None:
    result = commvq(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    line = only_line(result.stderr)
    assert named in line
    assert line.endswith("--help")


def test_bad_usage_of_a_command_points_to_its_own_help() -> None:
    assert only_line(commvq("eval").stderr).endswith(": see commvq eval --help")


def test_the_script_reports_bad_usage_the_same_way() -> None:
    process = start("calibrate")
    stdout, stderr = process.communicate()
    assert process.returncode == 2
    assert stdout == ""
    assert only_line(stderr) == only_line(commvq("calibrate").stderr)


def break_doctor(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("commvq_core.doctor.diagnose", fail)


def test_an_unexpected_failure_is_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    break_doctor(monkeypatch, RuntimeError("first line\nsecond line"))
    result = commvq("doctor")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: RuntimeError: first line second line: run again with --debug for the traceback\n"
    )


def test_a_page_of_text_from_a_library_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    break_doctor(monkeypatch, RuntimeError("word " * 1000))
    assert len(only_line(commvq("doctor").stderr)) < 800


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("broken"), 1), (InputError("bad", "mend it"), 2)]
)
def test_debug_shows_the_traceback_and_keeps_the_status(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    break_doctor(monkeypatch, error)
    result = commvq("doctor", "--debug")
    assert result.exit_code == status
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_ctrl_c_is_status_130_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    break_doctor(monkeypatch, KeyboardInterrupt())
    result = commvq("doctor")
    assert result.exit_code == 130
    assert only_line(result.stderr) == "error: interrupted: run the command again"


def test_ctrl_c_in_a_command_that_resumes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("commvq_core.training.train_codebooks", interrupt)
    result = commvq("train-codebook", "calib", "--out", "run")
    assert result.exit_code == 130
    assert "--resume" in only_line(result.stderr)


def test_both_overwrite_and_resume_are_refused(tmp_path: Path, tiny_calibration: Path) -> None:
    line = refusal(
        "train-codebook", tiny_calibration, "--out", tmp_path / "run", "--overwrite", "--resume"
    )
    assert "contradict" in line
