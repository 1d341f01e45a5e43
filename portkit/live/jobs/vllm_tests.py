"""Run vLLM's own tests for one architecture, in a tree that the port's patch was applied to.

args: tree (the unpacked source), select (pytest's -k), environment (extra variables).
value: outcomes {test id: "passed" | "failed" | "skipped"}, messages {failed test id: text}, tail.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portkit.errors import PortkitError
from portkit.live.job import JobRequest
from portkit.live.subprocesses import last_error, user_environment


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Run tests/models/test_registry.py of the tree and return each test's outcome."""
    tree = Path(request.args["tree"])
    report = tree / "portkit-registry-tests.xml"
    report.unlink(missing_ok=True)
    say("vLLM's own tests/models/test_registry.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:nbmake",
            "tests/models/test_registry.py",
            "-k",
            request.args["select"],
            f"--junit-xml={report}",
        ],
        cwd=tree,
        env=user_environment(request.args["environment"]),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout)
    if not report.exists():
        raise PortkitError(
            f"vLLM's tests did not run (exit {done.returncode}): {last_error(done.stdout)}",
            "tests/models/test_registry.py",
            "The whole output is in the job's log, under .portkit/logs.",
        )
    outcomes, messages = {}, {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        name = case.get("name", "?")
        outcomes[name] = (
            "failed"
            if problem is not None
            else "skipped"
            if case.find("skipped") is not None
            else "passed"
        )
        if problem is not None:
            messages[name] = (problem.get("message") or last_error(problem.text or ""))[:400]
    return {
        "outcomes": outcomes,
        "messages": messages,
        "tail": done.stdout[-3000:],
    }
