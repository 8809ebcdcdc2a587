"""`commvq train-codebook`: fit codebooks to a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session


def command(
    calibration: Annotated[
        Path,
        typer.Argument(metavar="CALIB", help="What commvq calibrate wrote.", show_default=False),
    ],
    out: Annotated[Path, options.out("RUN", "Folder to write.")],
    bits: Annotated[
        str,
        typer.Option(
            metavar="BITS",
            help="Bits an element: 1, 1.5, 2, K,V for keys and values, or auto:1.0, which runs the "
            "model to share them out.",
        ),
    ] = "1",
    preset: Annotated[str, typer.Option(help="Which codecs to fit.")] = "default",
    layers: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="Only these, as 0-3 or 0,2,5-7.", show_default="all"),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes to use; 0: all cores.")] = 0,
    engine: Annotated[str, typer.Option(help="Where the workers run.")] = "local",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fit codebooks to a calibration."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import facts

        from commvq_core.training import (
            TrainConfig,
            parse_auto,
            parse_bits,
            parse_layers,
            train_codebooks,
        )

        auto_bits = parse_auto(bits)
        key_bits, value_bits = parse_bits(bits if auto_bits is None else "1")
        config = TrainConfig(
            key_bits=key_bits,
            value_bits=value_bits,
            auto_bits=auto_bits,
            preset=preset,
            layers=parse_layers(layers),
            workers=workers,
            engine=engine,
            seed=seed,
        )
        summary = train_codebooks(
            calibration, out, config, overwrite=overwrite, resume=resume, progress=ui.progress
        )
        ui.result(summary, lambda: facts("trained", summary))
