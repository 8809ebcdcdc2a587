"""`commvq lm-eval`: tasks of lm-evaluation-harness on compressed caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session


def command(
    model: options.Model,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK,TASK", help="Names of lm-eval's tasks or groups.", show_default=False
        ),
    ],
    out: Annotated[Path, options.out("FILE", "JSON file to write.")],
    codebook: options.Codebooks = None,
    codec: options.Codecs = None,
    calibration: options.Calibration = None,
    include_path: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of more task files (.yaml).", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples a task.", show_default="all")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples in a prompt.", show_default="the task's own"),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.")
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the longest context.", show_default="the model's"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts generated at once.")] = 1,
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
    """Run tasks of lm-evaluation-harness with compressed caches (needs the extra lm-eval)."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        import logging

        from commvq_cli.tables import rows
        from rich.table import Table

        from commvq_core.evaluation.codecs import (
            check_codecs,
            load_artifacts,
            resolve_codecs,
        )
        from commvq_core.evaluation.lm_eval_run import (
            HarnessOptions,
            check_harness_path,
            check_tasks,
            run_harness,
        )
        from commvq_core.models import load_model

        wanted = HarnessOptions(
            tasks=tuple(name.strip() for name in tasks.split(",")),
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
        )
        if not debug:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
        check_harness_path(out, overwrite=overwrite, resume=resume)
        check_codecs(codec or (), calibration)
        artifacts = load_artifacts(codebook or ())
        manager = check_tasks(wanted)
        loaded = load_model(model, device=device, dtype=dtype, progress=ui.progress)
        codecs = resolve_codecs(
            loaded,
            artifacts=artifacts,
            names=codec or (),
            window=window,
            sinks=sinks,
            calibration=calibration,
        )
        result = run_harness(
            loaded,
            codecs,
            wanted,
            manager,
            out,
            overwrite=overwrite,
            resume=resume,
            progress=ui.progress,
        )

        def view() -> Table:
            cells = [
                [entry["codec"], entry["bits_per_element"], task, name, value]
                for task in result["results"][0]["metrics"]
                for name in result["results"][0]["metrics"][task]
                for entry in result["results"]
                for value in [entry["metrics"][task][name]]
            ]
            return rows(
                f"lm-eval, {model}", ["cache", "bits/element", "task", "metric", "value"], cells
            )

        ui.result(result, view)
