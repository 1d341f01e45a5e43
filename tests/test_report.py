"""Reports: the same values as text and as HTML."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from portkit.checks.verdict import Table, Verdict
from portkit.draft.outcome import DraftOutcome
from portkit.errors import PortkitError
from portkit.lint.finding import Finding
from portkit.report import render
from portkit.report.blocks import Code, Diff, Fold, Heading, Line, Link, Log, Pairs, Report
from portkit.report.html import page
from portkit.report.markdown import to_markdown
from portkit.report.proof import Proof, StepProof, proof_report

PASSED = Verdict(
    "starts", "forward", "The engine starts", "passed", "with the port's class", device="cpu"
)
FAILED = Verdict(
    "decode_parity",
    "forward",
    "Decode",
    "failed",
    "log-probabilities differ by 1.25 at position 1",
    where="model.layers.0.self_attn",
    next="look at `is_neox_style`",
    causes=("the rotary layout", "the scale"),
    tables=(Table("differences", ("position", "max"), ((0, 0.0), (1, 1.25))),),
    log="Traceback <module>\nValueError: x",
    device="cpu",
    device_reason="no GPU here",
    seconds=1.5,
)
SKIPPED = Verdict("far", "forward", "Far", "skipped", "needs `decode_parity`, which did not pass")
FINDING = Finding(
    "attention-mask",
    "forward",
    "`forward` still takes `attention_mask`",
    "vllm_x/modeling_x.py",
    2,
    4,
    "XAttention.forward",
    "safe",
)


class Strict(HTMLParser):
    """Checks that tags are balanced and collects what a fragment must not have."""

    VOID = {"br", "meta", "img", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(html: str) -> Strict:
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


def all_reports():
    every_block = Report(
        (
            Heading("a <b> title"),
            Line("text", "note", "label", "aside", 1),
            Pairs((("k", "v"),)),
            Code("x = 1\n  y = 2\n", 5, ((6, "here"),), "file.py"),
            Diff("--- a\n+++ b\n@@ -1 +1 @@\n-x\n+y"),
            Log("out & <err>"),
            Link("open", "/tmp/x.py", 3),
            Fold("more", (Line("in"),)),
            Table("t", ("a",), ((None,), (True,), (1.23456,))),
        )
    )
    outcome = DraftOutcome(
        "forward", "success", (("a.py", "x = 2\n"),), ("did it",), ("decide this",)
    )
    error = PortkitError("what is wrong", "where it is", "do that")
    return {
        "blocks": every_block,
        "verdicts": render.verdicts_report([PASSED, FAILED, SKIPPED]),
        "none": render.verdicts_report([]),
        "findings": render.findings_report([FINDING], "a\nb\nc\n"),
        "no findings": render.findings_report([]),
        "outcome": render.outcome_report(outcome),
        "error": render.error_report(error),
        "no diff": render.diff_report(""),
    }


@pytest.mark.parametrize("name", all_reports())
def test_one_bundle_has_text_and_safe_html(name):
    bundle = all_reports()[name]._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    parser = read(bundle["text/html"])
    assert not {"script", "link", "style", "iframe", "img"} & set(parser.tags)
    assert not [k for k, _ in parser.attributes if k.startswith("on")]
    assert "\x1b" not in bundle["text/plain"]
    assert bundle["text/plain"].strip()


def test_a_failure_says_what_where_next_and_causes_in_both_forms():
    report = render.verdicts_report([FAILED])
    for form in (str(report), report.html()):
        for words in (
            "✗ failed",
            "1.25 at position 1",
            "model.layers.0.self_attn",
            "1. the rotary layout",
            "ValueError: x",
            "differences",
        ):
            assert words in form
    assert not report.ok


def test_status_is_said_in_words_and_symbols_not_by_colour_alone():
    text = str(render.verdicts_report([PASSED, FAILED, SKIPPED]))
    assert "✓ passed" in text and "✗ failed" in text and "○ skipped" in text
    assert "3 checks: 1 passed, 1 failed, 1 skipped" in text


def test_text_colours_are_left_to_the_theme():
    """No black text, no white paper: the fragment must be legible on both themes."""
    for report in all_reports().values():
        for name, value in read(report.html()).attributes:
            if name == "style":
                for forbidden in (
                    "color:#000",
                    "color:black",
                    "background:#fff",
                    "background:white",
                ):
                    assert forbidden not in value


def test_whatever_a_model_says_is_escaped():
    nasty = Verdict(
        "x", "forward", "<script>alert(1)</script>", "failed", "<b>`<i>`</b>", log="</pre><script>"
    )
    assert "<script>" not in render.verdicts_report([nasty]).html()
    read(render.verdicts_report([nasty]).html())


def test_evidence_of_a_pass_is_folded_and_left_out_of_text():
    passed = Verdict("a", "forward", "A", "passed", "fine", tables=FAILED.tables)
    report = render.verdicts_report([passed])
    assert "differences" not in str(report)
    assert "<details style" in report.html() and "differences" in report.html()


def test_findings_point_at_the_line():
    text = str(
        render.findings_report([FINDING], "class X:\n    def forward(self, attention_mask):\n")
    )
    assert "→    2      def forward" in text
    assert "attention-mask, vllm_x/modeling_x.py:2, safe fix" in text


def test_a_draft_shows_its_diff_and_what_is_left_to_decide(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    outcome = DraftOutcome(
        "forward", "success", (("a.py", "x = 2\n"),), ("did it",), ("decide this",)
    )
    text = str(render.outcome_report(outcome, tmp_path))
    assert "-x = 1" in text and "+x = 2" in text and "decide: decide this" in text


def test_numbers_are_short_but_small_ones_do_not_become_zero():
    table = Table("", ("v",), ((1.5e-9,), (0.123456,), (True,), (None,)))
    text = str(Report((table,)))
    assert "1.5e-09" in text and "0.1235" in text and "yes" in text


def test_a_page_stands_alone():
    html = page((Line("hello"),), "a <title>")
    assert html.startswith("<!doctype html>")
    assert "a &lt;title&gt;" in html
    assert "http" not in html


def test_long_words_are_folded_not_cut():
    word = "x" * 300
    assert str(Report((Line(word),))).replace("\n", "").count("x") == 300


# ---- Markdown -----------------------------------------------------------------------------------


def test_markdown_tables_keep_their_columns_whatever_stands_in_them():
    table = Table("a|b", ("x|y", "z"), (("1 | 2", "line\nbreak"), (None, "`a|b`")), note="a note")
    lines = to_markdown([table]).splitlines()
    assert lines[0] == "**a|b**"
    assert lines[2] == "| x\\|y | z |"
    assert lines[3] == "| --- | --- |"
    assert lines[4] == "| 1 \\| 2 | line break |"
    assert lines[5].endswith("| `a\\|b` |")
    assert lines[-1] == "a note"


def test_markdown_shows_names_as_they_are():
    text = to_markdown([Line("model.layers.*.mlp.* of <unk>, see `a * <b>`")])
    assert text == "- model.layers.\\*.mlp.\\* of \\<unk>, see `a * <b>`\n"


def test_markdown_folds_hold_their_blocks_and_lists_stay_together():
    fold = Fold("more <of> it", (Line("one"), Line("two", indent=1), Heading("three")), "passed")
    assert to_markdown([fold]) == (
        "<details><summary>✓ more &lt;of&gt; it</summary>\n\n"
        "- one\n  - two\n\n## three\n\n</details>\n"
    )


def test_markdown_fences_are_longer_than_what_they_hold():
    lines = to_markdown([Log("```\nx\n```")]).splitlines()
    assert lines[0] == lines[-1] == "````"


def test_markdown_has_a_form_of_every_block():
    text = to_markdown(all_reports()["blocks"].blocks)
    for words in ("## a \\<b> title", "**label:** text", "| k | v |", "```python", "```diff"):
        assert words in text
    assert "open: `/tmp/x.py`" in text and "<summary>more</summary>" in text


# ---- the report of a port -----------------------------------------------------------------------


def a_proof(*verdicts: Verdict, **changes) -> Proof:
    step = StepProof(2, "Forward", verdicts, **changes)
    return Proof("x", "XForCausalLM", (("licence", "MIT"),), (step,), ("a limit",), ("run it",))


def test_a_proof_says_first_what_failed_was_never_run_or_is_old():
    proof = a_proof(PASSED, FAILED, SKIPPED, stale=("starts",), missing=("interface",))
    report = proof_report(proof)
    assert not report.ok
    text = to_markdown(report.blocks)
    assert "Checks: 1 passed, 1 failed, 1 skipped, 1 never run." in text
    order = ["# XForCausalLM", "1.25 at position 1", "state of the port: starts", "Never run: int"]
    order += ["| licence | MIT |", "| 2 | Forward | 1 | 1 | 1 | 1 | 1 |", "## Every check"]
    order += ["a limit", "`run it`", "decode_parity: Decode"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_numbers_of_the_proof_stand_open_and_other_evidence_is_folded():
    speed = Verdict("speed", "prove", "Speed", "passed", "fast", tables=FAILED.tables)
    blocks = proof_report(a_proof(speed, FAILED)).blocks
    assert speed.tables[0] in blocks
    (fold,) = [b for b in blocks if isinstance(b, Fold)]
    assert fold.blocks == FAILED.tables and not fold.open


def test_a_proof_of_nothing_is_not_a_pass():
    blocks = proof_report(a_proof(missing=("starts",))).blocks
    assert [b.mark for b in blocks if isinstance(b, Line)][:2] == ["warning", "warning"]
