"""The verbs `adopt`, `diagnose` and `rehearse` of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from portkit.edge import FAILED

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def adopt(
    file: Annotated[
        str, typer.Argument(metavar="FILE.py", help="A vLLM model file, or a module of vLLM's.")
    ],
    model: Annotated[str | None, typer.Option(help="Architecture, as in config.json.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder with config.json and safetensors; else a tiny one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the port; else the file's.")] = None,
    cls: Annotated[
        str | None, typer.Option("--class", help="The class in the file, if called otherwise.")
    ] = None,
    original: Annotated[
        Path | None, typer.Option(help="The Transformers modeling file, if it is your own.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder to make the port in.")] = None,
    accept_unlicensed: Annotated[
        bool, typer.Option("--accept-unlicensed", help="You may use that original.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a port of a vLLM model file that you already have, at no step in particular."""
    from portkit.adopt import adopt as adopt_file
    from portkit.report.live import Ongoing

    with Ongoing(f"adopting {Path(file).name}", quiet=as_json) as ongoing:
        made = adopt_file(
            file,
            architecture=model,
            checkpoint=checkpoint,
            name=name,
            cls=cls,
            original=original,
            root=root,
            accept_unlicensed=accept_unlicensed,
            progress=ongoing.say,
        )
    if as_json:
        row = {"name": made.name, "root": str(made.root), "architecture": made.architecture}
        return typer.echo(json.dumps(row, indent=2))
    typer.echo(f"✓ adopted {Path(file).name} as the port {made.name}: {made.root}")
    typer.echo(f"next:  portkit diagnose {made.name}")


def diagnose(
    port: Annotated[
        str | None,
        typer.Argument(metavar="[PORT]", help="Name or folder; else as everywhere: --port."),
    ] = None,
    named: Annotated[str | None, typer.Option("--port", "-p", metavar="NAME|DIR")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out checks that seldom fail alone.")
    ] = False,
    trials: Annotated[
        bool, typer.Option(help="Try edits live, on copies, to find the one that heals.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write the page as HTML here, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say on one page what is right, what is wrong first, where, and which edit heals it."""
    from portkit.diagnosis.run import diagnose as diagnose_port
    from portkit.ports import find_port
    from portkit.report.diagnosis import diagnosis_report
    from portkit.report.live import Ongoing, show

    opened = find_port(port or named)
    with Ongoing(f"diagnosing {opened.name}", quiet=as_json) as ongoing:
        found = diagnose_port(opened, quick=quick, trials=trials, progress=ongoing.say)
    page = diagnosis_report(found)
    if out is not None:
        from portkit.port import write_atomically
        from portkit.report.html import page as html_page

        write_atomically(out, html_page(page.blocks, f"portkit: diagnosis of {found.name}"))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, default=str))
    else:
        show(page)
    raise typer.Exit(0 if found.ok else FAILED)


def rehearse(
    ranks: Annotated[int, typer.Argument(help="Tensor-parallel ranks: 1, 2, 4, 8, ...")] = 2,
    stages: Annotated[int, typer.Option(help="Pipeline stages, each with so many ranks.")] = 1,
    port: Annotated[str | None, typer.Option("--port", "-p", metavar="NAME|DIR")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the port on several ranks on this machine, and show what each holds and says."""
    from portkit.ports import find_port
    from portkit.report.live import Ongoing, show
    from portkit.steps.parallel.rehearse import rehearse as rehearse_port

    opened = find_port(port)
    with Ongoing(f"rehearsing {opened.name}", quiet=as_json) as ongoing:
        page = rehearse_port(opened, ranks, stages, progress=ongoing.say)
    if as_json:
        typer.echo(json.dumps({"ok": page.ok, "found": page.values}, indent=2, default=str))
    else:
        show(page)
    raise typer.Exit(0 if page.ok else FAILED)
