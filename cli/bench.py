"""`commvq bench`: how fast this machine is, one subcommand a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session

Threads = Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="torch's choice")]


def decode(
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A model whose layers to take (llama-3.1-8b, smollm2-135m).",
            show_default="llama-3.1-8b",
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Instead of --shape: query heads.", show_default=False)
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Instead of --shape: KV heads.", show_default=False)
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Instead of --shape: dims of a head.", show_default=False)
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Tokens. May be repeated.", show_default="8192, 32768, 131072"
        ),
    ] = None,
    bits: Annotated[
        list[float] | None,
        typer.Option(metavar="B", help="Bits an element. May be repeated.", show_default="1, 2"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 1,
    threads: Threads = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw time against context.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the figure.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Time one layer's attention for a new token, over codes and over whole keys and values."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import rows, size

        from commvq_core.bench.decode import ROOFLINE, DecodeBench, bench_decode
        from commvq_core.files import check_output
        from commvq_core.plots import plot_decode, require_matplotlib

        config = DecodeBench(
            shape=shape,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            contexts=tuple(context or DecodeBench.contexts),
            bits=tuple(bits or DecodeBench.bits),
            batch=batch,
            threads=threads,
            device=device,
            seed=seed,
        )
        if png is not None:
            check_output(png, overwrite=overwrite)
            require_matplotlib()
        result = bench_decode(config, ui.progress)
        if png is not None:
            plot_decode(result, png)
        floor = {r["context"]: r["ms_median"] for r in result["rows"] if r["impl"] == ROOFLINE}
        ui.result(
            result,
            lambda: rows(
                f"{result['shape']}, {result['device']}, {result['threads']} threads, reads "
                f"{result['read_bandwidth_gb_s']:.1f} GB/s",
                ["attention", "tokens", "median ms", "least ms", "reads", "times the roofline"],
                [
                    [
                        row["impl"],
                        row["context"],
                        row["ms_median"],
                        row["ms_min"],
                        size(row["bytes_read"]),
                        row["ms_median"] / floor[row["context"]],
                    ]
                    for row in result["rows"]
                ],
            ),
        )


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
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A model whose layers to take. May be repeated.",
            show_default="smollm2-135m, llama-3.1-8b",
        ),
    ] = None,
    bits: Annotated[
        list[float] | None,
        typer.Option(metavar="B", help="Bits an element. May be repeated.", show_default="1, 2"),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Tokens at once. May be repeated.", show_default="1, 32, 2048"
        ),
    ] = None,
    threads: Threads = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Time the encoding of keys and values, and say what share of a prefill it is."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import rows
        from rich.console import Group

        from commvq_core.bench.encode import EncodeBench, bench_encode

        config = EncodeBench(
            shapes=tuple(shape or EncodeBench.shapes),
            bits=tuple(bits or EncodeBench.bits),
            tokens=tuple(tokens or EncodeBench.tokens),
            threads=threads,
            device=device,
            seed=seed,
        )
        result = bench_encode(config, ui.progress)
        columns = ("shape", "bits", "tokens", "side", "impl", "ms_median", "us_per_token_head")
        shares = ("shape", "bits", "dtype", "encode_us", "prefill_us", "share_of_prefill")
        ui.result(
            result,
            lambda: Group(
                rows(
                    f"{result['native']}, {result['threads']} threads",
                    [*columns[:5], "median ms", "µs a token and head"],
                    [[row[column] for column in columns] for row in result["rows"]],
                ),
                rows(
                    "a token and layer of a prefill: linear layers at the matmul rate of this run",
                    [*shares[:3], "encoding µs", "linear layers µs", "share"],
                    [[entry[name] for name in shares] for entry in result["prefill"]],
                ),
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
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="What --shape has anyway.")
    ] = False,
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
                random_weights=random_weights,
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
        sizes = (
            *("peak_bytes", "peak_total_bytes", "steady_bytes", "cache_bytes"),
            *("fp16_cache_bytes", "codebook_bytes"),
        )
        ui.result(
            result,
            lambda: rows(
                f"{result['source']}, {result['device']}, {result['dtype']}",
                [
                    *("cache", "tokens", "peak", "with weights", "after", "cache itself"),
                    *("fp16 by arithmetic", "codebooks", "prefill s", "tokens/s"),
                ],
                [
                    [
                        row["impl"],
                        row["context"],
                        *(None if row[name] is None else size(row[name]) for name in sizes),
                        row["prefill_seconds"],
                        row["tokens_per_second"],
                    ]
                    for row in result["rows"]
                ],
            ),
        )
