"""`commvq doctor`: what this machine offers, and what is missing."""

from __future__ import annotations

from commvq_cli import options
from commvq_cli.console import session


def command(
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Check this machine and the installation."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import rows
        from rich.table import Table

        from commvq_core.doctor import diagnose

        found = diagnose()

        def view() -> Table:
            cells = [
                [check["name"], check["ok"], check["found"], "" if check["ok"] else check["mend"]]
                for check in found["checks"]
            ]
            return rows("commvq doctor", ["what", "ok", "found", "how to mend it"], cells)

        ui.result(found, view)
