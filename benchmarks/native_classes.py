"""Adopt vLLM's own model classes and check them: what fails is a real deviation or a false alarm.

    python benchmarks/native_classes.py [--only ARCH[,ARCH]] [--results FILE.jsonl] [--again]
                                        [--write docs/native-classes.md]

Each in-scope architecture that vLLM has a class of its own for: its file is adopted as a port on
a tiny random checkpoint, and `portkit diagnose` runs all checks that apply. First on a hardened
checkpoint, which sets switches, caps and factors that a class may never have supported; if a check
fails there, once more with those options at the config class's defaults. native_findings.toml
says, for each class that fails, what a person found when looking into it, and gives fields to set:
`published` those that published checkpoints carry and this Transformers' config class lost, `usual`
values of the second checkpoint. Rows are kept in a file:
a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from native_table import HARD, USUAL, NativeRow, Trial, document, explanations, keep, kept, one_line

from portkit.adopt import adopt
from portkit.architectures import in_scope
from portkit.diagnosis.run import diagnose
from portkit.errors import PortkitError
from portkit.live.client import live_for

TIMEOUT = 240.0


def main(argv: list[str] | None = None) -> int:
    """Check what is missing, print a line for each, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="architectures, comma separated")
    parser.add_argument("--results", type=Path, default=Path(".portkit/native.jsonl"))
    parser.add_argument("--again", action="store_true", help="measure the ones in --only anew")
    parser.add_argument("--write", type=Path, help="measure nothing, put the table into this file")
    args = parser.parse_args(argv)
    rows = kept(args.results)
    if args.write:
        args.write.write_text(document(rows), encoding="utf-8")
        return 0
    scope = in_scope()
    for name in args.only.split(",") if args.only else scope:
        if name in rows and not args.again:
            continue
        support = live_for(None).run("native_support", architecture=name, locate=True)
        if not support.ok or support.value["answer"] != "native":
            continue
        row = _measured(name, scope[name], support.value)
        keep(row, args.results)
        print(one_line(row), flush=True)
    return 0


def _measured(name: str, model_type: str, support: dict[str, Any]) -> NativeRow:
    started = time.monotonic()
    module = support["defined_in"] or support["module"]
    said = explanations().get(name, {})
    usual = said.get("usual", {})
    trials: list[Trial] = []
    for options in (HARD, USUAL) if support["defined_in"] else ():
        own = said.get("published", {}) | (usual if options == USUAL else {})
        trial = _tried(name, model_type, module, support["class"], options, own)
        if not trials or usual or trial.set != trials[0].set:
            trials.append(trial)
        if trial.silent:
            break
    seconds = round(time.monotonic() - started, 1)
    return NativeRow(name, module, support.get("why", ""), tuple(trials), seconds)


def _tried(
    name: str, model_type: str, module: str, cls: str, options: str, own: dict[str, Any]
) -> Trial:
    """Make the checkpoint, adopt, diagnose."""
    with tempfile.TemporaryDirectory(prefix="portkit-native-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        made = live_for(None).run(
            "random_checkpoint",
            timeout=TIMEOUT,
            architecture=name,
            model_type=model_type,
            out=str(checkpoint),
            options=options,
            set=own,
        )
        if not made.ok:
            return Trial(options, (), 0, (), f"no checkpoint: {made.what}")
        fields = tuple(made.value["set"])
        try:
            port = adopt(
                module,
                architecture=name,
                checkpoint=checkpoint,
                name="native",
                cls=cls,
                root=folder,
            )
            with live_for(port):
                verdicts = diagnose(port, trials=False).verdicts
        except PortkitError as error:
            return Trial(options, fields, 0, (), error.what)
    passed = sum(v.status == "passed" for v in verdicts)
    failed = tuple((v.check, v.what, v.where) for v in verdicts if v.status == "failed")
    return Trial(options, fields, passed, failed)


if __name__ == "__main__":
    sys.exit(main())
