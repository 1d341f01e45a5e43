"""The outermost edge of the command line: what goes wrong becomes a message and an exit code."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from portkit.errors import PortkitError

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Edge(TyperGroup):
    """Turns what goes wrong into a message and an exit code; nobody sees a bare traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PortkitError as error:
            _explain(error)
            raise typer.Exit(USAGE) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; what was passed before is kept", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(FAILED) from None
        except Exception as error:
            if type(error).__module__.startswith(("typer", "click")):
                raise
            log = _log(traceback.format_exc())
            typer.echo(
                f"portkit stopped with {type(error).__name__}: {error}".splitlines()[0], err=True
            )
            typer.echo(f"This is a bug of portkit. The traceback is in {log}", err=True)
            raise typer.Exit(USAGE) from None


def _explain(error: PortkitError) -> None:
    from portkit.report.live import show
    from portkit.report.render import error_report

    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": error.to_dict()}))
    show(error_report(error), sys.stderr)


def _log(text: str) -> Path:
    try:
        from portkit.ports import find_port

        folder = find_port().state_dir / "logs"
        folder.mkdir(exist_ok=True)
    except Exception:
        folder = Path(tempfile.gettempdir())
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix="portkit-", suffix=".log", delete=False
    ) as stream:
        stream.write(text)
    return Path(stream.name)
