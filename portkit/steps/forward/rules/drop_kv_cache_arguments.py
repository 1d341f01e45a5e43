"""The engine binds caches and metadata; nobody passes them."""

from __future__ import annotations

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import self_attribute

OLD = frozenset(
    {"kv_caches", "kv_cache", "attn_metadata", "input_metadata", "cache_events", "cache_event"}
)


class DropKvCacheArguments(Rule):
    """Pass no `kv_caches` and no `attn_metadata`.

    ## What it does
    Reports these parameters of older vLLM models in a `forward`, and calls of layers with them.

    ## Why vLLM wants it
    Each `Attention` layer finds its cache and the batch's metadata in the forward context, by its
    prefix. vLLM no longer passes them: a `forward` that asks for them cannot be called.

    ## Example
        def forward(self, input_ids, positions, kv_caches, attn_metadata): ...

    ## Use instead
        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None): ...

    ## Fix safety
    None: signature and callers change together.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    - vllm/forward_context.py
    """

    VALID = [
        Valid("class A(nn.Module):\n    def forward(self, positions, hidden_states): ...\n"),
        Valid(
            """
            class A(nn.Module):
                def forward(self, q, k, v):
                    return self.attn(q, k, v)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def forward(self, positions, x, kv_cache, attn_metadata): ...
            """,
            line=2,
            count=2,
            names="kv_cache",
        ),
        Invalid(
            """
            class A(nn.Module):
                def forward(self, q, k, v):
                    return self.attn(q, k, v, kv_cache=None)
            """,
            line=3,
            names="kv_cache",
        ),
    ]

    def visit_Param(self, node: cst.Param) -> None:
        function = self.source.function_of(node)
        if node.name.value in OLD and function is not None and function.name.value == "forward":
            self._say(node, node.name.value)

    def visit_Arg(self, node: cst.Arg) -> None:
        function = self.source.function_of(node)
        if function is None or function.name.value != "forward":
            return
        call = self.source.parents.get(node)
        attribute = self_attribute(call.func) if isinstance(call, cst.Call) else ""
        facts = self.source.class_of(node)
        is_method = facts is not None and attribute in facts.methods
        if node.keyword is not None and node.keyword.value in OLD and attribute and not is_method:
            self._say(node, node.keyword.value)

    def _say(self, node: cst.CSTNode, name: str) -> None:
        self.report(
            node,
            f"`{name}` is an older vLLM's argument: Attention finds its cache and metadata in the "
            "forward context; drop it.",
        )
