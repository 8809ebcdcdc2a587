"""`commvq eval`: caches compared on the same examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session


def command(
    model: options.Model,
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help="perplexity, divergence (from fp16), niah (a needle in a haystack), kv (one of "
            "many facts), passkey, ruler, gsm8k, longbench or infinitebench.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, options.out("FILE", "JSON file to write.")],
    codebook: options.Codebooks = None,
    codec: options.Codecs = None,
    calibration: options.Calibration = None,
    dataset: options.Dataset = None,
    text_column: options.TextColumn = "text",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Examples: windows of text, questions a cell for niah and kv, rows a subset.",
            show_default="4 windows, 1 needle, 3 facts, all rows",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the longest context. Longer prompts of benchmarks lose their middle.",
            show_default="2048; of benchmarks, the model's context",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Context lengths in tokens (niah, passkey, kv, ruler, infinitebench).",
            show_default="1024,2048; ruler 4096",
        ),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(
            metavar="P,P",
            help="Where the answer is, in percent (niah, passkey, kv).",
            show_default="0,25,50,75,100",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with a benchmark's official files.",
            show_default="the hub",
        ),
    ] = None,
    subset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Part of a benchmark. May be repeated.", show_default="all"
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Whether prompts follow the tokenizer's chat template.",
            show_default="the task's own, see docs/evaluation.md",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Examples of a benchmark that run side by side.", show_default="1"
        ),
    ] = None,
    needles: Annotated[
        int | None,
        typer.Option(min=1, help="niah: how many numbers are hidden.", show_default="1"),
    ] = None,
    needle: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="niah: a sentence to hide in place of a number. May be repeated.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="niah: what --needle is the answer to.", show_default=False
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="niah, passkey, kv, ruler: draw the grid as heat maps.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE",
            help="key or value: codes for that side alone, the other exact.",
            show_default="both",
        ),
    ] = None,
    window: options.Window = 128,
    sinks: options.Sinks = 4,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare compressed caches with fp16 on one task."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import rows
        from rich.console import Group

        from commvq_core.calibration.data import iter_documents
        from commvq_core.evaluation.codecs import (
            check_codecs,
            load_artifacts,
            parse_side,
            resolve_codecs,
        )
        from commvq_core.evaluation.options import EvalOptions, parse_lengths, parse_numbers
        from commvq_core.evaluation.report import (
            grid_rows,
            length_rows,
            subset_rows,
            summary_rows,
        )
        from commvq_core.evaluation.runner import check_result_path, evaluate_to_file
        from commvq_core.evaluation.tasks import check_grid, make_task
        from commvq_core.models import load_model
        from commvq_core.plots import plot_grid

        wanted = EvalOptions(
            datasets=tuple(dataset) if dataset else None,
            text_column=text_column,
            limit=limit,
            max_length=max_length,
            lengths=parse_lengths(lengths, "--lengths"),
            depths=parse_numbers(depths, "--depths"),
            subsets=tuple(dict.fromkeys(subset)) if subset else None,
            data_dir=data_dir,
            chat=chat,
            batch_size=batch_size,
            needles=needles,
            needle=tuple(needle) if needle else None,
            question=question,
            seed=seed,
        )
        chosen = make_task(task, wanted)
        # All that can be refused before the model is loaded, which takes a while.
        check_result_path(out, overwrite=overwrite, resume=resume)
        chosen.check()
        if png is not None:
            check_grid(chosen, png, overwrite=overwrite or resume)
        side = parse_side(only)
        check_codecs(codec or (), calibration, side)
        iter_documents(wanted.texts, text_column=text_column)
        artifacts = load_artifacts(codebook or ())
        loaded = load_model(model, device=device, dtype=dtype, progress=ui.progress)
        codecs = resolve_codecs(
            loaded,
            artifacts=artifacts,
            names=codec or (),
            window=window,
            sinks=sinks,
            only=side,
            calibration=calibration,
        )
        own = max((codec.own_cache for codec in codecs), key=len)
        if own:
            ui.progress.message(
                f"{len(own)} of {len(loaded.spec.layers)} layers keep their own cache (a sliding "
                "window or other state); bits count the others"
            )
        result = evaluate_to_file(
            loaded, codecs, chosen, out, overwrite=overwrite, resume=resume, progress=ui.progress
        )
        if png is not None:
            plot_grid(result, png)

        def view() -> Group:
            grid, subsets, lengths = grid_rows(result), subset_rows(result), length_rows(result)
            title = f"{result['task']}, {model}"
            parts = [rows(title, *summary_rows(result))]
            parts += [] if grid is None else [rows("found, percent", *grid)]
            parts += [] if subsets is None else [rows("score, percent", *subsets)]
            parts += [] if lengths is None else [rows("score by length, percent", *lengths)]
            return Group(*parts)

        ui.result(result, view)
