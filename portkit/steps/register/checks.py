"""Checks of step `register`: the patch, on the real source of vLLM 0.32.0."""

from __future__ import annotations

from pathlib import Path

from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.errors import PortkitError
from portkit.port import Port
from portkit.steps.register import rows, tree
from portkit.steps.register.draft import (
    HEADING,
    REGISTRY,
    SECTION,
    SUPPORTED,
    TEST_REGISTRY,
    in_tree_source,
    model_module,
    model_path,
    patch_path,
)


def patched_tree(port: Port) -> Path:
    """Unpack vLLM's source, apply the port's patch, and return the tree.

    Raises PortkitError if there is no patch or it does not apply.
    """
    patch = port.root / patch_path(port)
    if not patch.exists():
        raise PortkitError(
            "There is no patch yet.",
            patch_path(port),
            f"portkit draft register --port {port.root} writes it.",
        )
    target = port.state_dir / "vllm-tree"
    tree.unpack(target)
    done = tree.git_apply(target, patch, "--verbose")
    if done.returncode:
        problem = [line for line in done.stderr.splitlines() if line.startswith("error")]
        raise PortkitError(
            f"git apply refuses the patch: {(problem or [done.stderr])[0].removeprefix('error: ')}",
            patch_path(port),
            "Draft the step again: the patch is made for vLLM 0.32.0's files.",
        )
    tree.borrow_build(target, (model_path(port), REGISTRY))
    return target


def tree_environment(target: Path) -> dict[str, str]:
    """Variables under which Python runs that tree instead of the installed vLLM."""
    return {"PYTHONPATH": str(target)}


class PatchApplies(Check):
    """The patch applies cleanly to vLLM's source, carries the port as it is now, and keeps order.

    A reviewer's first look: `git apply` without a complaint, the four files that vLLM's guide
    asks for, rows in alphabetical order.
    """

    id = "patch_applies"
    step = "register"
    title = "The patch applies to vLLM 0.32.0"

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        try:
            target = patched_tree(port)
        except PortkitError as error:
            return self.failed(error.what, where=error.where, next=error.next)
        lists = (REGISTRY, TEST_REGISTRY, SUPPORTED)
        patch = (port.root / patch_path(port)).read_text()
        touched = [n for n in (model_path(port), *lists) if f"+++ b/{n}" in patch]
        missing = [name for name in (model_path(port), REGISTRY) if name not in touched]
        if missing:
            return self.failed(
                f"The patch does not touch {', '.join(missing)}.",
                where=patch_path(port),
                next="vLLM's guide asks for all four: model, registry row, test row, docs row.",
            )
        if (target / model_path(port)).read_text() != in_tree_source(port):
            return self.failed(
                "The model in the patch is not the port's model any more.",
                where=patch_path(port),
                next="You edited the port after drafting the patch: portkit draft register",
            )
        places = [(name, row_place(target, name, port.architecture)) for name in lists]
        lost = [name for name, place in places if place is None]
        if lost:
            return self.failed(
                f"There is no row of {port.architecture} in {lost[0]} after applying the patch.",
                where=patch_path(port),
                next="portkit draft register writes it again.",
            )
        table = Table(
            "The row and its neighbours",
            ("file", "before", "row", "after"),
            tuple((name, *place[:3]) for name, place in places),
        )
        misplaced = [name for name, place in places if name in touched and not place[3]]
        if misplaced:
            return self.failed(
                f"The row is not in alphabetical order in {misplaced[0]}.",
                table,
                where=misplaced[0],
                next="portkit draft register puts it in its place.",
            )
        return self.passed(f"git apply is clean; {len(touched)} files change.", table)


class Resolves(Check):
    """vLLM, run from the patched tree in a fresh process, knows the architecture and generates.

    The class must come from the tree's own models/ folder (an unknown or misspelt architecture is
    served silently by the Transformers backend), and its greedy tokens must be Transformers'.
    """

    id = "resolves"
    step = "register"
    title = "The patched vLLM serves the architecture"
    requires = ("patch_applies",)
    timeout = 420.0

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        target = patched_tree(port)
        job = self.job(
            context,
            "fresh_engine",
            environment=tree_environment(target),
            python="",
            cwd=str(target),
        )
        if not job.ok:
            return self.failed_job(job)
        answer = job.value
        expected = f"vllm.model_executor.models.{model_module(port)}"
        served, file = answer["model_class"][0], Path(answer["model_file"])
        if served != expected or not file.is_relative_to(target):
            return self.failed(
                f"vLLM served {served} of {file}, not {expected} of the patched tree.",
                job=job,
                where=REGISTRY,
                next="The registry row must name config.json's architecture and the new module.",
            )
        if answer["tokens"] != answer["expected"]:
            return self.failed(
                "The patched vLLM generates other tokens than Transformers.",
                job=job,
                where=model_path(port),
                next="Pass step 4 (weights) first: the patch carries the port as it is.",
            )
        return self.passed(
            f"{port.architecture} resolves to {expected} and its greedy tokens equal Transformers' "
            f"on {len(answer['tokens'])} prompts.",
            job=job,
        )


class RegistryTests(Check):
    """vLLM's own tests/models/test_registry.py passes for the architecture in the patched tree.

    Its `test_registry_imports` also converts the class to a pooling model, and
    `test_hf_registry_coverage` wants the row in tests/models/registry.py.
    """

    id = "registry_tests"
    step = "register"
    title = "vLLM's own registry tests"
    requires = ("patch_applies",)
    timeout = 420.0

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        target = patched_tree(port)
        job = self.job(
            context,
            "vllm_tests",
            tree=str(target),
            select=f"{port.architecture} or coverage or lazy_modelinfo",
            environment=tree_environment(target),
        )
        if not job.ok:
            return self.failed_job(job)
        outcomes = job.value["outcomes"]
        table = Table(
            "tests/models/test_registry.py", ("test", "outcome"), tuple(sorted(outcomes.items()))
        )
        bad = [name for name, outcome in outcomes.items() if outcome == "failed"]
        if bad:
            return self.failed(
                f"{bad[0]} fails: {job.value['messages'][bad[0]]}",
                table,
                job=job,
                where="tests/models/test_registry.py",
                next="Its text says what the tree lacks.",
                log=job.value["tail"],
            )
        wanted = (f"test_registry_imports[{port.architecture}]", "test_hf_registry_coverage")
        absent = [name for name in wanted if outcomes.get(name) != "passed"]
        if absent:
            return self.failed(
                f"{absent[0]} did not run ({outcomes.get(absent[0], 'not collected')}).",
                table,
                job=job,
                where=REGISTRY,
                next="The registry row is missing: portkit draft register",
            )
        return self.passed(
            f"{len(outcomes)} of vLLM's own tests ran and none failed.", table, job=job
        )


CHECKS = (PatchApplies, Resolves, RegistryTests)


def row_place(target: Path, name: str, architecture: str) -> tuple[str, str, str, bool] | None:
    """Return the architecture's row with its neighbours in a file of the patched tree."""
    text = (target / name).read_text()
    keys = {
        REGISTRY: lambda: rows.dict_keys(text, "_TEXT_GENERATION_MODELS", SECTION),
        TEST_REGISTRY: lambda: rows.dict_keys(text, "_TEXT_GENERATION_EXAMPLE_MODELS", SECTION),
        SUPPORTED: lambda: rows.table_keys(text, HEADING),
    }[name]()
    return rows.neighbours(keys, architecture)
