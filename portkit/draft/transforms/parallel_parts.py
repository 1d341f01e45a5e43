"""Step parallel, attention: what belongs to single heads goes where its heads go.

Gates become column-parallel, parameters and norm weights with an entry for each head are made for
this rank's heads, and a weight_loader takes them from the checkpoint's tensor.
"""

from __future__ import annotations

import ast

import libcst as cst

from portkit.analysis.attention_parts import norms_of_each_head
from portkit.analysis.classes import ClassView, call_name, text, view_module
from portkit.analysis.facts import AttentionFacts, Linear
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.transforms.constructors import add_parameter, linear_statement
from portkit.draft.work import Work, set_method

_LOAD_OWN_HEADS = '''
def load_own_heads(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """Take this rank's heads; `param.head_copies` ranks in a row hold the same ones."""
    rank = get_tensor_model_parallel_rank() // getattr(param, "head_copies", 1)
    start = rank * param.shape[0]
    default_weight_loader(param, loaded_weight[start : start + param.shape[0]])
'''
_RANK = "get_tensor_model_parallel_rank()"


def head_parameters(facts: AttentionFacts, view: ClassView) -> dict[str, bool]:
    """Parameters of the attention with one entry for each head; True for key/value heads."""
    heads, kv_heads = (_resolved(view, e) for e in (facts.num_heads, facts.num_kv_heads))
    found: dict[str, bool] = {}
    for item in view.assigned:
        size = _parameter_size(view, item.value)
        if size in (heads, kv_heads):
            found[item.attr] = size == kv_heads and size != heads
    return found


def whole_parameters(facts: AttentionFacts, view: ClassView) -> set[str]:
    """Parameters that every rank holds whole.

    As wide as one head: the same for all heads. Or as wide as the output and used behind it only,
    where all ranks have the sum.
    """
    dim = _resolved(view, facts.head_dim)
    width = _resolved(view, facts.o.out_features) if facts.o is not None else ""
    found = {i.attr: _parameter_size(view, i.value) for i in view.assigned}
    return {
        attr
        for attr, size in found.items()
        if size in (dim, f"({dim},)")
        or (size and size in (width, f"({width},)") and _behind_output(facts, view, attr))
    }


def _behind_output(facts: AttentionFacts, view: ClassView, attr: str) -> bool:
    """Whether forward reads the attribute only after the output projection."""
    body = view.forward.body
    calls = [
        n
        for n, s in enumerate(body)
        if any(call_name(c) == f"self.{facts.o.attr}" for c in ast.walk(s))
    ]
    reads = [n for n, s in enumerate(body) if f"self.{attr}" in text(s)]
    return len(calls) == 1 and all(n > calls[0] for n in reads)


def _parameter_size(view: ClassView, value: ast.expr) -> str:
    """The size in nn.Parameter(torch.empty(size)), also where a condition leaves it None."""
    if isinstance(value, ast.IfExp):
        value = value.body
    if not (isinstance(value, ast.Call) and call_name(value).endswith("Parameter") and value.args):
        return ""
    made = value.args[0]
    if not isinstance(made, ast.Call):
        return ""
    size = next((k.value for k in made.keywords if k.arg == "size"), None)
    if size is None and made.args:
        size = made.args[0]
    return "" if size is None else _resolved(view, text(size))


def _resolved(view: ClassView, expression: str) -> str:
    if not expression:
        return ""
    found = view.resolve(ast.parse(expression, mode="eval").body)
    return text(found).replace("self.config.", "config.")


# ---- gates --------------------------------------------------------------------------------------


def gate_statement(node: edit.Statement, gate: Linear, facts: AttentionFacts, view: ClassView):
    """The gate as wide as this rank's heads, or whole if it is one number for all of them."""
    heads, dim = _resolved(view, facts.num_heads), _resolved(view, facts.head_dim)
    widths = {heads, f"{heads} * {dim}", f"{dim} * {heads}"}
    reads = (facts.qkv or facts.q).in_features
    size = ast.parse(gate.out_features, mode="eval").body
    sizes = [size.body, size.orelse] if isinstance(size, ast.IfExp) else [size]
    if gate.in_features == reads and all(text(s) in widths for s in sizes):
        return linear_statement(node, "ColumnParallelLinear")
    if gate.in_features == reads and gate.out_features == "1":
        return linear_statement(node, "ReplicatedLinear")
    raise Blocker(
        f"{facts.cls}.{gate.attr} is {gate.out_features} wide and reads {gate.in_features}: "
        "it cannot be divided as the heads are.",
        gate.line,
    )


# ---- weights of single heads --------------------------------------------------------------------


