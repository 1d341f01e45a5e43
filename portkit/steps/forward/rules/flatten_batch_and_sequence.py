"""vLLM's tensors are [num_tokens, hidden]; there is no batch dimension to reshape around."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import self_attribute

BATCH = re.compile(r"^(bsz|bs|b|batch|batch_size|n_batch)$", re.I)
SEQUENCE = re.compile(
    r"^(seq|seq_len|seqlen|seq_length|q_len|q_length|tgt_len|s|t|slen|sequence_length)$", re.I
)
PROJECTION = re.compile(r"(^|_)(q|k|v|qkv|query|key|value)(_|$)|query_key_value|Wqkv")


class FlattenBatchAndSequence(Rule):
    """Write shapes for flat tokens, [num_tokens, ...], not for [batch, sequence, ...].

    ## What it does
    Reports `bsz, q_len, _ = x.shape`, `input_shape = x.shape[:-1]` that shapes views,
    `.transpose(1, 2)` of q, k and v, and three-index slices of hidden states.

    ## Why vLLM wants it
    The tokens of all sequences come concatenated in one dimension. Code for two leading
    dimensions crashes, or runs and lets one request read another's tokens.

    ## Example
        q = self.q_proj(x).view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)

    ## Use instead
        q = self.q_proj(x)

    ## Fix safety
    None: which dimensions a view may merge is for you to see.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM, Computation Code
    """

    VALID = [
        Valid(
            """
            class ToyAttention(nn.Module):
                def forward(self, positions, hidden_states):
                    q = self.q_proj(hidden_states)
                    q = q.view(-1, self.num_heads, self.head_dim)
                    return q.view(*q.shape[:-2], -1)
            """
        ),
        Valid(
            """
            class ToyMoE(nn.Module):
                def forward(self, hidden_states):
                    num_tokens, hidden_dim = hidden_states.shape
                    orig_shape = hidden_states.shape
                    return hidden_states.view(-1, hidden_dim).view(orig_shape)
            """
        ),
        Valid(
            """
            class ToyConv(nn.Module):
                def forward(self, x):
                    return x.transpose(1, 2)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class ToyAttention(nn.Module):
                def forward(self, hidden_states):
                    bsz, q_len, _ = hidden_states.size()
                    return self.q_proj(hidden_states).view(bsz, q_len, -1, 4).transpose(1, 2)
            """,
            line=3,
            count=2,
            names="bsz",
        ),
        Invalid(
            """
            class ToyAttention(nn.Module):
                def forward(self, hidden_states):
                    input_shape = hidden_states.shape[:-1]
                    hidden_shape = (*input_shape, -1, self.head_dim)
                    return self.q_proj(hidden_states).view(hidden_shape)
            """,
            line=3,
            names="input_shape",
        ),
        Invalid(
            """
            class ToyForCausalLM(nn.Module):
                def forward(self, hidden_states, index):
                    return self.lm_head(hidden_states[:, index, :])
            """,
            line=3,
            names="hidden_states",
        ),
    ]

    def visit_Assign(self, node: cst.Assign) -> None:
        target, value = node.targets[0].target, node.value
        if self.source.class_of(node) is None:
            return
        text = self.source.code(value)
        if isinstance(target, cst.Tuple) and re.search(
            r"\.shape(\[[^\]]*\])?$|\.size\(\)(\[[^\]]*\])?$", text
        ):
            names = [e.value.value for e in target.elements if isinstance(e.value, cst.Name)]
            if len(names) >= 2 and BATCH.match(names[0]) and SEQUENCE.match(names[1]):
                self.report(
                    node,
                    f"`{names[0]}, {names[1]}` come from {text}: vLLM's tensors have one "
                    "leading dimension, the tokens of all sequences.",
                )
        elif isinstance(target, cst.Name) and re.search(r"\.(shape|size\(\))\[:-1\]$", text):
            function = self.source.function_of(node)
            name = target.value
            if function is not None and f"(*{name}," in self.source.code(function):
                self.report(
                    node,
                    f"`{name}` = {text} carries [batch, sequence] into a view: tokens are flat, "
                    "so write the view as (-1, ...) or drop it.",
                )

    def visit_Call(self, node: cst.Call) -> None:
        function = node.func
        if not (isinstance(function, cst.Attribute) and function.attr.value == "transpose"):
            return
        if [self.source.code(a.value) for a in node.args] not in (["1", "2"], ["2", "1"]):
            return
        facts = self.source.class_of(node)
        if facts is not None and self._is_head(function.value):
            self.report(
                node,
                "`.transpose(1, 2)` swaps [sequence, heads] of one batch row: vLLM's Attention "
                f"takes {self._projection(function.value)} as [num_tokens, heads * head_dim].",
            )

    def visit_Subscript(self, node: cst.Subscript) -> None:
        name = node.value.value if isinstance(node.value, cst.Name) else ""
        if name == "hidden_states" and len(node.slice) == 3 and self.source.function_of(node):
            first = self.source.code(node.slice[0].slice)
            if first.startswith(":"):
                self.report(
                    node,
                    "`hidden_states` is indexed as [batch, sequence, hidden]: it is "
                    "[num_tokens, hidden], and compute_logits gets only the tokens it needs.",
                )

    def _is_head(self, node: cst.CSTNode) -> bool:
        return bool(self._projection(node))

    def _projection(self, node: cst.CSTNode) -> str:
        """Name of the q/k/v tensor or projection that a chain of calls starts from."""
        while isinstance(node, (cst.Call, cst.Attribute)):
            attribute = self_attribute(node)
            if attribute:
                return f"`{attribute}`" if PROJECTION.search(attribute) else ""
            node = node.func if isinstance(node, cst.Call) else node.value
        if isinstance(node, cst.Name) and PROJECTION.search(node.value):
            return f"`{node.value}`"
        return ""
