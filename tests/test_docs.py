"""The documentation says nothing that is not so: links, commands, names, keys and examples."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "csrc" / "README.md", *(ROOT / "docs").glob("*.md")]
OPTION = re.compile(r"--[a-z][a-z-]+")


def without_code(page: Path) -> str:
    """A page's text, fenced blocks left out: what looks like a link in there is none."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def code_blocks(page: Path, after: str = "") -> list[str]:
    """The Python blocks of a page, from the text `after` on."""
    text = page.read_text(encoding="utf-8")
    assert after in text
    return re.findall(r"^```python\n(.*?)^```", text[text.index(after) :], flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a link may name behind #, by GitHub's rules."""
    titles = re.findall(r"^#+ (.*)$", without_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_at_most_150_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(linked), target


# The command line as README.md shows it.


def shown_commands() -> dict[str, str]:
    """Command -> how the README's block shows it."""
    section = README.read_text(encoding="utf-8").split("## The command line")[1].split("\n## ")[0]
    block = re.search(r"^```\n(.*?)^```", section, flags=re.M | re.S)
    assert block is not None
    parts = re.split(r"^commvq ", block.group(1), flags=re.M)[1:]
    # "bench train ..." is a command of a group, "export RUN ..." one of its own.
    return {re.match(r"(bench )?[a-z-]+", part).group(): part for part in parts}  # type: ignore[union-attr]


def known_commands() -> dict[str, Any]:
    """Every command, those of groups as "group command"."""
    import typer
    from commvq_cli.main import app

    top: Any = typer.main.get_command(app)
    found = {}
    for name, entry in top.commands.items():
        for inner, command in getattr(entry, "commands", {"": entry}).items():
            found[f"{name} {inner}".strip()] = command
    return found


def shown_for_all() -> set[str]:
    """The options that the README names in the text below the block."""
    section = README.read_text(encoding="utf-8").split("## The command line")[1].split("\n## ")[0]
    return set(OPTION.findall(section.rpartition("```")[2]))


def help_options(command: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options in a command's --help."""
    from commvq_cli.main import app

    monkeypatch.setenv("COLUMNS", "160")  # so that no name is cut
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    return set(OPTION.findall(re.sub(r"\x1b\[[0-9;]*m", "", result.output)))


def parameters(command: str) -> dict[str, Any]:
    """Option -> its parameter."""
    return {name: p for p in known_commands()[command].params for name in p.opts}


def test_readme_shows_every_command_and_no_other() -> None:
    assert list(shown_commands()) == list(known_commands())


@pytest.mark.parametrize("command", shown_commands())
def test_readme_shows_the_options_that_there_are(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = set(OPTION.findall(shown_commands()[command]))
    known = help_options(command, monkeypatch)
    assert shown <= known
    assert known - shown <= {*shown_for_all(), "--help"}


@pytest.mark.parametrize("command", shown_commands())
def test_readme_shows_the_defaults_that_there_are(command: str) -> None:
    known = parameters(command)
    for option, value in re.findall(r"\[(--[a-z-]+) ([\w.]+)\]", shown_commands()[command]):
        if value.islower() or value[0].isdecimal():  # capitals stand for what users give
            assert known[option].default is None or str(known[option].default) == value, option


# Names and keys.


def test_method_names_functions_that_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    classes = {
        "AdditiveCodec": "codecs.additive",
        "CalibrationStore": "calibration.store",
        "CommVQLayer": "cache.layer",
        "Tile": "cache.attention",
    }
    names = re.findall(r"`([A-Za-z]\w*(?:\.\w+)+)`", text)
    assert len(names) > 40
    for name in names:
        if name.endswith(".py"):
            assert list((ROOT / "commvq_core").rglob(name.rpartition("/")[2])), name
            continue
        first = name.partition(".")[0]
        found = resolve(f"{classes[first]}.{name}" if first in classes else name)
        assert found is not None, name


def resolve(name: str) -> Any:
    """The module, class or function of commvq_core called `name`; None when there is none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["commvq_core", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute, None)
        return found
    return None


def documented() -> set[str]:
    """Everything that docs/format.md writes as code."""
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    return {
        name for quoted in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"\w+", quoted)
    }


def test_format_describes_every_key_and_tensor(
    tiny_calibration: Path, tiny_run: Path, tiny_artifact: Path
) -> None:
    from safetensors import safe_open

    known = documented()
    files = [tiny_calibration / "manifest.json", tiny_run / "run.json"]
    for path in [*files, tiny_artifact / "config.json"]:
        assert set(keys_of(json.loads(path.read_text(encoding="utf-8")))) <= known, path
    line = (tiny_run / "log.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert set(keys_of(json.loads(line))) <= known
    for folder in (tiny_calibration, tiny_run, tiny_artifact):
        for path in folder.rglob("*.safetensors"):
            with safe_open(path, "pt") as handle:
                names = {name.rpartition(".")[2] for name in handle.keys()}  # noqa: SIM118
                assert names | set(handle.metadata() or {}) <= known, path


def keys_of(value: Any) -> Iterator[str]:
    """Every key of a JSON value, layer indices left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not key.isdecimal():
                yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


# Examples.


def test_the_python_examples_of_the_readme_run(tiny_model_dir: Path, tiny_artifact: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    inputs = tokenizer("the rain in spain " * 60, return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 128  # so that some tokens become codes
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "inputs": inputs}
    blocks = code_blocks(README)
    assert len(blocks) == 2
    for block in blocks:
        assert "runs/quickstart/artifact" in block
        exec(block.replace("runs/quickstart/artifact", str(tiny_artifact)), names)
    assert names["out"].shape[1] > inputs["input_ids"].shape[1]
    assert names["cache"].get_seq_length() > 0
    assert names["answer"][0]["generated_text"].startswith("Once upon a time")


@pytest.fixture
def uniform(monkeypatch: pytest.MonkeyPatch) -> type:
    """The codec of docs/add-a-codec.md, as if its file were there and registered."""
    from commvq_core.codecs import registry

    name = "commvq_core.codecs.uniform"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(code_blocks(ROOT / "docs" / "add-a-codec.md", "<!-- codec -->")[0], module.__dict__)
    codec: type = module.UniformCodec
    monkeypatch.setitem(registry.CODECS, "uniform", codec)
    monkeypatch.setitem(registry.PRESETS, "uniform", (codec, codec))
    return codec


def test_the_tests_that_add_a_codec_shows_pass(uniform: type) -> None:
    names: dict[str, Any] = {}
    exec(code_blocks(ROOT / "docs" / "add-a-codec.md", "<!-- tests -->")[0], names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 5
    for test in tests:
        test()


def test_the_codec_of_add_a_codec_is_trained_exported_and_run(
    uniform: type, tiny_model_dir: Path, tiny_calibration: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from commvq_core import CommVQCache
    from commvq_core.artifact import export_run, load_artifact
    from commvq_core.training import TrainConfig, train_codebooks

    run, artifact = tmp_path / "run", tmp_path / "artifact"
    config = TrainConfig(key_bits=2, value_bits=4, preset="uniform", workers=1)
    summary = train_codebooks(tiny_calibration, run, config)
    assert train_codebooks(tiny_calibration, run, config, resume=True)["units"] == summary["units"]
    assert export_run(run, artifact)["bits_per_element"] == summary["bits_per_element"] == 3
    codecs = load_artifact(artifact).codecs
    assert all(isinstance(codec, uniform) for pair in codecs.values() for codec in pair)

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ids = torch.randint(2, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
        with CommVQCache(model, codecs, strict=True) as cache:
            got = model(ids, past_key_values=cache).logits
    assert cache.compressed_layers[0].code_length == 72
    exact, coded = (got - want)[:, :128].abs().max(), (got - want)[:, 128:].abs().max()
    assert exact < 1e-4 < coded
