"""Measure portkit's budgets and print one Markdown table.

    python benchmarks/budgets.py [--only NAME] [--repeats 5] [--full] [--json] [--write README.md]

Run it on a machine that does nothing else: the load at the start is in the table's caption. Exits
with 1 if a budget is broken or could not be measured. `--full` adds what takes minutes. `--write`
puts the table between `<!-- budgets -->` and `<!-- /budgets -->` of a file.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import books
import live
import quick
from measure import Failed, Machine, Row, Say, machine, number, span

BENCHMARKS: dict[str, Callable[[int, Say], list[Row]]] = {
    "import": quick.import_portkit,
    "findings": quick.findings_after_edit,
    "headers": quick.headers_of_a_terabyte,
    **{step: functools.partial(live.verdicts_after_edit, step) for step in live.MAIN},
    "rehearsal": live.rehearsal_on_two_ranks,
    "memory": live.memory,
    "notebooks": books.all_notebooks,
}
ONLY_FULL = ("notebooks",)
ONCE = {"memory": 2, "notebooks": 1}
"""The most repeats of what takes long and varies little."""
MARKERS = re.compile(r"(<!-- budgets -->\n).*?(<!-- /budgets -->)", re.S)
HEAD = ("what", "budget", "measured (median)", "min-max, runs", "verdict", "how")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        action="append",
        choices=BENCHMARKS,
        default=[],
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)}; may be given several times",
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--full", action="store_true", help=f"with {', '.join(ONLY_FULL)}: minutes")
    parser.add_argument("--json", action="store_true", help="print values instead of a table")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into a file")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.write and not MARKERS.search(args.write.read_text(encoding="utf-8")):
        parser.error(f"{args.write} has no <!-- budgets --> and <!-- /budgets -->")

    here = machine()
    names = args.only or [n for n in BENCHMARKS if args.full or n not in ONLY_FULL]
    rows = [row for name in names for row in _measured(name, args.repeats)]
    if args.json:
        values = {"machine": asdict(here), "rows": [row.to_dict() for row in rows]}
        print(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        print(table(here, rows))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        put = table(here, rows)
        args.write.write_text(MARKERS.sub(lambda m: m[1] + put + "\n" + m[2], text), "utf-8")
    return int(any(row.verdict.startswith("✗") for row in rows))


def table(here: Machine, rows: list[Row]) -> str:
    """Return caption and table as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in here.versions)
    noisy = " (**busy with other work: times are too long**)" if here.noisy else ""
    caption = (
        f"Measured on {here.date}: {here.device}, {here.cores} cores, {here.memory_gib:.0f} GiB; "
        f"load average at the start {here.load:.1f}{noisy}; {versions}. "
        "`python benchmarks/budgets.py --full` measures again."
    )
    lines = [" | ".join(HEAD), " | ".join("---" for _ in HEAD)]
    for row in rows:
        measured = f"{number(statistics.median(row.values))} {row.unit}" if row.values else "-"
        spread = f"{span(row.values)}, {len(row.values)}" if row.values else "-"
        budget = f"< {row.budget:g} {row.unit}" if row.budget is not None else ""
        cells = (row.what, budget, measured, spread, row.verdict, row.note)
        lines.append(" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells))
    return "\n".join([caption, "", *(f"| {line} |" for line in lines)])


def _measured(name: str, repeats: int) -> list[Row]:
    """Run one benchmark; what stops it becomes a row that says so."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.1f} s] {name}: {text}", file=sys.stderr, flush=True)

    try:
        return BENCHMARKS[name](min(repeats, ONCE.get(name, repeats)), say)
    except Failed as error:
        return [Row(name, "s", (), problem=str(error))]


if __name__ == "__main__":
    sys.exit(main())
