"""Break a correct port, run its checks in the order of the steps, and score what they say."""

from __future__ import annotations

import ast
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bug_table import MODELING, Bug, Ported, changed_lines

from portkit.architectures import find_architecture
from portkit.autopilot import has_draft
from portkit.checks.runner import run_checks
from portkit.checks.verdict import Verdict
from portkit.create import new_port
from portkit.curriculum import steps
from portkit.draft.pipeline import apply_draft
from portkit.live.client import live_for
from portkit.models import find
from portkit.port import Port

ORDER = tuple(step.id for step in steps())
OFFERED = 3
"""So many causes count as offered: nobody tries the seventh."""
LINE = re.compile(r"(\w+\.py):(\d+)")


class BadPort(Exception):
    """A port that should be correct could not be made."""


class NotJudged(Exception):
    """A check failed before the port's code ran: no word about the bug, run it again."""


@dataclass(frozen=True)
class Outcome:
    """What portkit said about one bug, or about a port that has none."""

    id: str
    title: str
    caught: bool
    check: str = ""
    step: str = ""
    right_step: bool = False
    located: str = ""
    """"line", "module" or "" for neither."""
    explained: bool = False
    what: str = ""
    where: str = ""
    causes: tuple[str, ...] = ()
    seconds: float = 0.0
    others: tuple[str, ...] = ()
    """Checks that failed after the first one, if all were run."""
    today: str = ""
    """What people do today: "start" if vLLM's start-up shows it, "tokens" if 16 greedy tokens on a
    default-initialised checkpoint do, "nothing", or "-" where that does not apply."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """One correct port in a folder, broken and mended over and over."""

    def __init__(self, ported: Ported, root: Path) -> None:
        self.ported = ported
        self.sources: dict[str, str] = {}
        """The modeling file after each step's draft."""
        self.port = self._made(root)
        self.kept: dict[str, str] = {}

    def close(self) -> None:
        live_for(self.port).close()

    # ---- making the correct port -----------------------------------------------------------

    def _made(self, root: Path) -> Port:
        name, found = self.ported.name, find_architecture(self.ported.architecture)
        checkpoint = None
        if not find(found.name):
            checkpoint = self.checkpoint(root, hard=True)
        shutil.rmtree(root / name, ignore_errors=True)
        port = new_port(name, architecture=found.name, checkpoint=checkpoint, root=root)
        for step in ("copy", "forward", "parallel", "weights"):
            outcome = apply_draft(port, step)
            if outcome.status != "success":
                raise BadPort(f"{name}: the draft of {step} failed: {outcome.reason}")
            self.sources[step] = port.source
        return port

    def checkpoint(self, root: Path, *, hard: bool) -> Path:
        """Return a random checkpoint of the port's architecture, made once."""
        found = find_architecture(self.ported.architecture)
        folder = root / ".checkpoints" / f"{self.ported.name}-{'hard' if hard else 'default'}"
        if not (folder / "config.json").is_file():
            own = dict(self.ported.config)
            made = live_for(None).run(
                "random_checkpoint",
                architecture=found.name,
                model_type=found.model_type,
                out=str(folder),
                set=own,
                hard=hard,
            )
            if not made.ok:
                raise BadPort(f"{self.ported.name}: no checkpoint: {made.what}")
        return folder

    def plugin(self) -> None:
        """Bring the port as far as a plugin and a patch, once: the later steps judge those."""
        if "__init__" not in self.kept:
            for step in ("register", "out_of_tree"):
                if has_draft(step):
                    outcome = apply_draft(self.port, step)
                    if outcome.status == "failed":
                        raise BadPort(f"{self.ported.name}: {step}: {outcome.reason}")
            self.kept["__init__"] = self.port.init_file.read_text()

    # ---- one bug ----------------------------------------------------------------------------

    def path(self, bug: Bug) -> Path:
        return self.port.modeling if bug.file == MODELING else self.port.root / bug.file

    def run(self, bug: Bug, *, every: bool = False, begin: str = "") -> Outcome:
        """Break the port, run the checks until one fails (or `every` one), and mend it again.

        `begin`: the first step to run, instead of the first that could see the edit.
        """
        started = time.monotonic()
        if ORDER.index(bug.step) > ORDER.index("weights"):
            self.plugin()
        self.port.modeling.write_text(self.sources[bug.state])
        path = self.path(bug)
        before = path.read_text()
        after = bug.apply(before)
        try:
            path.write_text(after)
            if bug.file == MODELING and ORDER.index(bug.step) > ORDER.index("register"):
                # The patch is of the file as it is, or it alone would be what is found.
                apply_draft(self.port, "register")
            last = (
                bug.state if bug.state != "weights" else max(bug.step, "weights", key=ORDER.index)
            )
            wanted = ORDER[ORDER.index(begin or bug.first_step) : ORDER.index(last) + 1]
            failed = self._failures(wanted, every)
        finally:
            path.write_text(before)
        seconds = round(time.monotonic() - started, 1)
        if not failed:
            return Outcome(bug.id, bug.title, False, seconds=seconds)
        first = failed[0]
        return Outcome(
            bug.id,
            bug.title,
            True,
            first.check,
            first.step,
            first.step == bug.step,
            located(bug, first, before, after),
            explained(bug, first),
            first.what,
            first.where,
            first.causes[:OFFERED],
            seconds,
            tuple(v.check for v in failed[1:]),
        )

    def correct(self) -> Outcome:
        """Run every check on the port as it is: any that fails is a false alarm."""
        started = time.monotonic()
        self.port.modeling.write_text(self.sources["copy"])
        failed = self._failures(("copy",), True)
        self.port.modeling.write_text(self.sources["weights"])
        failed += self._failures(("forward", "parallel", "weights"), True)
        if any(b.step in ORDER[ORDER.index("register") :] for b in self.ported.bugs):
            self.plugin()
            failed += self._failures(("register", "out_of_tree", "prove"), True)
        seconds = round(time.monotonic() - started, 1)
        id, title = f"{self.ported.name}/correct", "the port as it is"
        if not failed:
            return Outcome(id, title, False, seconds=seconds)
        first, rest = failed[0], tuple(v.check for v in failed[1:])
        return Outcome(
            id, title, True, first.check, first.step, what=first.what, where=first.where,
            causes=first.causes[:OFFERED], seconds=seconds, others=rest,
        )  # fmt: skip

    def _failures(self, wanted: tuple[str, ...], every: bool) -> list[Verdict]:
        failed: list[Verdict] = []
        for step in wanted:
            for verdict in self._verdicts(step):
                if verdict.status == "failed" and not verdict.judged:
                    raise NotJudged(f"{verdict.check}: {verdict.what}")
                if verdict.status == "failed":
                    failed.append(verdict)
                    if not every:
                        return failed
        return failed

    def _verdicts(self, step: str) -> Iterator[Verdict]:
        for verdict in run_checks(self.port, step):
            # A missing report or a slow machine is no word about the bug.
            if verdict.check not in ("report", "speed"):
                yield verdict


