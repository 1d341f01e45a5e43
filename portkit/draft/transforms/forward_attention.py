"""Step forward, attention: q, k, v -> rotary -> vLLM's Attention -> output projection."""

from __future__ import annotations

import ast

import libcst as cst

from portkit.analysis.attention_parts import norms_of_each_head, origin
from portkit.analysis.classes import ClassView, call_name, text, view_module
from portkit.analysis.read_blocks import attention_call, linears_of
from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.alibi_slopes import BIAS, SLOPES_ARGUMENT, slopes_statements
from portkit.draft.transforms.attention_elementwise import flat_positions
from portkit.draft.transforms.attention_flow import AttentionFlow
from portkit.draft.transforms.attention_values import attention_name
from portkit.draft.transforms.forward_rotary import plan_rotary
from portkit.draft.transforms.fused_qkv import cut_flat
from portkit.draft.transforms.layer_rotation import rotation_of
from portkit.draft.transforms.masked_windows import window_of_masks
from portkit.draft.work import Work, plain_module, rewrite_init, set_method

_NARROW = """
assert {value} <= {dim}, (
    f"value heads of {{{value}}} are wider than key heads of {{{dim}}}"
)
"""


def port_attention(work: Work) -> None:
    """Rewrite the attention class; does nothing if it already holds vLLM's Attention."""
    facts = work.facts.attention
    if facts is None and work.facts.recurrent:
        return
    if facts is None:
        raise Blocker("no attention class was found in the decoder layer.")
    cls = work.cls(facts.cls)
    forward, init = edit.method(cls, "forward"), edit.method(cls, "__init__")
    if forward is None or init is None:
        raise Blocker(f"{facts.cls} has no forward or no __init__.", facts.line)
    makes_attention = any(
        edit.is_call(n, "Attention") for n in edit.find(init, lambda n: isinstance(n, cst.Call))
    )
    takes_positions = "positions" in edit.parameters(forward)
    if makes_attention and takes_positions:
        return
    if makes_attention or takes_positions:
        half = "__init__ makes vLLM's Attention" if makes_attention else "forward takes positions"
        rest = (
            "forward does not take positions" if makes_attention else "__init__ makes no Attention"
        )
        raise Blocker(
            f"{facts.cls} is half ported: {half}, but {rest}.",
            facts.line,
            "Finish or undo that class, then draft again.",
        )
    for name, value in (
        ("query heads", facts.num_heads),
        ("key/value heads", facts.num_kv_heads),
        ("head dimension", facts.head_dim),
    ):
        if not value:
            raise _unknown_size(work, name)
    if facts.latent is not None:
        from portkit.draft.transforms.forward_latent import port_latent_attention

        port_latent_attention(work)
        return
    view = view_module(work.module.code).classes[facts.cls]
    hidden = edit.parameters(forward)[0]
    rotary = work.facts.rotary
    forward, given = cut_flat(work, forward)
    plan = plan_rotary(work)
    by_layer = rotation_of(work)
    flow = AttentionFlow(
        rotates_by_layer=by_layer is not None,
        functions=work.functions(),
        cls=facts.cls,
        linears=set(linears_of(view)),
        norms=_known_norms(work),
        dropouts=prune.dropout_attributes(cls),
        rotary_functions={rotary.function} if rotary else set(),
        rotary_call=plan.call,
        erased=frozenset(f"self.{attr}" for attr in plan.gone),
        head_dim=facts.head_dim,
        source=work.module.code,
        first_line=view.forward.lineno,
        given=given,
        narrow_values=bool(facts.value_dim),
    ).run(forward, hidden)
    signature = edit.function(
        f"def forward(self, positions: torch.Tensor, {hidden}: torch.Tensor)"
        " -> torch.Tensor:\n    pass"
    )
    cls = set_method(cls, edit.with_body(signature, flow.body))
    made: list[edit.Statement] = []
    if flow.rotary_used:
        made += by_layer.apply(plan.init) if by_layer else plan.init
        for method in plan.methods:
            cls = set_method(cls, method)
    keywords = dict(flow.keywords)
    if "sliding_window" not in keywords and (window := window_of_masks(work)):
        keywords["sliding_window"] = edit.expression(window)
        work.did.append(f"{facts.cls}: the window that the masks had goes to vLLM's Attention.")
    made += slopes_statements(keywords, facts.num_heads)
    for number in range(1, flow.calls + 1):
        made.append(_attention(work, view, keywords, attention_name(number)))
    if facts.value_dim:
        made.append(edit.statement(_NARROW.format(value=facts.value_dim, dim=facts.head_dim)))
    if not flow.rotary_used:
        made[0] = edit.blank_before(made[0])
    own = [
        node
        for node in _inference_init(edit.body_of(init))
        if (edit.assigned_attribute(node) or ("",))[0] not in plan.gone
    ]
    body = [*own, *made]
    cls = rewrite_init(cls, attention_signature(init), body, _layer_index(init, body))
    work.put(plain_module(cls))
    for name in flow.of_positions:
        work.put(flat_positions(work.functions()[name]))
    work.did.append(
        f"{facts.cls}: masks, caches, [batch, seq] shapes go; vLLM's Attention keeps the cache."
    )
    if flow.rotary_used and plan.did:
        work.did.append(plan.did)
        work.warnings += [plan.warning] if plan.warning else []


