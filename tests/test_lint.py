"""The rule engine on whole files: the goldens, vLLM's own models, Transformers', and bad input."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import libcst as cst
import pytest

from portkit.errors import PortkitError
from portkit.lint.engine import due_rules, findings, fix, fix_source, lint_source
from portkit.lint.finding import PortContext
from portkit.lint.original import original_facts
from portkit.lint.registry import all_rules, rule, rules_of
from portkit.lint.rule import Rule
from portkit.port import open_port

GOLDENS = Path(__file__).parent / "ports" / "helium"
STEPS = ("copy", "forward", "parallel", "weights")
COPY = (GOLDENS / "copy.py").read_text()
ORIGINAL = original_facts(COPY)
HELIUM = PortContext(
    architecture="HeliumForCausalLM",
    architectures=("HeliumForCausalLM",),
    package="vllm_helium",
    module="vllm_helium.modeling_helium",
    source_package="transformers.models.helium",
    rotary_layout=ORIGINAL.rotary_layout,
    original_linears=ORIGINAL.linears,
    original_ties=ORIGINAL.ties,
)


def golden(step: str) -> str:
    return (GOLDENS / f"{step}.py").read_text()


def lint(text: str, *steps: str, context: PortContext = HELIUM) -> list[str]:
    rules = [r for step in steps for r in rules_of(step)]
    return [
        f"{f.rule}:{f.line} {f.message}" for f in lint_source(text, "modeling.py", rules, context)
    ]


def package_file(package: str, *parts: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)


# ---- the goldens: each step's rules are satisfied by that step's file, and not by the one before


@pytest.mark.parametrize("step", STEPS)
def test_golden_satisfies_its_own_and_earlier_rules(step):
    assert lint(golden(step), *STEPS[: STEPS.index(step) + 1]) == []


@pytest.mark.parametrize(("step", "before"), list(zip(STEPS[1:], STEPS, strict=False)))
def test_step_not_done_leaves_tasks(step, before):
    assert lint(golden(before), step)


def test_original_facts_are_read():
    assert ORIGINAL.rotary_layout == "interleaved" and ORIGINAL.ties is True
    assert {"q_proj", "gate_proj", "lm_head"} <= ORIGINAL.linears


def test_the_transformers_file_itself_has_tasks_of_copy():
    text = package_file("transformers", "models", "helium", "modeling_helium.py").read_text()
    found = " ".join(lint(text, "copy"))
    for name in ("use-absolute-imports", "drop-docs-decorators", "drop-unreachable-code"):
        assert name in found


def test_fixing_the_transformers_file_leaves_nothing_for_copy():
    text = package_file("transformers", "models", "helium", "modeling_helium.py").read_text()
    new, fixed = fix_source(text, rules_of("copy"), HELIUM, unsafe=False)
    assert len(fixed) >= 15 and lint(new, "copy") == []
    compile(new, "modeling_helium.py", "exec")
    assert "auto_docstring" not in new and "from transformers.activations import ACT2FN" in new


# ---- one edit on a correct port: the rule that must speak ---------------------------------------

MUTANTS = [
    ("forward", "is_neox_style=False", "is_neox_style=True", "match-rotary-layout"),
    (
        "forward",
        "            rope_parameters=config.rope_parameters,\n",
        "",
        "pass-rope-parameters",
    ),
    ("forward", '            prefix=f"{prefix}.attn",\n', "", "give-attention-a-prefix"),
    ("forward", 'prefix=f"{prefix}.attn"', 'prefix="attn"', "keep-prefixes-unique"),
    (
        "forward",
        'prefix=f"{prefix}.mlp"',
        'prefix=f"{prefix}.feed_forward"',
        "match-prefix-to-attribute",
    ),
    (
        "forward",
        "return self.model(input_ids,",
        "return self.lm_head(input_ids,",
        "keep-logits-out-of-forward",
    ),
    ("forward", "def compute_logits", "def sample", "add-compute-logits"),
    ("forward", "layers.attention import", "layers.attention.old import", "import-what-vllm-has"),
    ("parallel", "x, _ = self.down_proj(x)", "x = self.down_proj(x)", "unpack-linear-output"),
    ("parallel", "q, k, v = qkv.split", "q, v, k = qkv.split", "keep-qkv-order"),
    (
        "parallel",
        "total_num_heads // tp_size\n        self.num_kv",
        "total_num_heads\n        self.num_kv",
        "",
    ),
    (
        "parallel",
        '        "qkv_proj": ["q_proj", "k_proj", "v_proj"],\n',
        "",
        "declare-packed-modules",
    ),
    ("parallel", "@support_torch_compile\n", "", "compile-the-model"),
    ("parallel", '            prefix=f"{prefix}.o_proj",\n', "", "give-linears-a-prefix"),
    (
        "weights",
        '".k_proj": (".qkv_proj", "k")',
        '".k_proj": (".qkv_proj", "v")',
        "keep-shard-order",
    ),
    (
        "weights",
        '".gate_proj": (".gate_up_proj", 0)',
        '".gate_proj": (".gate_up_proj", 1)',
        "keep-shard-order",
    ),
    (
        "weights",
        "        return loader.load_weights(",
        "        loader.load_weights(",
        "return-loaded-names",
    ),
    ("weights", '(".qkv_proj", "q")', '(".qkv", "q")', "map-to-existing-layers"),
    (
        "weights",
        "if config.tie_word_embeddings:\n                self.lm_head",
        "if True:\n                self.lm_head",
        "tie-the-lm-head",
    ),
]


@pytest.mark.parametrize(
    ("step", "old", "new", "expected"), MUTANTS, ids=lambda value: str(value)[:30]
)
def test_one_wrong_edit_is_named(step, old, new, expected):
    text = golden(step)
    assert old in text, "the edit must apply"
    found = lint(text.replace(old, new, 1), *STEPS)
    if expected:
        assert expected in [line.partition(":")[0] for line in found], found
    else:
        assert not [line for line in found if line.startswith("use-")]


# ---- vLLM's own models: no false alarm ----------------------------------------------------------

# GPT-J fuses q, k and v without saying so: true, though without effect as it takes no LoRA.
KNOWN = {"gpt_j": ["declare-packed-modules"]}


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma2", "opt", "gpt_j", "glm4", "olmoe", "mixtral", "bloom"]
)
def test_vllm_own_model_has_no_false_alarm(name):
    text = package_file("vllm", "model_executor", "models", f"{name}.py").read_text()
    found = lint(text, "forward", "parallel", "weights", context=PortContext())
    assert [line.partition(":")[0] for line in found] == KNOWN.get(name, []), found


# ---- Transformers' causal LMs: no crash, and nothing changes by itself --------------------------


def causal_lm_files() -> list[Path]:
    """Modeling files of the classes in Transformers' causal LM mapping, found without importing."""
    models = package_file("transformers", "models")
    auto = (models / "auto" / "modeling_auto.py").read_text()
    table = auto.partition("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict(")[2].partition(
        "\n)\n"
    )[0]
    names = set(re.findall(r'"(\w+)"\)', table))
    return sorted(
        path
        for path in models.glob("*/modeling_*.py")
        if names & set(re.findall(r"^class (\w+)", path.read_text(), re.M))
    )


