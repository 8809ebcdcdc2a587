"""`commvq generate`: text from a model on a compressed cache."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from commvq_cli import options
from commvq_cli.console import session

from commvq_core.errors import InputError


def command(
    model: options.Model,
    codebook: Annotated[
        str | None,
        typer.Option(
            metavar="ARTIFACT",
            help="Codebooks: a folder or hub id. None: an fp16 cache.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What to answer or continue.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Read the prompt from a file, or - for stdin.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    save_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep the cache, to go on from later.", show_default=False
        ),
    ] = None,
    load_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Go on from a saved cache; the prompt, if any, is the next turn.",
            show_default=False,
        ),
    ] = None,
    window: options.Window = 128,
    sinks: options.Sinks = 4,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Generate text, greedily, on a compressed cache."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        goes_on = load_cache is not None and prompt is None and prompt_file is None
        text = "" if goes_on else read_prompt(prompt, prompt_file)
        if save_cache is not None:
            _check_save(save_cache, compressed=bool(codebook or load_cache), overwrite=overwrite)

        from commvq_cli.tables import size

        from commvq_core.generation import generate_text
        from commvq_core.models import load_model

        artifact = _load(codebook, load_cache)
        loaded = load_model(model, device=device, dtype=dtype, progress=ui.progress)
        with _cache(loaded, artifact, window, sinks, load_cache) as cache:
            answer = generate_text(
                loaded,
                cache,
                text,
                max_new_tokens=max_new_tokens,
                use_template=not raw,
                on_text=None if as_json else ui.write,
            )
            if save_cache is not None:
                cache.save(save_cache, token_ids=cache.token_ids)
        name = "fp16" if artifact is None else artifact.name
        if not as_json:
            ui.write("\n")
        ui.progress.message(
            f"{name}: {answer['cache_tokens']:,} tokens in {size(answer['cache_bytes'])} of cache "
            f"(fp16: {size(answer['fp16_cache_bytes'])}), {answer['seconds']:.1f} s"
        )
        ui.result({"model": model, "codec": name, **answer}, None)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from exactly one of the two options; raises InputError."""
    if (prompt is None) == (prompt_file is None):
        what = "no prompt was given" if prompt is None else "two prompts were given"
        raise InputError(what, "give either --prompt TEXT or --prompt-file FILE (- for stdin)")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        if prompt_file == "-":
            return sys.stdin.read()
        return Path(prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"{prompt_file} can't be read ({reason})", "check --prompt-file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{prompt_file} is no UTF-8 text", "give a text file to --prompt-file"
        ) from error


def _check_save(path: Path, *, compressed: bool, overwrite: bool) -> None:
    if not compressed:
        raise InputError("an fp16 cache can't be saved", "give --codebook, or no --save-cache")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already", "choose another --save-cache, or --overwrite")


def _load(codebook: str | None, saved: Path | None) -> Any:
    # Before the model: an artifact is checked in a moment, a model is loaded in a minute.
    from commvq_core.artifact import load_artifact

    if saved is not None:
        from commvq_core.cache.saved import artifact_of, read_header

        source = artifact_of(saved, read_header(saved))
        return load_artifact(source if codebook is None else codebook)
    return None if codebook is None else load_artifact(codebook)


def _cache(loaded: Any, artifact: Any, window: int, sinks: int, saved: Path | None) -> Any:
    if saved is not None:
        from commvq_core.cache.cache import CommVQCache

        return CommVQCache.load(saved, loaded.model, artifact)
    if artifact is None:
        from commvq_core.cache.half import HalfPrecisionCache

        return contextlib.nullcontext(HalfPrecisionCache(loaded.model))
    from commvq_core.cache.cache import CommVQCache
    from commvq_core.cache.half import half_dtype

    return CommVQCache.from_pretrained(
        artifact,
        loaded.model,
        window=window,
        sinks=sinks,
        exact_dtype=half_dtype(loaded.model),
    )
