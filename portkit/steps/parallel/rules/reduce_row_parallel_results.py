"""Each rank's part of a row-parallel product must be summed."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import keyword


class ReduceRowParallelResults(Rule):
    """Sum the results of every `RowParallelLinear`.

    ## What it does
    Reports `reduce_results=False` in a class that nowhere all-reduces.

    ## Why vLLM wants it
    Each rank multiplies its slice of the input: the results are addends. Left unsummed TP=1 is
    right and everything above is garbage. (Summed twice is as wrong.) The switch is for classes
    that add several parts and reduce once.

    ## Example
        self.o_proj = RowParallelLinear(4, 4, reduce_results=False)

    ## Use instead
        self.o_proj = RowParallelLinear(4, 4)

    ## Fix safety
    None: the sum may happen in another class, which this rule does not see.

    ## References
    - vllm/model_executor/layers/linear.py; vLLM issue 3775
    """

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.dense = RowParallelLinear(4, 4, reduce_results=False)
                def forward(self, x):
                    x, _ = self.dense(x)
                    return tensor_model_parallel_all_reduce(x)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self, r):
                    self.d = RowParallelLinear(4, 4, reduce_results=r)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.d = RowParallelLinear(4, 4, reduce_results=False)
            """,
            line=3,
            names="`d`",
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self):
                    self.o_proj = RowParallelLinear(
                        4,
                        4,
                        reduce_results=False,
                    )
            """,
            line=3,
            names="o_proj",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        if "all_reduce" in self.source.text.partition("class ")[2]:
            return
        for facts, layer in self.source.layers:
            switch = keyword(layer.call, "reduce_results")
            if self.source.vllm_name(layer.call.func) != "RowParallelLinear" or switch is None:
                continue
            if self.source.code(switch.value) == "False":
                self.report(
                    layer.call,
                    f"`{layer.attribute}` of `{facts.name}` has reduce_results=False and nothing "
                    "all-reduces: at TP>1 each rank keeps its own addend.",
                )
