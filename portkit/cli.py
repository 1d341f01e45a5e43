"""The command line: what the notebooks do, one verb each. Thin; prints and sets exit codes.

Exit codes: 0 fine; 1 a check failed, tasks are left, or a draft failed; 2 wrong usage or a problem
that the message tells how to mend; 130 interrupted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from portkit import cli_diagnose
from portkit.edge import FAILED, Edge

app = typer.Typer(
    cls=Edge,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Port a Transformers model to vLLM, every step validated in the real vLLM.",
)

PortOption = Annotated[
    str | None,
    typer.Option(
        "--port",
        "-p",
        metavar="NAME|DIR",
        help="The port; else $PORTKIT_PORT, this folder, or the only one.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
StepArgument = Annotated[
    str, typer.Argument(metavar="STEP", help="Id or number of a step, e.g. forward or 2.")
]


def main() -> None:
    """Run the command line; the entry point of the `portkit` script."""
    app(prog_name="portkit")


def _find(port: str | None):
    from portkit.ports import find_port

    return find_port(port)


def _print(report: Any) -> None:
    from portkit.report.live import show

    show(report)


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _rows(values: Iterable[Any]) -> list[dict[str, Any]]:
    return [v.to_dict() if hasattr(v, "to_dict") else asdict(v) for v in values]


# ---- making and looking -------------------------------------------------------------------------


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the port, e.g. helium.")],
    model: Annotated[
        str | None, typer.Option(help="Architecture in Transformers, or a bundled model.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder with config.json and safetensors.")
    ] = None,
    source: Annotated[Path | None, typer.Option(help="Your own modeling file.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder to make it in.")] = None,
    accept_unlicensed: Annotated[
        bool, typer.Option("--accept-unlicensed", help="You may copy this code without a licence.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Load pickled weights, which can run code.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a port: a folder that is a git repository and a vLLM plugin."""
    from portkit.create import new_port
    from portkit.report.live import Ongoing

    with Ongoing(f"new port {name}", quiet=as_json) as ongoing:
        made = new_port(
            name,
            architecture=model,
            checkpoint=checkpoint,
            source=source,
            root=root,
            accept_unlicensed=accept_unlicensed,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            progress=ongoing.say,
        )
    if as_json:
        return _json({"name": made.name, "root": str(made.root), "architecture": made.architecture})
    typer.echo(f"✓ made the port {made.name} of {made.architecture}: {made.root}")
    typer.echo("next:  open notebooks/00_choose.ipynb, or run `portkit check choose`")


@app.command()
def decide(
    destination: Annotated[str, typer.Argument(help="out_of_tree or in_tree.")],
    reason: Annotated[str, typer.Argument(help="Why, in a sentence.")],
    port: PortOption = None,
) -> None:
    """Write down where the port will live, and why, in port.toml."""
    from portkit.create import decide as write_decision

    write_decision(_find(port), destination, reason)  # type: ignore[arg-type]
    typer.echo(f"✓ decided: {destination}")


@app.command()
def status(port: PortOption = None, as_json: JsonOption = False) -> None:
    """Show how far the port is: steps passed, tasks left, last verdicts."""
    from portkit.report.overview import status_report
    from portkit.status import status_of

    found = status_of(_find(port))
    _json(found.to_dict()) if as_json else _print(status_report(found))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Look at the machine: Python, torch, vLLM, Transformers, GPU, git; with remedies."""
    from portkit.report.overview import doctor_report
    from portkit.steps.choose.doctor import examine

    found = doctor_report(examine())
    _json(_rows(found.values)) if as_json else _print(found)
    raise typer.Exit(0 if found.ok else FAILED)


@app.command()
def show(
    symbol: Annotated[str, typer.Argument(help="Class or function, or the end of its name.")] = "",
    step: Annotated[
        str | None, typer.Option(help="Whose tasks to point at; else the next step.")
    ] = None,
    port: PortOption = None,
) -> None:
    """Show the port's own code with the lines that the step's tasks are about."""
    from portkit.curriculum import step as step_of
    from portkit.look import code_of
    from portkit.status import next_step

    opened = _find(port)
    _print(code_of(opened, step_of(step) if step else next_step(opened), symbol))


app.command()(cli_diagnose.adopt)
app.command()(cli_diagnose.diagnose)
app.command()(cli_diagnose.rehearse)


# ---- working ------------------------------------------------------------------------------------


@app.command()
def tasks(
    step: Annotated[
        str | None, typer.Argument(metavar="[STEP]", help="Only this step; else all that are due.")
    ] = None,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what the rules find in the port; exit 1 if anything is left."""
    from portkit.curriculum import step as step_of
    from portkit.look import tasks_of

    report = tasks_of(_find(port), step_of(step) if step else None)
    _json(_rows(report.values)) if as_json else _print(report)
    raise typer.Exit(0 if report.ok else FAILED)


@app.command()
def fix(
    rule: Annotated[
        str | None, typer.Argument(metavar="[RULE]", help="Only this rule; else all safe fixes.")
    ] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Also the fixes that a person should read.")
    ] = False,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Apply the rules' fixes, after committing what is there; `portkit undo` takes them back."""
    from portkit.lint.engine import findings
    from portkit.lint.engine import fix as fix_port
    from portkit.look import no_code
    from portkit.report.overview import fixed_report

    opened = _find(port)
    if not opened.source:
        raise no_code(opened)
    fixed = fix_port(opened, rule, unsafe=unsafe)
    _json(_rows(fixed)) if as_json else _print(fixed_report(fixed, len(findings(opened))))


