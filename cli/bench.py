"""`commvq bench`: how fast this machine is, one subcommand a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session


def train(
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="CALIB",
            help="What commvq calibrate wrote.",
            show_default="made-up keys",
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer.", show_default="the middle one")] = None,
    head: Annotated[int, typer.Option(min=0, help="KV head.")] = 0,
    bits: Annotated[float, typer.Option(help="Bits an element.")] = 1.0,
    tokens: Annotated[int, typer.Option(min=1, help="Keys to fit.")] = 16_384,
    steps: Annotated[int, typer.Option(min=1, help="Annealing steps a round, at most.")] = 100,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each fit.")] = 1,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fit one head's keys by the paper's method, dense and fast, and by ours."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import rows

        from commvq_core.bench.train import TrainBench, bench_train

        result = bench_train(
            TrainBench(calibration, layer, head, bits, tokens, steps, threads, seed), ui.progress
        )
        columns = ("impl", "bits_per_element", "seconds", "mse_relative", "peak_bytes")
        names = ["method", "bits/element", "seconds", "error of unseen keys", "peak bytes"]
        ui.result(
            result,
            lambda: rows(
                f"{result['source']}, {result['tokens']:,} keys",
                [*names, "codes as dense"],
                [[row[c] for c in (*columns, "same_codes")] for row in result["rows"]],
            ),
        )


def encode(
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads.", show_default="torch's choice")
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Encode vectors with the compiled operator and with PyTorch."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import rows

        from commvq_core.bench.encode import bench_encode

        result = bench_encode(threads=threads)
        columns = ("name", "impl", "ms_median", "ms_min")
        ui.result(
            result,
            lambda: rows(
                f"{result['native']}, {result['threads']} threads",
                ["case", "impl", "median ms", "least ms"],
                [[row[column] for column in columns] for row in result["rows"]],
            ),
        )


def memory(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A hub id, folder or .gguf file.", show_default=False
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Instead of MODEL: one of that shape with random weights (llama-3.1-8b, "
            "smollm2-135m).",
            show_default=False,
        ),
    ] = None,
    codebook: Annotated[
        str | None,
        typer.Option(
            metavar="ARTIFACT",
            help="Codebooks: a folder or hub id.",
            show_default="random ones of --bits",
        ),
    ] = None,
    bits: Annotated[float, typer.Option(help="Bits an element of random codebooks.")] = 1.0,
    context: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Tokens. May be repeated.", show_default="8192"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 16,
    window: options.Window = 128,
    sinks: options.Sinks = 4,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt that run at once.")
    ] = 2048,
    device: options.Device = "auto",
    dtype: options.DType = "bfloat16",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure what a context takes in memory, beside transformers' own cache."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import rows, size

        from commvq_core.bench.memory import MemoryBench, bench_memory

        result = bench_memory(
            MemoryBench(
                model=model,
                shape=shape,
                codebook=None if codebook is None else options.artifact_path(codebook),
                bits=bits,
                contexts=tuple(context or (8192,)),
                new_tokens=new_tokens,
                window=window,
                sinks=sinks,
                prefill_chunk=prefill_chunk,
                device=device,
                dtype=dtype,
            ),
            ui.progress,
        )
        sizes = ("peak_bytes", "steady_bytes", "cache_bytes", "fp16_cache_bytes", "codebook_bytes")
        ui.result(
            result,
            lambda: rows(
                f"{result['source']}, {result['device']}, {result['dtype']}",
                [
                    *("cache", "tokens", "peak", "after", "cache itself", "fp16 by arithmetic"),
                    *("codebooks", "prefill s", "tokens/s"),
                ],
                [
                    [
                        row["impl"],
                        row["context"],
                        *(size(row[name]) for name in sizes),
                        row["prefill_seconds"],
                        row["tokens_per_second"],
                    ]
                    for row in result["rows"]
                ],
            ),
        )
