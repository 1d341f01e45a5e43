"""Seed bugs into correct ports and see which checks find them, where, and with what explanation.

    python benchmarks/seeded_bugs.py [--only REGEX] [--ports NAME,NAME] [--steps ID,ID]
        [--every] [--no-today] [--again] [--results FILE] [--write docs/seeded-bugs.md]

Correct ports are portkit's drafts on small checkpoints; the bugs are in `benchmarks/bugs/`. Results
are added to a JSON-lines file, one line per bug, and what stands there is not run again (`--again`
runs it). Exits with 1 if the bar is not met. An hour or so on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bug_report import bar, page
from bug_runs import BadPort, Bench, NotJudged, Outcome
from bug_table import MODELING, Bug, DoesNotApply, Ported, table

from portkit.live.client import live_for

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for and not known yet; print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="ids, e.g. gemma2/B09")
    parser.add_argument("--ports", default="", metavar="NAMES", help="with commas between")
    parser.add_argument("--steps", default="", metavar="IDS", help="bugs of these steps only")
    parser.add_argument("--every", action="store_true", help="run all checks, not to the first red")
    parser.add_argument("--no-today", action="store_true", help="leave out what people do today")
    parser.add_argument("--again", action="store_true", help="run again what is known")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is known")
    parser.add_argument("--results", type=Path, default=HERE / ".seeded-bugs.jsonl")
    parser.add_argument("--root", type=Path, default=HERE / ".seeded-ports", help="ports go there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page")
    parser.add_argument("--note", default="", help="what the page says of its rows' dates")
    args = parser.parse_args(argv)

    chosen = [p for p in table() if not args.ports or p.name in args.ports.split(",")]
    known = {} if args.again else read(args.results)
    steps = args.steps.split(",") if args.steps else []
    for ported in [] if args.report else chosen:
        wanted = [b for b in ported.bugs if re.search(args.only, b.id) and b.id not in known]
        wanted = [b for b in wanted if not steps or b.step in steps]
        correct = f"{ported.name}/correct"
        check_it = not steps and re.search(args.only, correct) and correct not in known
        if wanted or check_it:
            run(ported, wanted, bool(check_it), args)
    found = read(args.results)
    text = page(table(), found, args.note)
    print(text)
    if args.write:
        args.write.write_text(text + "\n", encoding="utf-8")
    return int(any(not met for _, _, met in bar(table(), found)))


def read(path: Path) -> dict[str, Outcome]:
    """Return what is known, by id; the last word counts."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        line["id"]: Outcome(**{k: tuple(v) if isinstance(v, list) else v for k, v in line.items()})
        for line in lines
    }


def run(ported: Ported, bugs: list[Bug], check_it: bool, args: argparse.Namespace) -> None:
    """Run one port's bugs, saving each outcome as it comes."""
    say(f"{ported.name}: making the correct port")
    try:
        bench = Bench(ported, args.root)
    except BadPort as error:
        say(str(error))
        return
    try:
        if check_it:
            with reported(f"{ported.name}/correct"):
                save(args.results, bench.correct())
        for bug in bugs:
            with reported(bug.id):
                outcome = bench.run(bug, every=args.every)
                if not args.no_today:
                    outcome = with_today(bench, bug, outcome, args.root)
                save(args.results, outcome)
    finally:
        bench.close()


@contextmanager
def reported(id: str) -> Iterator[None]:
    """Say what kept a bug from being judged; it stays unknown, for the next run."""
    try:
        yield
    except (DoesNotApply, BadPort, NotJudged) as error:
        say(f"{id}: NOT RUN: {error}")


def with_today(bench: Bench, bug: Bug, outcome: Outcome, root: Path) -> Outcome:
    """Return the outcome with what starting vLLM and 16 greedy tokens would have shown."""
    if bug.file != MODELING or bug.state != "weights":
        return replace(outcome, today="-")
    checkpoint = bench.checkpoint(root, hard=False)
    shutil.copyfile(HERE / "today.py", bench.port.root / "portkit_today.py")
    before = bench.sources["weights"]
    bench.port.modeling.write_text(bug.apply(before))
    try:
        job = live_for(bench.port).run(
            "call",
            module="portkit_today",
            function="greedy",
            kwargs={"root": str(bench.port.root), "checkpoint": str(checkpoint)},
        )
    finally:
        bench.port.modeling.write_text(before)
    found = job.value["returned"] if job.ok else {"error": job.what}
    if found["error"]:
        return replace(outcome, today="start")
    return replace(outcome, today="nothing" if found["same"] else "tokens")


def save(path: Path, outcome: Outcome) -> None:
    """Add one line, and say it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(outcome.to_dict(), ensure_ascii=False) + "\n")
    correct = outcome.id.endswith("/correct")
    word = "found by" if outcome.caught else "silent" if correct else "NOT FOUND"
    marks = "" if correct or not outcome.caught else (
        f" step {'ok' if outcome.right_step else 'WRONG'}, place {outcome.located or 'WRONG'}, "
        f"cause {'ok' if outcome.explained else 'WRONG'}, today {outcome.today or '?'}"
    )  # fmt: skip
    say(f"{outcome.id}: {word} {outcome.step} {outcome.check}{marks} ({outcome.seconds:.0f} s)")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
