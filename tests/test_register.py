"""Step register: rows in their place, the patch, and vLLM's own source."""

from __future__ import annotations

from pathlib import Path

import pytest

from portkit.checks.base import CheckContext
from portkit.create import new_port
from portkit.errors import PortkitError
from portkit.live.client import live_for
from portkit.steps.register import rows, tree
from portkit.steps.register.checks import PatchApplies, RegistryTests, Resolves
from portkit.steps.register.draft import SECTION, draft, patch_path

GOLDEN = Path(__file__).parent / "ports" / "helium" / "weights.py"
TABLE = """_MODELS = {
    # [Decoder-only]
    "AForCausalLM": ("a", "AForCausalLM"),
    # FIXME: gone from the hub
    "CForCausalLM": (
        "c",
        "CForCausalLM",
    ),
    "bForCausalLM": ("b", "bForCausalLM"),
    # [Encoder-decoder]
    "DForConditionalGeneration": ("d", "D"),
}
"""


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    port = new_port(
        "helium", architecture="HeliumForCausalLM", root=tmp_path_factory.mktemp("ports")
    )
    port.apply({port.modeling: GOLDEN.read_text()}, "the finished port")
    return port


def context(port) -> CheckContext:
    return CheckContext(port, live_for(port))


@pytest.mark.parametrize(
    ("key", "above"),
    [
        ("AgForCausalLM", '    "AForCausalLM": ("a", "AForCausalLM"),'),
        ("ZForCausalLM", '    "bForCausalLM": ("b", "bForCausalLM"),'),
    ],
)
def test_a_row_goes_to_its_place_inside_its_section(key, above):
    lines = rows.add_dict_row(
        TABLE, "_MODELS", SECTION, key, f'    "{key}": ("x", "{key}"),\n'
    ).splitlines()
    assert lines[lines.index(f'    "{key}": ("x", "{key}"),') - 1] == above


def test_a_comment_stays_with_the_row_below_it():
    text = rows.add_dict_row(
        TABLE, "_MODELS", SECTION, "BForCausalLM", '    "BForCausalLM": ("x", "B"),\n'
    )
    assert text.index('"BForCausalLM"') < text.index("# FIXME") < text.index('"CForCausalLM"')


def test_all_other_lines_stay_as_they_are():
    text = rows.add_dict_row(TABLE, "_MODELS", SECTION, "BForCausalLM", "NEW\n")
    assert text.replace("NEW\n", "") == TABLE


def test_a_row_can_be_dropped_with_its_comment():
    assert "FIXME" not in rows.drop_dict_row(TABLE, "_MODELS", "CForCausalLM")


def test_an_architecture_that_has_a_row_is_refused():
    with pytest.raises(PortkitError, match="has a row"):
        rows.add_dict_row(TABLE, "_MODELS", SECTION, "AForCausalLM", "x")


def test_neighbours_say_whether_the_order_holds():
    assert rows.neighbours(["A", "B", "C"], "B") == ("A", "B", "C", True)
    assert rows.neighbours(["B", "A", "C"], "B")[3] is False
    assert rows.neighbours(["A"], "B") is None


def test_without_vllms_source_the_draft_says_where_to_get_it(port, monkeypatch, tmp_path):
    monkeypatch.setenv("PORTKIT_VLLM_SOURCE", str(tmp_path / "none.tar.gz"))
    outcome = draft(port)
    assert outcome.status == "failed" and "make setup" in outcome.reason


def test_another_archive_is_refused(monkeypatch, tmp_path):
    fake = tmp_path / "vllm-0.32.0.tar.gz"
    fake.write_bytes(b"not vLLM")
    monkeypatch.setenv("PORTKIT_VLLM_SOURCE", str(fake))
    with pytest.raises(PortkitError, match=r"not vLLM 0\.32\.0"):
        tree.source()


def test_before_the_draft_there_is_no_patch(port):
    verdict = PatchApplies().run(context(port))
    assert verdict.status == "failed" and "portkit draft register" in verdict.next


class TestThePatch:
    @pytest.fixture(autouse=True)
    def drafted(self, port):
        for name, text in draft(port).files:
            port.apply({port.root / name: text}, "draft of register")

    def test_it_applies_to_vllms_source(self, port):
        assert PatchApplies().run(context(port)).status == "passed"

    def test_drafting_again_is_skipped(self, port):
        assert draft(port).status == "skipped"

    def test_an_edit_after_the_draft_is_seen(self, port):
        port.apply({port.modeling: port.source + "\n# edited\n"}, "edit")
        verdict = PatchApplies().run(context(port))
        port.undo()
        assert verdict.status == "failed" and "not the port's model" in verdict.what

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            (
                '+    "HeliumForCausalLM": ("helium", "HeliumForCausalLM"),\n',
                "",
                "git apply refuses",
            ),
            (
                '+    "HeliumForCausalLM": ("helium"',
                '+    "HeliumForCasualLM": ("helium"',
                "no row",
            ),
        ],
    )
    def test_a_spoilt_patch_is_seen(self, port, old, new, said):
        path = port.root / patch_path(port)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        verdict = PatchApplies().run(context(port))
        path.write_text(text)
        assert verdict.status == "failed" and said in verdict.what

    @pytest.mark.vllm
    def test_vllms_own_registry_tests_pass(self, port):
        verdict = RegistryTests().run(context(port))
        assert verdict.status == "passed", verdict.what

    @pytest.mark.vllm
    def test_a_missing_test_row_turns_vllms_own_tests_red(self, port):
        path = port.root / patch_path(port)
        text = path.read_text()
        row = '+    "HeliumForCausalLM": _HfExamplesInfo('
        assert row in text
        path.write_text(text.replace(row, '+    "HeliumForSomething": _HfExamplesInfo('))
        verdict = RegistryTests().run(context(port))
        path.write_text(text)
        assert verdict.status == "failed" and "HeliumForCausalLM" in verdict.what

    @pytest.mark.vllm
    def test_the_patched_vllm_serves_it(self, port):
        verdict = Resolves().run(context(port))
        assert verdict.status == "passed", verdict.what
        assert "vllm.model_executor.models.helium" in verdict.what


def test_of_a_native_architecture_the_row_is_pointed_at_the_port(tmp_path):
    """vLLM's own file stays, and so do the rows that are there already."""
    port = new_port("opt", architecture="OPTForCausalLM", root=tmp_path)
    outcome = draft(port)
    assert outcome.status == "success" and "natively" in outcome.warnings[0]
    ((name, patch),) = outcome.files
    assert '-    "OPTForCausalLM": ("opt", "OPTForCausalLM"),' in patch
    assert '+    "OPTForCausalLM": ("opt_port", "OPTForCausalLM"),' in patch
    assert [line[6:] for line in patch.splitlines() if line.startswith("+++ b/")] == [
        "vllm/model_executor/models/opt_port.py",
        "vllm/model_executor/models/registry.py",
    ]
    port.apply({port.root / name: patch}, "draft of register")
    verdict = PatchApplies().run(context(port))
    assert verdict.status == "passed" and "2 files" in verdict.what
