"""Decorators that only write documentation need Transformers' docs machinery."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

DOCS_ONLY = frozenset(
    {
        "auto_docstring",
        "add_start_docstrings",
        "add_start_docstrings_to_model_forward",
        "add_end_docstrings",
        "add_code_sample_docstrings",
        "replace_return_docstrings",
    }
)


class DropDocsDecorators(Rule):
    """Drop decorators that only write docstrings.

    ## What it does
    Reports `@auto_docstring` and its older relatives on classes and methods.

    ## Why vLLM wants it
    They compute nothing. They inspect the class at import and look for files of Transformers'
    own tree, which makes the copied file depend on the place it came from.

    ## Example
        @auto_docstring
        class ToyModel(nn.Module): ...

    ## Use instead
        class ToyModel(nn.Module): ...

    ## Fix safety
    Safe: the decorators change docstrings only. Their import goes too once nothing uses it.

    ## References
    - vLLM guide, Basic model: 1. Bring your model code
    - transformers/utils/auto_docstring.py
    """

    fix_safety = "safe"

    VALID = [
        Valid("class ToyModel(nn.Module):\n    pass\n"),
        Valid("@support_torch_compile\nclass ToyModel(nn.Module):\n    pass\n"),
    ]
    INVALID = [
        Invalid(
            """
            from transformers.utils import auto_docstring, can_return_tuple

            @auto_docstring
            class ToyModel(nn.Module):
                @can_return_tuple
                @auto_docstring
                def forward(self, x):
                    return x
            """,
            line=3,
            count=2,
            names="auto_docstring",
            fixed="""
            from transformers.utils import can_return_tuple

            class ToyModel(nn.Module):
                @can_return_tuple
                def forward(self, x):
                    return x
            """,
        ),
        Invalid(
            '@add_start_docstrings("text", TOY)\nclass ToyModel(nn.Module):\n    pass\n',
            line=1,
            fixed="class ToyModel(nn.Module):\n    pass\n",
            names="add_start_docstrings",
        ),
    ]

    def visit_Decorator(self, node: cst.Decorator) -> None:
        function = node.decorator.func if isinstance(node.decorator, cst.Call) else node.decorator
        name = self.source.dotted(function).rpartition(".")[2]
        if name in DOCS_ONLY:
            self.report(
                node,
                f"`@{name}` only writes documentation: drop it.",
                replacement=cst.RemoveFromParent(),
                unused=(name,),
            )
