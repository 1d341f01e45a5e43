"""Each rank has its share of the heads."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule
from portkit.lint.source import argument

SHARED = re.compile(
    r"tp_(world_)?size|tensor_model_parallel_world_size|\bdivide\(|tp_world|\.num_heads\b.*//"
)
SPLITTING = ("QKVParallelLinear", "ColumnParallelLinear", "MergedColumnParallelLinear")
WHOLE = re.compile(r"total_num_heads|config\.(num_attention_heads|n_head|num_heads)\b")


class DivideHeadsByTpSize(Rule):
    """Give `Attention` this rank's heads: the total divided by the TP size.

    ## What it does
    Reports an `Attention` whose head count is the whole model's although its class splits q, k
    and v over ranks (and does not gather them again).

    ## Why vLLM wants it
    A column-parallel projection gives each rank `heads / tp_size` heads. With the total, sizes
    fit at TP=1 only; at TP=2 the split of qkv fails, or reads across q, k and v.

    ## Example
        self.attn = Attention(config.num_attention_heads, self.head_dim, self.scaling)

    ## Use instead
        self.num_heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)

    ## Fix safety
    None: q_size, kv_size and ALiBi slopes depend on it too.

    ## References
    - vLLM guide, Basic model: 3. Implement tensor parallelism and quantization support
    - vllm/model_executor/models/llama.py; vLLM pull request 35932
    """

    VALID = [
        Valid(
            """
            class A(nn.Module):
                def __init__(self, config):
                    tp_size = get_tensor_model_parallel_world_size()
                    self.num_heads = config.num_attention_heads // tp_size
                    self.qkv_proj = QKVParallelLinear(4, 2, config.num_attention_heads)
                    self.attn = Attention(self.num_heads, 2, 1.0)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self, config):
                    self.q_proj = nn.Linear(4, 4)
                    self.attn = Attention(config.num_attention_heads, 2, 1.0)
            """
        ),
        Valid(
            """
            class A(nn.Module):
                def __init__(self, config):
                    self.q_proj = ColumnParallelLinear(4, 4, gather_output=True)
                    self.attn = Attention(config.num_attention_heads, 2, 1.0)
            """
        ),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, config):
                    self.num_heads = config.num_attention_heads
                    self.qkv_proj = QKVParallelLinear(4, 2, self.num_heads)
                    self.attn = Attention(self.num_heads, 2, 1.0)
            """,
            line=5,
            names="self.num_heads",
        ),
        Invalid(
            """
            class A(nn.Module):
                def __init__(self, config):
                    tp_size = get_tensor_model_parallel_world_size()
                    self.total_num_heads = config.num_attention_heads
                    self.qkv_proj = QKVParallelLinear(4, 2, self.total_num_heads)
                    self.attn = Attention(self.total_num_heads, 2, 1.0)
            """,
            line=6,
            names="self.total_num_heads",
        ),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        for facts, layer in self.source.layers:
            if self.source.vllm_name(layer.call.func) != "Attention":
                continue
            splits = any(self._splits(other.call) for other in facts.layers)
            heads = argument(layer.call, 0, "num_heads")
            if not splits or heads is None:
                continue
            text = self.source.code(heads)
            if "//" in text or SHARED.search(text):
                continue
            if not SHARED.search(facts.text) and self._known_whole(facts.text, text):
                why = "and nothing in the class divides it by the TP size"
            elif WHOLE.search(text):
                why = "which counts the heads of all ranks"
            else:
                continue
            self.report(
                layer.call,
                f"`{layer.attribute}` gets `{text}` heads, {why}: each rank has "
                "num_heads // get_tensor_model_parallel_world_size().",
            )

    def _splits(self, call: cst.Call) -> bool:
        """True if a rank goes on with its part of what the layer gives."""
        gathered = argument(call, 99, "gather_output")
        whole = gathered is not None and self.source.code(gathered) == "True"
        return self.source.vllm_name(call.func) in SPLITTING and not whole

    def _known_whole(self, text: str, heads: str) -> bool:
        """True if the head count is visibly the config's or an argument's, not another layer's."""
        made = re.search(rf"{re.escape(heads)}(?:: int)?\s*=\s*(.+)", text)
        return WHOLE.search(heads) is not None or bool(
            made and re.search(r"config\.|num_heads|n_head|num_attention_heads", made[1])
        )