FILES = causal_lm_files()
SAMPLE = FILES if os.environ.get("PORTKIT_EXHAUSTIVE") else random.Random(20).sample(FILES, 12)


def test_the_mapping_was_found():
    assert len(FILES) > 120


@pytest.mark.parametrize("path", SAMPLE, ids=lambda path: path.stem.removeprefix("modeling_"))
def test_transformers_files_lint_without_crashing(path):
    text = path.read_text()
    rules = [r for r in all_rules() if r.target == "modeling"]
    context = PortContext(rotary_layout=original_facts(text).rotary_layout)
    found = lint_source(text, path.name, rules, context)
    assert found and not [f for f in found if f.crashed]
    assert cst.parse_module(text).code == text
    nothing = [r for r in rules if r.id == "match-rotary-layout"]
    assert fix_source(text, nothing, context) == (text, []), (
        "a fix without findings changes no byte"
    )
    new, _ = fix_source(text, rules_of("copy"), context)
    compile(new, path.name, "exec", dont_inherit=True)


# ---- the engine itself --------------------------------------------------------------------------


class CrashEverywhere(Rule):
    """A rule with a bug."""

    def visit_Call(self, node: cst.Call) -> None:
        raise KeyError("boom")


class RenameForEver(Rule):
    """A rule whose fix never satisfies it."""

    fix_safety = "safe"

    def visit_Name(self, node: cst.Name) -> None:
        if node.value.startswith("x"):
            self.report(node, f"`{node.value}` is short", replacement=cst.Name(node.value + "x"))


