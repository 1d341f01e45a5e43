"""The runner, through its public entry points, on toy checks and a real port folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from portkit.checks import results, runner
from portkit.checks.base import Check
from portkit.checks.verdict import Table
from portkit.create import new_port
from portkit.curriculum import steps
from portkit.errors import PortkitError


@pytest.fixture
def port(tmp_path):
    port = new_port("helium", architecture="helium", root=tmp_path)
    port.modeling.write_text("# the model\n")
    return port


def check(id, status="passed", requires=(), calls=None, error=None):
    """Return a check that answers so, or raises `error`, and notes that it ran."""

    def run(self, context):
        if calls is not None:
            calls.append(id)
        context.progress(f"in {id}")
        if error:
            raise error
        table = Table("numbers", ("a", "b"), ((1, 0.5),))
        return getattr(self, status)(f"{id} {status}", table)

    body = {"__doc__": "Proves nothing.", "id": id, "step": "forward", "title": id, "run": run}
    return type(id, (Check,), {**body, "requires": requires})


def ran(port, *checks, **options):
    return {v.check: v for v in runner.run_checks(port, "forward", checks=checks, **options)}


def test_order_follows_requires_and_otherwise_the_module(port):
    calls = []
    toys = [
        check("c", requires=("b",), calls=calls),
        check("a", calls=calls),
        check("b", requires=("d",), calls=calls),
        check("d", calls=calls),
    ]
    verdicts = list(runner.run_checks(port, "forward", checks=toys))
    assert calls == [v.check for v in verdicts] == ["a", "d", "b", "c"]


def test_what_needs_a_failed_check_is_skipped_and_says_so(port):
    calls = []
    found = ran(
        port,
        check("starts", "failed", calls=calls),
        check("parity", requires=("starts",), calls=calls),
        check("decode", requires=("parity",), calls=calls),
        check("free", calls=calls),
    )
    assert calls == ["starts", "free"]
    assert found["parity"].status == found["decode"].status == "skipped"
    assert "`starts`" in found["parity"].what
    assert "`parity`" in found["decode"].what


def test_a_skipped_prerequisite_skips_too(port):
    found = ran(port, check("gpu", "skipped"), check("speed", requires=("gpu",)))
    assert found["speed"].status == "skipped"


def test_without_code_a_check_fails_at_once_and_says_how_to_get_some(port):
    calls = []
    port.modeling.unlink()
    verdict = ran(port, check("one", calls=calls))["one"]
    assert (verdict.status, calls) == ("failed", [])
    assert "no code in the port yet" in verdict.what and "01_copy" in verdict.next


def test_verdicts_come_one_by_one(port):
    calls = []
    verdicts = runner.run_checks(
        port, "forward", checks=[check("one", calls=calls), check("two", calls=calls)]
    )
    assert next(verdicts).check == "one"
    assert calls == ["one"]


def test_progress_says_what_runs(port):
    said = []
    ran(port, check("one"), progress=said.append)
    assert said == ["one", "in one"]


def test_a_portkit_error_in_a_check_is_a_failed_verdict_with_its_words(port):
    error = PortkitError("no shard 2", "model-00002.safetensors", "copy it again")
    verdict = ran(port, check("load", error=error))["load"]
    assert (verdict.status, verdict.what) == ("failed", "no shard 2")
    assert (verdict.where, verdict.next) == ("model-00002.safetensors", "copy it again")


def test_a_check_that_breaks_is_a_readable_failure_with_its_traceback_in_a_log(port):
    verdict = ran(port, check("broken", error=ZeroDivisionError("division by zero")))["broken"]
    assert verdict.status == "failed"
    assert "ZeroDivisionError: division by zero" in verdict.what
    assert "Traceback" not in verdict.what + verdict.next
    log = next((port.state_dir / "logs").glob("broken-*.log"))
    assert str(log) == verdict.where
    assert "Traceback (most recent call last)" in log.read_text()


def test_interrupting_passes_through(port):
    with pytest.raises(KeyboardInterrupt):
        ran(port, check("slow", error=KeyboardInterrupt()))


def test_a_check_that_returns_no_verdict_fails(port):
    toy = check("odd")
    toy.run = lambda self, context: True
    assert "bool, not a Verdict" in ran(port, toy)["odd"].what


def test_verdicts_are_saved_and_go_stale_with_the_source(port):
    ran(port, check("one"))
    saved = results.load(port, "one")
    assert saved.fresh
    assert saved.verdict.tables[0].rows == ((1, 0.5),)
    assert saved.versions["python"]
    port.modeling.write_text("# an edit\n")
    assert not results.load(port, "one").fresh


def test_a_changed_checkpoint_makes_verdicts_stale(port):
    ran(port, check("one"))
    config = port.checkpoint / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 1}))
    assert not results.load(port, "one").fresh


def test_an_unreadable_result_counts_as_none(port):
    ran(port, check("one"))
    (port.state_dir / "results" / "one.json").write_text("{")
    assert results.load(port, "one") is None


def test_only_runs_what_it_requires_unless_that_passed_on_this_source(port):
    calls = []
    toys = [check("a", calls=calls), check("b", requires=("a",), calls=calls), check("c")]
    assert list(ran(port, *toys, only=["b"])) == ["a", "b"]
    assert list(ran(port, *toys, only=["b"])) == ["b"]
    port.modeling.write_text("# an edit\n")
    assert list(ran(port, *toys, only=["b"])) == ["a", "b"]
    assert calls == ["a", "b", "b", "a", "b"]


def test_a_saved_pass_of_another_step_meets_a_requirement(port):
    needs = check("late", requires=("bit_equal_toy",))
    assert ran(port, needs)["late"].status == "skipped"
    ran(port, check("bit_equal_toy"))
    assert ran(port, needs)["late"].status == "passed"


def test_an_unknown_check_is_named_with_the_known_ones(port):
    with pytest.raises(PortkitError) as caught:
        ran(port, check("a"), only=["z"])
    assert "`z`" in caught.value.what
    assert "a" in caught.value.next


def test_a_circle_of_requirements_is_named():
    with pytest.raises(PortkitError, match="circle"):
        runner.in_order([check("a", requires=("b",)), check("b", requires=("a",))])


def test_every_check_of_the_workbook_is_sound():
    """Ids are unique, steps match their rooms, requirements exist, and each says what it proves."""
    seen: dict[str, str] = {}
    for step in steps():
        for one in runner.checks_of(step):
            assert one.step == step.id, one
            assert one.id not in seen, f"{one.id} in {step.id} and {seen[one.id]}"
            seen[one.id] = step.id
            assert one.title and one.proves(), one
    for step in steps():
        ordered = [c.id for c in runner.in_order(runner.checks_of(step))]
        assert len(ordered) == len(runner.checks_of(step))
        for one in runner.checks_of(step):
            assert set(one.requires) <= set(seen), one


def test_checks_are_light():
    """Checks run in the reader's kernel: what is heavy belongs in the worker's jobs."""
    code = (
        "import sys; from portkit.checks.runner import all_checks; all_checks();"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