# ---- scoring ------------------------------------------------------------------------------------


def explained(bug: Bug, verdict: Verdict) -> bool:
    """Whether the true cause is among the first that are offered; else what to do next counts."""
    offered = verdict.causes[:OFFERED] or (verdict.what, verdict.next)
    return any(re.search(bug.cause, text, re.I) for text in offered)


def located(bug: Bug, verdict: Verdict, before: str, after: str) -> str:
    """Return how near the place that is named comes: "line", "module" or ""."""
    if bug.file == MODELING:
        changed = changed_lines(before, after)
        named = {int(line) for file, line in LINE.findall(verdict.where) if "modeling" in file}
        if named and any(_statement(after, line) & changed for line in named):
            return "line"
        if named & changed:
            return "line"
        if any(_scope(after, line) & changed for line in named):
            return "module"
    elif Path(bug.file).name in verdict.where:
        return "line"
    return "module" if re.search(bug.module, verdict.where) else ""


def _statement(source: str, line: int) -> set[int]:
    """Return the lines of the innermost statement that holds a line; of a block, that line."""
    holding = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and _has(n, line)]
    inner = min(holding, key=lambda n: n.end_lineno - n.lineno, default=None)
    if inner is None or hasattr(inner, "body"):
        return {line}
    return set(range(inner.lineno, inner.end_lineno + 1))


def _scope(source: str, line: int) -> set[int]:
    """Return the lines of the class that holds a line; of the last class, only of the method.

    The last class is the whole model: to name it names nothing.
    """
    tree = ast.parse(source)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    holder = next((c for c in classes if _has(c, line)), None)
    if holder is not None and holder is classes[-1]:
        holder = next((m for m in holder.body if _has(m, line)), None)
    return set() if holder is None else set(range(holder.lineno, holder.end_lineno + 1))


def _has(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)