def test_a_crashing_rule_is_named_and_the_others_run():
    found = lint_source(
        "import torch\nf()\n", "a.py", [CrashEverywhere, rule("keep-licence-header")]
    )
    assert [(f.rule, f.crashed) for f in found] == [
        ("crash-everywhere", True),
        ("keep-licence-header", False),
    ]
    assert "KeyError" in found[0].message and "boom" in found[0].message


def test_fixing_stops_even_if_a_rule_never_rests():
    new, fixed = fix_source("x = 1\n", [RenameForEver])
    assert new == "x" * 21 + " = 1\n" and len(fixed) == 20


@pytest.mark.parametrize(
    ("text", "line", "column", "word"),
    [
        ("def f(:\n    pass\n", 1, 7, "invalid syntax"),
        ("x = (1,\n", 1, 5, "never closed"),
        ("class A:\n    def f(self):\n  pass\n", 3, 7, "unindent"),
        ("s = 'abc\n", 1, 5, "unterminated"),
        ("x = 1\0\n", 1, 1, "null"),
    ],
)
def test_a_file_that_does_not_parse_is_one_clear_error(text, line, column, word):
    with pytest.raises(PortkitError) as error:
        lint_source(text, "modeling_toy.py", all_rules())
    assert error.value.where.startswith(f"modeling_toy.py:{line}:{column}\n")
    assert "^" in error.value.where and word in error.value.what and error.value.next


LINEAR = (
    "class A(nn.Module):\n    def __init__(self):\n{above}        self.q_proj = nn.Linear(4, "
    "4){beside}\n"
)


@pytest.mark.parametrize(
    ("above", "beside", "count"),
    [
        ("", "", 1),
        ("", "  # portkit: ignore[use-parallel-linear] tiny", 0),
        ("        # portkit: ignore[other-rule, use-parallel-linear] tiny\n", "", 0),
        ("", "  # portkit: ignore[other-rule] tiny", 1),
        ("", "  # portkit: ignore[use-parallel-linear]", 1),
        ("        '# portkit: ignore[use-parallel-linear] only a string'\n", "", 1),
    ],
)
def test_ignoring_needs_the_rule_and_a_reason(above, beside, count):
    text = LINEAR.format(above=above, beside=beside)
    assert len(lint_source(text, "a.py", [rule("use-parallel-linear")])) == count


def test_a_fix_leaves_what_is_ignored():
    text = "from ...utils import a  # portkit: ignore[use-absolute-imports] kept for the tale\n"
    assert fix_source(text, rules_of("copy")) == (text, [])


def test_windows_line_ends_and_no_final_newline_survive():
    text = "import torch\r\nfrom ...activations import ACT2FN\r\nx = 1"
    new, _ = fix_source(text, [rule("use-absolute-imports")])
    assert new == text.replace("...activations", "transformers.activations")


def test_unknown_rule_offers_the_closest():
    with pytest.raises(PortkitError, match="use-parallel-linear"):
        rule("use-paralel-linear")


def test_findings_after_an_edit_cost_less_than_half_a_second():
    """Processor time, so that a busy machine does not fail it (0.16 s measured)."""
    text = package_file("transformers", "models", "helium", "modeling_helium.py").read_text()
    rules = [r for r in all_rules() if r.target == "modeling"]
    spent = []
    for edit in ("", "# one\n", "# two\n", "# three\n"):
        start = time.process_time()
        assert lint_source(text + edit, "a.py", rules, HELIUM)
        spent.append(time.process_time() - start)
    assert len(text.splitlines()) > 400
    assert min(spent) < 0.5, spent