def own_parts(
    work: Work, facts: AttentionFacts, view: ClassView, body: list[edit.Statement]
) -> list[edit.Statement]:
    """Norm weights and parameters that have an entry for each head, made for this rank's heads."""
    parameters = head_parameters(facts, view)
    by_head = {n.attr for n in facts.norms if n.size.startswith("(")}
    heads = {"self.total_num_heads", _resolved(view, facts.num_heads)}
    kv_heads = {"self.total_num_kv_heads", _resolved(view, facts.num_kv_heads)}

    def is_kv(value: cst.BaseExpression) -> bool:
        shown = {edit.code(n) for n in edit.find(value, lambda n: isinstance(n, cst.Attribute))}
        return bool(shown & kv_heads) and not shown & heads

    def visit(node: edit.Statement) -> list[edit.Statement]:
        if isinstance(node, cst.If):
            return [edit.with_body(node, [s for n in edit.body_of(node) for s in visit(n)])]
        attr, value = edit.assigned_attribute(node) or ("", None)
        if attr not in by_head and attr not in parameters:
            return [node]
        kv = parameters.get(attr, False) or is_kv(value)
        own = "self.num_kv_heads" if kv else "self.num_heads"
        made = edit.replace(
            node, lambda n: _renamed(n, kv_heads if kv else heads, own, facts, view)
        )
        attrs = '"weight_loader": load_own_heads'
        if kv:
            attrs += ', "head_copies": self.num_kv_head_copies'
        written = (
            [f"self.{attr}"]
            if attr in parameters
            else [f"self.{attr}.{p}" for p in _weights(work, facts, attr)]
        )
        lines = [f"set_weight_attrs({w}, {{{attrs}}})" for w in written]
        if isinstance(value, cst.IfExp):
            lines = [f"if self.{attr} is not None:\n    {line}" for line in lines]
        return [made, *(edit.statement(line) for line in lines)]

    made = [s for n in body for s in visit(n)]
    _in_order(facts, made, {*parameters, *by_head})
    if any("load_own_heads" in edit.code(n) for n in made):
        place_helper(work, facts.cls, "load_own_heads", _LOAD_OWN_HEADS)
        work.did.append(
            f"{facts.cls}: {', '.join(sorted({*parameters, *by_head}))} have weights for each "
            "head: each rank makes and loads those of its own."
        )
    return made


def norms_of_own_heads(
    work: Work, facts: AttentionFacts, view: ClassView, body: list[edit.Statement]
) -> list[edit.Statement]:
    """Where each head has a norm module, every rank has all of them and applies its heads'."""
    each = norms_of_each_head(work.module.code, facts)
    kv = _resolved(view, facts.num_kv_heads)
    heads = _resolved(view, facts.num_heads)

    def change(here: cst.CSTNode) -> cst.CSTNode | None:
        if not edit.is_call(here, *each.values()):
            return None
        given = [edit.flat(a.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for a in here.args]
        of_kv = heads != kv and any(g in ("self.total_num_kv_heads", kv) for g in given)
        first = f"{_RANK} // self.num_kv_head_copies * self.num_kv_heads"
        first = first if of_kv else f"{_RANK} * self.num_heads"
        return edit.make_call(edit.code(here.func), *given, f"first_head={first}")

    if not each:
        return body
    for name in dict.fromkeys(each.values()):
        cls = work.cls(name)
        init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
        item = next(
            a
            for s in edit.body_of(init)
            if (a := edit.assigned_attribute(s)) and edit.is_call(a[1], "nn.ModuleList")
        )
        x = edit.parameters(forward)[0]
        own = f"islice(self.{item[0]}, self.first_head, None)"
        init = edit.with_body(
            init, [*edit.body_of(init), edit.statement("self.first_head = first_head")]
        )
        init = add_parameter(init, "first_head: int = 0")
        forward = edit.replace_text(forward, f"self.{item[0]}", own)
        work.put(set_method(set_method(cls, init), forward))
        work.did.append(
            f"{name}: has the norms of all heads on every rank, and applies those of {x}'s heads."
        )
    return [edit.replace(n, change) for n in body]


def _renamed(here: cst.CSTNode, names: set[str], own: str, facts, view) -> cst.CSTNode | None:
    if isinstance(here, cst.Attribute) and edit.code(here) in names:
        return edit.expression(own)
    if isinstance(here, cst.Name) and _resolved(view, here.value) in names:
        return edit.expression(own)
    return None


def _weights(work: Work, facts: AttentionFacts, attr: str) -> list[str]:
    """Parameters of the class of a norm that has weights for each head."""
    norm = next(n for n in facts.norms if n.attr == attr)
    cls = view_module(work.module.code).classes.get(norm.cls)
    found = (
        [i.attr for i in cls.assigned if call_name(i.value).endswith("Parameter")] if cls else []
    )
    if not found:
        raise Blocker(
            f"{facts.cls}.{attr} ({norm.cls}) has weights for each head that portkit cannot find.",
            norm.line,
        )
    return found


def _in_order(facts: AttentionFacts, body: list[edit.Statement], attrs: set[str]) -> None:
    """Stop if a weight of single heads is made before the head counts of this rank are known."""
    known = False
    for node in body:
        known = known or (edit.assigned_attribute(node) or ("",))[0] == "kv_size"
        made = {n for n in attrs if f"self.{n} =" in edit.code(node)}
        if made and not known:
            raise Blocker(
                f"{facts.cls} makes {sorted(made)[0]} before its projections.", facts.line
            )


def place_helper(work: Work, before: str, name: str, source: str) -> None:
    """Put a function in front of a class, unless the file has it."""
    body = list(work.module.body)
    if any(isinstance(n, cst.FunctionDef) and n.name.value == name for n in body):
        return
    at = next(
        i for i, n in enumerate(body) if isinstance(n, cst.ClassDef) and n.name.value == before
    )
    lines = [cst.EmptyLine(indent=False), cst.EmptyLine(indent=False)]
    body.insert(at, edit.function(source).with_changes(leading_lines=lines))
    work.module = work.module.with_changes(body=body)
