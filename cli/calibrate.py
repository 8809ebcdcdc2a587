"""`commvq calibrate`: keys and values of a model on some text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session


def command(
    model: options.Model,
    out: Annotated[Path, options.out("CALIB", "Folder to write.")],
    dataset: options.Dataset = None,
    text_column: options.TextColumn = "text",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run through the model.")] = 65536,
    sample: Annotated[
        float, typer.Option(help="Share of those tokens to store, above 0 and at most 1.")
    ] = 1.0,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens a sequence.")] = 2048,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Record a model's keys and values on some text."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import facts, size

        from commvq_core.calibration.collect import CalibrationConfig, calibrate
        from commvq_core.calibration.data import iter_documents
        from commvq_core.files import check_output
        from commvq_core.models import load_model

        config = CalibrationConfig(
            tokens=tokens,
            sample=sample,
            seq_len=seq_len,
            seed=seed,
            datasets=tuple(dataset or ("builtin",)),
            text_column=text_column,
        )
        # All that can be refused before the model is loaded, which takes a while.
        check_output(out, overwrite=overwrite, resume=resume)
        iter_documents(config.datasets, text_column=text_column)
        loaded = load_model(model, device=device, dtype=dtype, progress=ui.progress)
        began = time.monotonic()
        manifest = calibrate(
            loaded, out, config, overwrite=overwrite, resume=resume, progress=ui.progress
        )
        stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        result = {
            "calibration": str(out),
            "model": manifest.model,
            "tokens": manifest.tokens,
            "sample": manifest.sample,
            "seq_len": manifest.seq_len,
            "layers": len(loaded.spec.compressible),
            "bytes": stored,
            "seconds": round(time.monotonic() - began, 3),
        }
        shown = {**result, "bytes": size(stored)}
        ui.result(result, lambda: facts("calibrated", shown))
