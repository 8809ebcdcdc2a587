"""Arguments and options that several commands share, so that they read alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub id, a model's folder, or a .gguf file.", show_default=False
    ),
]
Codebooks = Annotated[
    list[str] | None,
    typer.Option(
        "--codebook",
        metavar="ARTIFACT",
        help="Codebooks to use: a folder or hub id. May be repeated.",
        show_default=False,
    ),
]
Codecs = Annotated[
    list[str] | None,
    typer.Option(
        "--codec",
        metavar="CODEC",
        help="Other caches to compare, such as kivi-2, int-4, kvquant-2, turboquant-2 or "
        "hf-hqq-4 (docs/evaluation.md). fp16 always runs.",
        show_default=False,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="CALIB",
        help="What --codec kvquant-N learns its levels from.",
        show_default=False,
    ),
]
Dataset = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="SOURCE",
        help="Text: builtin (the documentation that Python carries), a hub id, or a .txt, .jsonl "
        "or .parquet file. May be repeated.",
        show_default="builtin",
    ),
]
TextColumn = Annotated[
    str,
    typer.Option(metavar="NAME", help="Column that holds the text in .jsonl, .parquet, hub data."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Window = Annotated[int, typer.Option(min=1, help="Newest tokens that stay exact.")]
Sinks = Annotated[int, typer.Option(min=0, help="First tokens that stay exact.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]


def out(metavar: str, what: str) -> typer.models.OptionInfo:
    """The --out option of a command that writes `what`."""
    return typer.Option("--out", "-o", metavar=metavar, help=what, show_default=False)


def artifact_path(value: str) -> str | Path:
    """A codebook argument as a path where there is one, else as the hub id that it must be."""
    path = Path(value).expanduser()
    return path if path.exists() else value
