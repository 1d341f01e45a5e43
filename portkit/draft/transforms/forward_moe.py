"""Step forward, mixture of experts: flat tokens; the author's routing and experts stay.

The experts' parameters keep Transformers' names and layout in this step: the `portkit` loader
fills them from the checkpoint's. vLLM's fused experts come in step parallel.
"""

from __future__ import annotations

import libcst as cst

from portkit.analysis.moe_facts import MoeFacts
from portkit.draft import edit, prune
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.flat_tokens import flatten, without_training
from portkit.draft.transforms.forward_attention import _layer_index, attention_signature
from portkit.draft.transforms.unread_results import drop_unread_results
from portkit.draft.work import Work, plain_module, rewrite_init, set_method


def port_moe(work: Work, facts: MoeFacts) -> None:
    """Flatten a block, its router and its experts; give the block its prefix."""
    init = edit.method(work.cls(facts.cls), "__init__")
    if init is None or "prefix" in edit.parameters(init):
        return
    drop_unread_results(work, facts.cls)
    cls = work.cls(facts.cls)
    work.put(_rows_stay(_bare(work.cls(facts.experts.cls))))
    router = work.cls(facts.router.cls)
    work.put(_bare(_flat(work, router, facts.router.cls, facts.router.line)))
    cls = _flat(work, cls, facts.cls, facts.line)
    body = [_name_shared(work, facts, s) for s in edit.body_of(init)]
    signature = attention_signature(init).split(", cache_config")[0] + ', prefix: str = ""'
    cls = rewrite_init(cls, signature, body, _layer_index(init, body))
    work.put(plain_module(cls))
    work.did.append(f"{facts.cls}: tokens are flat; router and experts compute as before.")


def _flat(work: Work, cls: cst.ClassDef, name: str, line: int) -> cst.ClassDef:
    forward = edit.method(cls, "forward")
    if forward is None:
        raise Blocker(f"{name} has no forward.", line)
    clean = prune.drop_dropout_calls(prune.inference_only(forward), prune.dropout_attributes(cls))
    clean = edit.with_body(clean, without_training(edit.body_of(clean)))
    return set_method(cls, flatten(clean, name, line))


def _rows_stay(cls: cst.ClassDef) -> cst.ClassDef:
    """Experts without a view back to a batch: n = x.shape[0]; return y.view(n, -1, size)."""
    forward = edit.method(cls, "forward")
    firsts = {f"{p}.shape[0]" for p in edit.parameters(forward)}
    pairs = [(n, p) for n in edit.body_of(forward) if (p := edit.assigned(n))]
    counts = {edit.code(p[0]): n for n, p in pairs if edit.code(p[1]) in firsts}

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        method = here.func if isinstance(here, cst.Call) else None
        if not isinstance(method, cst.Attribute) or method.attr.value not in ("view", "reshape"):
            return None
        given = [edit.code(a.value) for a in here.args]
        back = len(given) == 3 and given[0] in counts and given[1] == "-1"
        return method.value if back else None

    if not counts:
        return cls
    old = edit.body_of(forward)
    body = [edit.replace(n, change) for n in old]
    read = set().union(*(edit.names_read(n) for n in body))
    gone = {id(n) for name, n in counts.items() if name not in read}
    kept = [new for new, before in zip(body, old, strict=True) if id(before) not in gone]
    kept = [n for n in kept if not ((p := edit.assigned(n)) and edit.code(p[0]) == edit.code(p[1]))]
    return set_method(cls, edit.with_body(forward, kept))


def _bare(cls: cst.ClassDef) -> cst.ClassDef:
    """Without decorators that swap the implementation; a linear stays one."""
    bases = cls.bases
    plain = plain_module(cls)
    if any(edit.code(b.value).endswith("Linear") for b in bases):
        return plain.with_changes(bases=bases)
    return plain


def _name_shared(work: Work, facts: MoeFacts, node: edit.Statement) -> edit.Statement:
    """Give the feed-forwards beside the experts their prefix."""

    def line(here: cst.CSTNode) -> cst.CSTNode | None:
        pair = edit.assigned_attribute(here) if isinstance(here, cst.SimpleStatementLine) else None
        if pair is None or not edit.is_call(pair[1], *facts.shared) or not facts.shared:
            return None
        call = pair[1]
        made = edit.method(work.cls(edit.code(call.func)), "__init__")
        if "prefix" not in edit.parameters(made):
            return None
        arguments = [edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for a in call.args]
        new = edit.make_call(edit.code(call.func), *arguments, f'prefix=f"{{prefix}}.{pair[0]}"')
        return edit.replace(
            here,
            lambda n: new if isinstance(n, cst.Call) and edit.code(n) == edit.code(call) else None,
        )

    return edit.replace(node, line)