def _unknown_size(work: Work, name: str) -> Blocker:
    """Why the number of heads, or their size, is not known: what makes the queries is no linear."""
    facts = work.facts.attention
    view = view_module(work.module.code).classes[facts.cls]
    call = attention_call(view)
    made = origin(view, call.args[1]) if call is not None and len(call.args) > 1 else None
    linears = tuple(f"self.{attr}(" for attr in linears_of(view))
    if made is None or any(linear in text(made.value) for linear in linears):
        return Blocker(
            f"{facts.cls}: cannot tell the {name} from the projections' sizes.", facts.line
        )
    calls = [n for n in ast.walk(made.value) if isinstance(n, ast.Call)]
    attrs = [i for i in view.assigned for c in calls if call_name(c).startswith(f"self.{i.attr}")]
    cls = f" ({call_name(attrs[0].value)})" if attrs else ""
    return Blocker(
        f"{facts.cls}: its queries come from `{text(made.value)}`{cls}, which is no linear of its "
        "own: no draft for that yet.",
        made.lineno,
        "A person would write that module with vLLM's parallel layers first.",
    )


def _known_norms(work: Work) -> set[str]:
    """Attributes of the attention's norms that work on the last dimension alone."""
    facts = work.facts.attention
    known = {n.name for n in work.facts.norm_classes if n.formula != "unknown"}
    known |= {"nn.LayerNorm", "RMSNorm", "GemmaRMSNorm", "nn.RMSNorm"}
    each = norms_of_each_head(work.module.code, facts)
    return {n.attr for n in (*facts.norms, *facts.output_norms) if n.cls in known} | set(each)


def local_name(view: ClassView, resolved: str) -> str:
    """A local name of `__init__` that stands for this, where it is more than a field."""
    if not resolved.isidentifier() and " " in resolved:
        for name, value in view.local.items():
            if text(view.resolve(value)).replace("self.config.", "config.") == resolved:
                return name
    return resolved


def attention_signature(init: cst.FunctionDef) -> str:
    """self, the author's parameters without layer_idx, then what vLLM's Attention needs."""
    kept = [
        edit.code(p.with_changes(comma=cst.MaybeSentinel.DEFAULT)).strip()
        for p in init.params.params
        if p.name.value not in ("self", "layer_idx")
    ]
    for extra in ("cache_config: CacheConfig | None = None", 'prefix: str = ""'):
        if extra.split(":")[0] not in [k.split(":")[0] for k in kept]:
            kept.append(extra)
    return ", ".join(["self", *kept])


def _layer_index(init: cst.FunctionDef, body: list[edit.Statement]) -> list[edit.Statement]:
    """layer_idx from the prefix, where __init__ reads it."""
    uses = [s for s in body if "layer_idx" in edit.names_read(s)]
    uses = [s for s in uses if (edit.assigned_attribute(s) or ("",))[0] != "layer_idx"]
    return [edit.statement("layer_idx = extract_layer_index(prefix)")] if uses else []


def _inference_init(body: list[edit.Statement]) -> list[edit.Statement]:
    """Without the warning about a missing layer_idx and without `self.layer_idx = layer_idx`."""
    kept = []
    for node in body:
        if isinstance(node, cst.If) and edit.code(node.test) == "layer_idx is None":
            continue
        if (edit.assigned_attribute(node) or ("",))[0] in (
            "layer_idx",
            "is_causal",
            "attention_dropout",
        ):
            continue
        kept.append(node)
    return kept


def _attention(
    work: Work, view, keywords: dict[str, cst.BaseExpression], attr: str
) -> edit.Statement:
    facts = work.facts.attention

    def short(resolved: str) -> str:
        """self.x where the class already names this expression."""
        for item in view.assigned:
            if (
                text(view.resolve(item.value)).replace("self.config.", "config.") == resolved
                and not item.condition
            ):
                return f"self.{item.attr}"
        return local_name(view, resolved)

    def here(node: cst.BaseExpression) -> str:
        return (
            edit.flat(node).replace("self.config.", "config.").replace("(self.config,", "(config,")
        )

    scaling = here(keywords["scaling"]) if "scaling" in keywords else f"{facts.head_dim}**-0.5"
    arguments = [
        short(facts.num_heads),
        facts.head_dim,
        scaling,
        f"num_kv_heads={short(facts.num_kv_heads)}",
        "cache_config=cache_config",
    ]
    if "softcap" in keywords:
        arguments.append(f"logits_soft_cap={here(keywords['softcap'])}")
    if "sliding_window" in keywords:
        arguments.append(f"per_layer_sliding_window={here(keywords['sliding_window'])}")
    if "s_aux" in keywords:
        arguments.append(f"sinks={here(keywords['s_aux'])}")
    if BIAS in keywords:
        arguments.append(SLOPES_ARGUMENT)
    arguments.append(f'prefix=f"{{prefix}}.{attr}"')
    made = edit.statement(f"self.{attr} = Attention(\n    " + ",\n    ".join(arguments) + ",\n)")
    made = edit.comment_before(made, "The prefix names this layer's KV cache: it must be unique.")
    causal = view.get("is_causal")
    if causal is not None and text(causal.value) != "True":
        condition = text(causal.value).replace("self.config", "config")
        made = edit.comment_before(
            made, "PORT: always causal here; in the original only if", condition
        )
        work.warnings.append(
            f"{facts.cls} is causal only if {condition}; vLLM's Attention always is. "
            "Refuse other configs."
        )
    return made
