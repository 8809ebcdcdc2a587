"""Help is fast, and says what there is."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from commvq_core import __version__
from tests.cli.helpers import SCRIPT, commvq, succeed

# What the contract names for each command, beside the options that every command has.
CONTRACT = {
    "calibrate": "MODEL --out --dataset --text-column --tokens --sample --seq-len --device --dtype "
    "--seed --overwrite --resume",
    "train-codebook": "CALIB --out --bits --preset --layers --workers --engine --seed --overwrite "
    "--resume",
    "export": "RUN --out --push-to-hub --overwrite",
    "inspect": "CALIB|RUN|ARTIFACT",
    "eval": "MODEL --codebook --codec --calibration --task --dataset --limit --max-length --out "
    "--overwrite --resume",
    "lm-eval": "MODEL --codebook --codec --tasks --include-path --limit --out --overwrite --resume",
    "generate": "MODEL --codebook --prompt --prompt-file --max-new-tokens --save-cache "
    "--load-cache --overwrite",
    "compare": "RESULTS.json --html --png --markdown --overwrite",
    "doctor": "",
    "bench decode": "--shape --heads --kv-heads --head-dim --context --bits --batch --threads "
    "--device --seed --png --overwrite",
    "bench train": "--calibration --layer --head --bits --tokens --steps --threads --seed",
    "bench encode": "--shape --bits --tokens --threads --device --seed",
    "bench memory": "[MODEL] --shape --codebook --bits --context --new-tokens --window --sinks "
    "--prefill-chunk --device --dtype",
}
COMMANDS = list(CONTRACT)


def fastest(command: list[str]) -> float:
    """Processor seconds of the fastest of five runs: the machine may be busy with other things."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        seconds.append(spent)
    return min(seconds)


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"]])
def test_help_takes_less_than_half_a_second(arguments: list[str]) -> None:
    assert fastest([*SCRIPT, *arguments]) < 0.5


@pytest.mark.parametrize(
    "arguments", [["--help"], *([*name.split(), "--help"] for name in COMMANDS)]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from commvq_cli.main import app\n"
        "try:\n"
        f"    app({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'safetensors', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_lists_every_command() -> None:
    shown = succeed("--help")
    assert [name for name in COMMANDS if name.split()[0] not in shown] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_the_options_of_the_contract(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = succeed(*command.split(), "--help")
    wanted = [*CONTRACT[command].split(), "--json", "--quiet", "--debug"]
    assert [option for option in wanted if option not in shown] == []


def test_version() -> None:
    assert succeed("--version") == f"commvq {__version__}\n"


def test_the_installed_script_is_the_same_program() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="commvq")
    assert script.value == "commvq_cli.main:main"


def test_no_command_names_the_commands() -> None:
    result = commvq()
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no command was given: choose one of calibrate, ")


def test_a_group_without_a_command_names_its_own() -> None:
    result = commvq("bench")
    assert result.exit_code == 2
    expected = (
        "error: no command was given: choose one of decode, train, encode, memory "
        "(see commvq bench --help)\n"
    )
    assert result.stderr == expected
