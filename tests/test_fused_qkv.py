"""Where a fused projection keeps q, k and v: facts of Transformers' own layouts, and drafts."""

import pytest
from drafting import copied, drafted

from portkit.analysis.facts import facts_of

CLASS = """
class A(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.kv_heads = 1 if config.multi_query else self.num_heads
        self.head_dim = config.hidden_size // self.num_heads
        heads = self.num_heads + 2 * self.kv_heads
        self.qkv = nn.Linear(config.hidden_size, heads * self.head_dim)
        self.o = nn.Linear(config.hidden_size, config.hidden_size)

    def cut(self, x):
        b, s, _ = x.shape
        {cut}

    def forward(self, x, mask):
        fused = self.qkv(x)
        q, k, v = self.cut(fused)
        out, _ = attention_interface(self, q, k, v, mask, scaling=self.head_dim**-0.5)
        return self.o(out)


class L(nn.Module):
    def __init__(self, config):
        self.attn = A(config)


class M(nn.Module):
    def __init__(self, config):
        self.layers = nn.ModuleList([L(config) for _ in range(config.num_hidden_layers)])


class F(nn.Module):
    def __init__(self, config):
        self.model = M(config)
"""
BY_HEAD = """x = x.view(b, s, self.num_heads, 3, self.head_dim)
        return [p.transpose(1, 2) for p in x.unbind(3)]"""
LAST_TWO = """x = x.view(b, s, -1, self.head_dim)
        return x[:, :, : -2 * self.kv_heads], x[:, :, -2 * self.kv_heads : -self.kv_heads], \\
            x[:, :, -self.kv_heads :]"""
BLOCKS = """x = x.reshape(x.shape[:-1] + (2, -1))
        q, v, k = torch.split(x, x.shape[-1] // 3, dim=-1)
        return [p.reshape(b, s, -1, self.head_dim).permute(0, 2, 1, 3) for p in (q, k, v)]"""


@pytest.mark.parametrize(
    "cut, multi_query, groups, order, layout",
    [
        (BY_HEAD, False, "heads", "qkv", "heads_seq"),
        (LAST_TWO, True, "1", "qkv", "seq_heads"),
        (BLOCKS, False, "2", "qvk", "heads_seq"),
    ],
)
def test_layout(cut: str, multi_query: bool, groups: str, order: str, layout: str) -> None:
    source = CLASS.replace("{cut}", cut)
    if not multi_query:
        source = source.replace("1 if config.multi_query else ", "")
    fused = facts_of(source, "F").attention.fused
    assert fused is not None
    assert (fused.groups, fused.order, fused.layouts) == (groups, order, (layout,) * 3)
    assert fused.num_heads == "self.num_heads"
    assert (fused.num_kv_heads == "self.kv_heads") == multi_query


def test_a_cut_that_leaves_something_out_is_unknown() -> None:
    wrong = BY_HEAD.replace("x.unbind(3)", "(x[..., 0, :], x[..., 1, :], x[..., 1, :])")
    source = CLASS.replace("{cut}", wrong).replace("1 if config.multi_query else ", "")
    facts = facts_of(source, "F")
    assert facts.attention.fused is None
    assert any(u.about == "attention" and "leave" in u.what for u in facts.unknown)


def test_rows_by_head_are_put_in_order_when_loading() -> None:
    architecture, source = copied("gpt_neox")
    for step in ("forward", "parallel"):
        ((_, source),) = drafted(source, architecture, step).files
    assert "self.query_key_value = QKVParallelLinear(" in source
    assert "for part in fused.chunk(3, dim + 1)" in source
    assert "return AutoWeightsLoader(self).load_weights(in_order())" in source
    # vLLM would give an adapter's rows as they come.
    assert "(nn.Module, SupportsPP)" in source and "# No SupportsLoRA: query_key_value" in source
