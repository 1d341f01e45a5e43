"""Adopt vLLM's own model classes and check them: what fails is a real deviation or a false alarm.

    python benchmarks/native_classes.py [--only ARCH[,ARCH]] [--results FILE.jsonl]
                                        [--write docs/native-classes.md]

Each in-scope architecture that vLLM has a class of its own for: its file is adopted as a port on
a tiny hardened random checkpoint, and all checks of steps forward, parallel and weights run on it.
Rows are kept in a file: a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from measure import machine

from portkit.adopt import adopt
from portkit.architectures import in_scope
from portkit.checks.runner import run_checks
from portkit.errors import PortkitError
from portkit.live.client import live_for

STEPS = ("forward", "parallel", "weights")
TIMEOUT = 240.0


@dataclass(frozen=True)
class NativeRow:
    """What the checks say about one class of vLLM."""

    architecture: str
    module: str
    passed: int
    failed: tuple[tuple[str, str, str], ...]
    """(check, what, where) of each that failed."""
    stopped: str
    """Why it could not be checked at all; "" if it was."""
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Check what is missing, print a line for each, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="architectures, comma separated")
    parser.add_argument("--results", type=Path, default=Path(".portkit/native.jsonl"))
    parser.add_argument("--write", type=Path, help="put the table into this file")
    args = parser.parse_args(argv)
    rows = _kept(args.results)
    wanted = args.only.split(",") if args.only else list(in_scope())
    for name in wanted:
        if name in rows and not args.only:
            continue
        support = live_for(None).run("native_support", architecture=name)
        if not support.ok or support.value["answer"] != "native":
            continue
        rows[name] = row = _measured(name, support.value["module"])
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")
        print(_line(row), flush=True)
    if args.write:
        args.write.write_text(_page(rows), encoding="utf-8")
    return 0


def _kept(path: Path) -> dict[str, NativeRow]:
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        value = json.loads(line)
        failed = tuple(tuple(f) for f in value["failed"])
        rows[value["architecture"]] = NativeRow(**{**value, "failed": failed})
    return rows


def _measured(name: str, module: str) -> NativeRow:
    started = time.monotonic()
    passed, failed, stopped = 0, [], ""
    with tempfile.TemporaryDirectory(prefix="portkit-native-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        made = live_for(None).run(
            "random_checkpoint",
            timeout=TIMEOUT,
            architecture=name,
            model_type=in_scope()[name],
            out=str(checkpoint),
        )
        try:
            if not made.ok:
                raise PortkitError(made.what, name, "")
            port = adopt(
                module, architecture=name, checkpoint=checkpoint, name="native", root=folder
            )
            with live_for(port):
                for step in STEPS:
                    for verdict in run_checks(port, step):
                        passed += verdict.status == "passed"
                        if verdict.status == "failed":
                            failed.append((verdict.check, verdict.what, verdict.where))
        except PortkitError as error:
            stopped = error.what
    seconds = round(time.monotonic() - started, 1)
    return NativeRow(name, module, passed, tuple(failed), stopped, seconds)


def _line(row: NativeRow) -> str:
    said = row.stopped or "; ".join(f"{check}: {what}" for check, what, _ in row.failed) or "silent"
    return f"{row.architecture} {row.passed} passed, {said} ({row.seconds:.0f} s)"


def _page(rows: dict[str, NativeRow]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine().versions)
    silent = [r for r in rows.values() if not r.failed and not r.stopped]
    lines = [
        "# vLLM's own classes, checked",
        "",
        "Each class of vLLM for an architecture in scope, adopted as it is on a tiny hardened "
        "random checkpoint in float32, under all checks of the steps forward, parallel and "
        "weights. A check that fails is a deviation from Transformers for *some* config or "
        "adapter, or a kernel that does not take so small a model: a hardened checkpoint sets "
        "what published ones leave at its default. "
        "`python benchmarks/native_classes.py --write docs/native-classes.md` makes this page.",
        "",
        f"{datetime.now(UTC).date().isoformat()}: {versions}. "
        f"{len(silent)} of {len(rows)} classes: no check fails.",
        "",
        "| architecture | passed | failed: what it says |",
        "|---|---|---|",
    ]
    for row in sorted(rows.values(), key=lambda r: r.architecture.lower()):
        said = [f"`{check}`: {what}" for check, what, _ in row.failed] or [row.stopped or "nothing"]
        text = "<br>".join(_short(t) for t in said).replace("|", "\\|")
        lines.append(f"| {row.architecture} | {row.passed} | {text} |")
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) < 220 else text[:217] + "…"


if __name__ == "__main__":
    sys.exit(main())
