"""AutoWeightsLoader's arguments have changed."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

GONE = {
    "skip_prefixes": (
        "map the prefix to None in WeightsMapper(orig_to_new_prefix=...), or filter the iterator"
    ),
    "skip_substrs": "map it to None in WeightsMapper(orig_to_new_substr=...)",
}


class SkipWeightsInMapper(Rule):
    """Skip weights in the mapper, not by arguments of `AutoWeightsLoader`.

    ## What it does
    Reports `AutoWeightsLoader(self, skip_prefixes=...)` and its like, and None as a value of
    `orig_to_new_stacked`.

    ## Why vLLM wants it
    The loader of vLLM 0.32 has no `skip_prefixes` any more: a TypeError when the weights load. In
    the mapper, None means "skip", but not in `orig_to_new_stacked`, where it is unpacked.

    ## Example
        loader = AutoWeightsLoader(self, skip_prefixes=["lm_head."])

    ## Use instead
        mapper = WeightsMapper(orig_to_new_prefix={"lm_head.": None})

    What only may be too much, such as a layer that another checkpoint of the model has, is for
    `AutoWeightsLoader(self, ignore_unexpected_prefixes=[...])`: it drops what has no module.

    ## Fix safety
    None: where the mapper stands differs.

    ## References
    - vllm/model_executor/models/utils.py (AutoWeightsLoader, WeightsMapper)
    """

    VALID = [
        Valid("loader = AutoWeightsLoader(self)\n"),
        Valid('mapper = WeightsMapper(orig_to_new_prefix={"lm_head.": None})\n'),
    ]
    INVALID = [
        Invalid(
            'loader = AutoWeightsLoader(self, skip_prefixes=["lm_head."])\n',
            line=1,
            names="skip_prefixes",
        ),
        Invalid(
            'mapper = WeightsMapper(orig_to_new_stacked={".rotary": None})\n',
            line=1,
            names=".rotary",
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        name = self.source.vllm_name(node.func)
        for item in node.args:
            key = item.keyword.value if item.keyword is not None else ""
            if name == "AutoWeightsLoader" and key in GONE:
                self.report(item, f"`{key}` is no argument of AutoWeightsLoader: {GONE[key]}.")
            elif (
                name == "WeightsMapper"
                and key == "orig_to_new_stacked"
                and isinstance(item.value, cst.Dict)
            ):
                for element in item.value.elements:
                    if self.source.code(element.value) == "None":
                        where = (
                            self.source.code(element.key)
                            if isinstance(element, cst.DictElement)
                            else "**"
                        )
                        self.report(
                            element.value,
                            f"{where} maps to None in orig_to_new_stacked: skip it in "
                            "orig_to_new_substr instead.",
                        )