@app.command()
def check(
    step: Annotated[
        str, typer.Argument(metavar="STEP|all", help="Id or number of a step, or all.")
    ],
    only: Annotated[
        list[str] | None, typer.Option(help="Only this check (may be given again).")
    ] = None,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a step's checks in the real vLLM; passing all of them commits the step."""
    from portkit.curriculum import step as step_of
    from portkit.curriculum import steps

    opened = _find(port)
    wanted = list(steps()) if step == "all" else [step_of(step)]
    verdicts = [v for s in wanted for v in _check_step(opened, s, only, as_json)]
    if as_json:
        _json([v.to_dict() for v in verdicts])
    raise typer.Exit(0 if verdicts and all(v.ok for v in verdicts) else FAILED)


def _check_step(port: Any, step: Any, only: list[str] | None, quiet: bool) -> list[Any]:
    from portkit import hints
    from portkit.checks.runner import pass_if_complete, run_checks
    from portkit.report import overview, render
    from portkit.report.blocks import Report
    from portkit.report.live import Ongoing

    verdicts = []
    with Ongoing(f"{step.number} {step.id}", quiet=quiet) as ongoing:
        for verdict in run_checks(port, step, only=only or None, progress=ongoing.say):
            verdicts.append(verdict)
            ongoing.add(Report(render.verdict_blocks(verdict)))
    passed = pass_if_complete(port, step, verdicts)
    if not quiet:
        helpful = [h for v in verdicts if not v.ok and (h := hints.for_failure(v))]
        foot = overview.after_checks(step, verdicts, passed, helpful)
        _print(Report((render.summary_line(verdicts, ongoing.seconds), *foot)))
    return verdicts


@app.command()
def hint(
    about: Annotated[str, typer.Argument(help="A check id, a rule id, or what you see.")],
    level: Annotated[str, typer.Option(help="nudge, pointer or answer.")] = "nudge",
    step: Annotated[str | None, typer.Option(help="Only hints of this step.")] = None,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Help in three levels; the answer is the draft's diff for this port."""
    from portkit import hints
    from portkit.report.overview import hints_report

    if level not in hints.LEVELS:
        raise typer.BadParameter(f"choose of {', '.join(hints.LEVELS)}", param_hint="--level")
    found = hints.find(about, step)
    diffs = {h.key: hints.answer(_find(port), h) for h in found[:1]} if level == "answer" else {}
    if as_json:
        return _json({"hints": _rows(found), "answer": diffs})
    _print(hints_report(found, level, diffs))


@app.command()
def draft(
    step: StepArgument,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write it, after committing what is there.")
    ] = False,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the automatic port of a step as a diff, or apply it."""
    from portkit.curriculum import step as step_of
    from portkit.draft.pipeline import apply_draft, draft_step
    from portkit.report.render import outcome_report

    opened = _find(port)
    chosen = step_of(step).id
    outcome = apply_draft(opened, chosen) if apply else draft_step(opened, chosen)
    _json(asdict(outcome)) if as_json else _print(
        outcome_report(outcome, opened.root, applied=apply)
    )
    raise typer.Exit(FAILED if outcome.status == "failed" else 0)


@app.command()
def undo(port: PortOption = None, as_json: JsonOption = False) -> None:
    """Take back the last fix, draft or apply; edits made since are committed first."""
    message = _find(port).undo()
    _json({"undone": message}) if as_json else typer.echo(f"✓ taken back: {message}")


@app.command()
def report(
    port: PortOption = None,
    out: Annotated[Path | None, typer.Option(help="Write HTML here, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the last verdicts of every step, and where the report of step 7 lies."""
    from portkit.report.overview import whole_report
    from portkit.status import status_of

    found = status_of(_find(port))
    page = whole_report(found)
    if out is not None:
        from portkit.port import write_atomically
        from portkit.report.html import page as html_page

        write_atomically(out, html_page(page.blocks, f"portkit: {found.name}"))
    _json(found.to_dict()) if as_json else _print(page)


@app.command()
def autopilot(
    model: Annotated[str, typer.Option(help="A bundled model or an architecture.")] = "helium",
    steps: Annotated[str | None, typer.Option(help="Comma-separated ids; else all.")] = None,
    port_dir: Annotated[
        Path | None, typer.Option(help="Folder to make the port in, or where it is; else ports.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="A new port in a temporary folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Walk a model through every step by the drafts; stop at the first that fails."""
    from portkit.autopilot import port_for_model
    from portkit.curriculum import step as step_of

    if fresh and port_dir:
        raise typer.BadParameter("--fresh makes its own folder; leave out --port-dir")
    wanted = [step_of(s.strip()).id for s in steps.split(",")] if steps else None
    root = Path(tempfile.mkdtemp(prefix="portkit-")) if fresh else port_dir
    opened = port_for_model(model, root)
    events = _walk(opened, wanted, as_json)
    ended = events[-1] if events else None
    if as_json:
        _json({"port": str(opened.root), "events": [_event(e) for e in events]})
    raise typer.Exit(0 if ended is not None and ended.passed else FAILED)


def _event(event: Any) -> dict[str, Any]:
    data = asdict(event)
    return {"event": type(event).__name__.lower(), **data, "step": event.step.id}


def _walk(port: Any, wanted: list[str] | None, quiet: bool) -> list[Any]:
    from portkit.autopilot import walk
    from portkit.report.live import Ongoing
    from portkit.report.overview import event_report

    if not quiet:
        typer.echo(f"port: {port.root}")
    events = []
    with Ongoing("autopilot", quiet=quiet) as ongoing:
        for event in walk(port, wanted, progress=ongoing.say):
            events.append(event)
            ongoing.add(event_report(event, port.root))
    return events


if __name__ == "__main__":
    main()
