"""`commvq`: wires the commands together. Imports neither torch nor transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from commvq_cli import (
    bench,
    calibrate,
    compare,
    doctor,
    export,
    generate,
    inspect,
    lm_eval,
    train_codebook,
)
from commvq_cli import eval as eval_command
from commvq_cli.errors import Interrupted, report
from typer.core import TyperGroup

from commvq_core import __version__


class CommVQGroup(TyperGroup):
    """A Typer group that ends every failure in one line and the exit status of errors.py."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; unlike the parent, never print a box or a traceback that nobody asked for."""
        extra["windows_expand_args"] = windows_expand_args
        given = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(given, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            status = super().main(
                given, prog_name or "commvq", complete_var, standalone_mode=False, **extra
            )
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            command = next((word for word in given if not word.startswith("-")), None)
            # Not from the parsed options: parsing itself may be what failed.
            status = report(
                error, command=command, known=tuple(self.commands), debug="--debug" in given
            )
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, keeping Ctrl-C from being turned into a silent exit."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interrupted from interrupt


app = typer.Typer(
    cls=CommVQGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("calibrate")(calibrate.command)
app.command("train-codebook")(train_codebook.command)
app.command("export")(export.command)
app.command("inspect")(inspect.command)
app.command("eval")(eval_command.command)
app.command("lm-eval")(lm_eval.command)
app.command("generate")(generate.command)
app.command("compare")(compare.command)
app.command("doctor")(doctor.command)
_bench = typer.Typer(help="Measure this machine.")
_bench.command("decode")(bench.decode)
_bench.command("train")(bench.train)
_bench.command("encode")(bench.encode)
_bench.command("memory")(bench.memory)
app.add_typer(_bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"commvq {__version__}")
        raise typer.Exit


@app.callback()
def _commvq(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A 1-bit and 2-bit key-value cache for long contexts.

    Calibrate a model, train codebooks, export them; then eval and generate with the small cache.
    """


def main() -> NoReturn:
    """Entry point of the installed script."""
    app()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
