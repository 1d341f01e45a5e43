"""A port holds what its causal LM needs, and nothing of the other heads."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule

NAME = re.compile(r"\b[A-Za-z_]\w*\b")


class DropUnreachableCode(Rule):
    """Drop classes and functions that the ported class never reaches.

    ## What it does
    Reports top-level classes and functions that the causal LM does not use, directly or through
    others. A name in a string (`_no_split_modules = ["ToyLayer"]`) counts as use.

    ## Why vLLM wants it
    A Transformers file holds many heads (classification, question answering). vLLM serves one
    class; every line beyond it must be read, kept and reviewed for nothing.

    ## Example
        class ToyForSequenceClassification(GenericForSequenceClassification): ...

    ## Use instead
        Nothing: delete it. vLLM makes pooling and classification models from the causal LM
        by itself (`--convert`).

    ## Fix safety
    Safe for code that is found by its name. Code that is reached by a computed name only
    (`globals()[...]`) would be lost; the diff shows it.

    ## References
    - vLLM guide, Basic model: 1. Bring your model code
    """

    fix_safety = "safe"

    VALID = [
        Valid("class ToyLayer: ...\nclass ToyForCausalLM:\n    layer = ToyLayer\n"),
        Valid("class Anything: ...\n"),
        Valid("class A: ...\nclass B:\n    x = A\n", PortContext(architecture="B")),
    ]
    INVALID = [
        Invalid(
            """
            class ToyLayer: ...
            class ToyForCausalLM:
                layer = ToyLayer
            class ToyForSequenceClassification: ...
            """,
            line=4,
            names="ToyForSequenceClassification",
            fixed="""
            class ToyLayer: ...
            class ToyForCausalLM:
                layer = ToyLayer
            """,
        ),
        Invalid(
            "def helper(): ...\nclass B: ...\n",
            line=1,
            given=PortContext(architecture="B"),
            fixed="class B: ...\n",
            names="helper",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        top = self.source.top
        if top is None:
            return
        defined = {
            line.name.value: line
            for line in node.body
            if isinstance(line, (cst.ClassDef, cst.FunctionDef))
        }
        uses = {name: set(NAME.findall(self.source.code(line))) for name, line in defined.items()}
        reached, queue = set(), [top.name]
        # Statements at module level run on import, whoever is reached; __all__ is only a list.
        for line in node.body:
            if not isinstance(line, (cst.ClassDef, cst.FunctionDef)):
                text = self.source.code(line)
                if not text.startswith(("__all__", "import ", "from ")):
                    queue += [name for name in NAME.findall(text) if name in defined]
        while queue:
            name = queue.pop()
            if name not in reached:
                reached.add(name)
                queue += [used for used in uses[name] if used in defined]
        for name, line in defined.items():
            if name not in reached:
                self.report(
                    line,
                    f"`{name}` is never reached from `{top.name}`: delete it.",
                    replacement=cst.RemoveFromParent(),
                )