def test_lint_imports_neither_torch_nor_vllm():
    code = (
        "import sys; from portkit.lint.registry import all_rules; from "
        "portkit.lint.engine import lint_source;"
        "lint_source('from vllm.config import VllmConfig\\nimport torch\\n', 'a.py', all_rules());"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# ---- on a port ----------------------------------------------------------------------------------

PORT_TOML = """\
[port]
name = "helium"
architecture = "HeliumForCausalLM"

[source]
module = "transformers.models.helium.modeling_helium"
"""
PYPROJECT = """\
[project]
name = "vllm-helium"
version = "0.1.0"

[project.entry-points."vllm.general_plugins"]
vllm_helium = "vllm_helium:register"
"""


@pytest.fixture
def port(tmp_path):
    """A port folder as it is after step copy; the first commit holds the copied code."""
    root = tmp_path / "helium"
    package = root / "vllm_helium"
    package.mkdir(parents=True)
    (root / "port.toml").write_text(PORT_TOML)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / ".gitignore").write_text(".portkit/\ncheckpoint/\n")
    (root / "checkpoint").mkdir()
    (root / "checkpoint" / "config.json").write_text('{"architectures": ["HeliumForCausalLM"]}')
    (package / "__init__.py").write_text('"""Helium."""\n')
    (package / "modeling_helium.py").write_text(COPY)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    opened = open_port(root)
    opened.git("add", "-A")
    opened.git("commit", "-q", "-m", "new")
    return opened


def test_findings_show_one_step_only(port):
    assert findings(port, "copy") == []
    tasks = findings(port, "forward")
    assert {f.step for f in tasks} == {"forward"} and len(tasks) > 30
    assert {f.path for f in tasks} == {"vllm_helium/modeling_helium.py"}
    assert any(f.symbol == "HeliumAttention.forward" for f in tasks)


def test_findings_without_a_step_are_those_due(port):
    from portkit.curriculum import step

    assert due_rules(port) == rules_of("choose")
    port.pass_step(step("choose"))
    port.pass_step(step("copy"))
    assert {r.step for r in due_rules(port)} == {"copy", "forward"}
    assert {f.step for f in findings(port)} == {"forward"}


def test_rotary_layout_comes_from_the_first_commit(port):
    port.modeling.write_text(golden("forward").replace("is_neox_style=False", "is_neox_style=True"))
    found = [f for f in findings(port, "forward") if f.rule == "match-rotary-layout"]
    assert [f.fix for f in found] == ["unsafe"] and "is_neox_style=False" in found[0].message
    assert fix(port) == [], "an unsafe fix is not applied unasked"
    assert [f.rule for f in fix(port, "match-rotary-layout")] == ["match-rotary-layout"]
    assert port.source == golden("forward")
    assert port.undo() and "is_neox_style=True" in port.source


def test_fix_is_one_commit_and_can_be_undone(port):
    edited = (
        port.source + "\n\nclass HeliumForTokenClassification(HeliumPreTrainedModel):\n    pass\n"
    )
    port.modeling.write_text(edited)
    done = fix(port, "drop-unreachable-code")
    assert [f.rule for f in done] == ["drop-unreachable-code"]
    assert "TokenClassification" not in port.source
    assert "apply: fix drop-unreachable-code" in port.git("log", "-1", "--format=%s")
    port.undo()
    assert port.source == edited


def test_the_plugin_and_pyproject_are_read_too(port):
    assert [f.rule for f in findings(port, "out_of_tree")] == ["define-register"]
    port.init_file.write_text(
        "import torch\n\n\ndef register():\n    from vllm import ModelRegistry\n\n"
        '    ModelRegistry.register_model("HeliumForCausalLm", '
        '"vllm_helium.modeling_helium:HeliumForCausalLM")\n'
    )
    (port.root / "pyproject.toml").write_text(
        PYPROJECT.replace("general_plugins", "general_plugin")
    )
    found = {(f.rule, f.path, f.line) for f in findings(port, "out_of_tree")}
    assert found == {
        ("keep-plugin-imports-light", "vllm_helium/__init__.py", 1),
        ("match-architecture", "vllm_helium/__init__.py", 7),
        ("name-the-entry-point", "pyproject.toml", 5),
    }
    fix(port, "name-the-entry-point")
    assert (port.root / "pyproject.toml").read_text() == PYPROJECT


def test_a_port_file_that_does_not_parse(port):
    port.modeling.write_text("def f(:\n")
    with pytest.raises(PortkitError, match=r"modeling_helium\.py:1:7"):
        findings(port, "forward")
    with pytest.raises(PortkitError, match=r"modeling_helium\.py:1:7"):
        fix(port, "drop-gradient-checkpointing")
    assert port.source == "def f(:\n"


def test_fixing_a_rule_without_a_fix_says_so(port):
    with pytest.raises(PortkitError, match="no fix"):
        fix(port, "drop-dropout")


def test_a_port_file_that_is_not_utf8(port):
    port.modeling.write_bytes(b"x = '\xff'\n")
    with pytest.raises(PortkitError, match="UTF-8"):
        findings(port, "forward")
