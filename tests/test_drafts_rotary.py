"""Drafts of rotary embeddings: get_rope where it computes the same, the author's code where not."""

from drafting import copied, drafted

from portkit.analysis.classes import view_module
from portkit.analysis.rotary_table import rotary_table_of


def forward(model: str) -> str:
    architecture, source = copied(model)
    outcome = drafted(source, architecture, "forward")
    assert outcome.status == "success", outcome.reason
    ((_, text),) = outcome.files
    return text


def test_each_layer_type_has_its_own_parameters() -> None:
    text = forward("olmo3")
    assert "rope_parameters=config.rope_parameters[config.layer_types[layer_idx]]" in text
    assert "layer_idx = extract_layer_index(prefix)" in text
    assert "Olmo3RotaryEmbedding" not in text


def test_a_part_of_the_head_that_is_cut_by_hand() -> None:
    """vLLM's rotary embedding takes the whole head and leaves the rest of it alone."""
    text = forward("phi")
    assert "self.rotary_emb(\n            positions, query_states, key_states" in text or (
        "self.rotary_emb(positions, query_states, key_states)" in text
    )
    assert "query_rot" not in text


def test_a_rotation_of_another_sign_keeps_the_authors_code() -> None:
    text = forward("nanochat")
    assert "get_rope(" not in text
    assert "self.rotate(positions, query_states, key_states)" in text
    assert "cos, sin = self.rotary_emb(query, positions[None])" in text
    assert "dynamic_rope_update" not in text  # frequencies must not change while serving


def test_a_table_of_sines_is_recognised_by_what_it_computes() -> None:
    _, source = copied("gptj")
    module = view_module(source)
    table = rotary_table_of(module, module.classes["GPTJAttention"])
    assert table is not None
    assert (table.layout, table.base, table.dim) == ("neighbours", "10000", "config.rotary_dim")
    other = view_module(source.replace("torch.stack((-x2, x1)", "torch.stack((x2, -x1)"))
    assert rotary_table_of(other, other.classes["GPTJAttention"]) is None


UNTIL_5_18 = """
        inv_freq_expanded = (
            self.inv_freq[None, :, None].expand(position_ids.shape[0], -1, 1).to(x.device)
        )
        position_ids_expanded = position_ids[:, None, :].float()
        device_type = x.device.type if x.device.type != "mps" else "cpu"
        with maybe_autocast(device_type=device_type, enabled=False):
            freqs = (inv_freq_expanded @ position_ids_expanded).transpose(1, 2)
            emb = torch.cat((freqs, freqs), dim=-1)
            cos = emb.cos() * self.attention_scaling
            sin = emb.sin() * self.attention_scaling
"""


def test_angles_inside_a_with_block() -> None:
    """As Transformers wrote it until 5.18, and files of people's own still do."""
    architecture, source = copied("llama")
    start = source.index("        freqs = position_ids[..., None].float() * self.inv_freq")
    end = source.index("        return cos.to(dtype=x.dtype)", start)
    older = source[:start] + UNTIL_5_18.lstrip("\n") + "\n" + source[end:]
    outcome = drafted(older, architecture, "forward")
    assert outcome.status == "success", outcome.reason
    ((_, text),) = outcome.files
    assert "get_rope(" in text and "LlamaRotaryEmbedding" not in text


def test_a_config_may_leave_the_rotation_out() -> None:
    """The attention decides by the condition under which the original makes its rotary class."""
    text = forward("granitemoehybrid")
    assert 'if config.position_embedding_type == "rope"\n            else None' in text
    assert "if self.rotary_emb is not None:" in text
    text = forward("olmo_hybrid")
    assert 'config.rope_parameters.get("rope_theta") is not None' in text
    assert 'and config.layer_types[layer_idx] == "full_attention"\n            else None' in text
