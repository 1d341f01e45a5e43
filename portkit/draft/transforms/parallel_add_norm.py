"""Step parallel, pre-norm layers: each norm adds the residual itself, in one kernel.

vLLM's RMSNorm takes the residual as a second argument and returns the norm of the sum beside the
sum. A layer then hands hidden states and residual on separately, and what it would add last, the
next layer's first norm adds, or the model's last norm: the same additions, in another place.
Source: vllm/model_executor/models/llama.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import Work, put_class, set_method

FUSED = ("RMSNorm", "GemmaRMSNorm")
RESIDUAL = "residual"


@dataclass(frozen=True)
class _Layer:
    """A pre-norm layer's forward: what stands between its norms and its additions."""

    hidden: str
    first: str
    """Attribute of the norm before the attention."""
    second: str
    attention: list[edit.Statement]
    mlp: list[edit.Statement]
    comments: list[cst.EmptyLine]
    """Above the second half."""


@dataclass(frozen=True)
class Fused:
    """A file whose layers' norms add the residual."""

    module: cst.Module
    layer: str
    """The class that was rewritten, beside the model's."""
    norms: tuple[str, str]


def fuse_add_norm(work: Work) -> None:
    """Rewrite the layers and the model, if every layer is plain pre-norm; else change nothing."""
    found = fused(work.module)
    if found is None:
        return
    work.module = found.module
    work.did.append(
        f"{found.layer}: {' and '.join(found.norms)} add the residual as they norm; "
        "layers hand it on beside the hidden states, and so do pipeline stages."
    )


def fused(module: cst.Module) -> Fused | None:
    """Return the file with fused norms; None if there is no plain pre-norm layer to fuse.

    The model's forward must hand nothing but hidden states from layer to layer, as step parallel
    leaves it, with one class of layer.
    """
    classes = [node for node in module.body if isinstance(node, cst.ClassDef)]
    if any(cls.name.value in FUSED for cls in classes):
        return None
    for model in classes:
        init = edit.method(model, "__init__")
        made = edit.find(init, lambda n: edit.is_call(n, "make_layers")) if init else []
        names = edit.names_read(made[0]) if len(made) == 1 else set()
        layers = [cls for cls in classes if cls.name.value in names]
        layer = _read(layers[0]) if len(layers) == 1 else None
        forward = _model_forward(model) if layer else None
        if layer is None or forward is None:
            continue
        of_layer = edit.method(layers[0], "forward")
        new = put_class(module, set_method(layers[0], _layer_forward(of_layer, layer)))
        new_init = edit.replace(init, _both_tensors)
        new = put_class(new, set_method(set_method(model, new_init), forward))
        return Fused(new, layers[0].name.value, (layer.first, layer.second))
    return None


def _read(cls: cst.ClassDef) -> _Layer | None:
    """Read residual = h; h = norm(h); ...; h = residual + h, twice; None for anything else."""
    forward = edit.method(cls, "forward")
    if forward is None or edit.parameters(forward)[:1] != ["positions"]:
        return None
    names = edit.parameters(forward)
    body = [n for n in edit.body_of(forward) if not edit.is_docstring(n)]
    if len(names) != 2 or not body:
        return None
    hidden = names[1]
    returned = edit.single(body[-1])
    if not isinstance(returned, cst.Return) or edit.code(returned.value) != hidden:
        return None
    halves: list[tuple[str, list[edit.Statement]]] = []
    comments: list[cst.EmptyLine] = []
    rest = body[:-1]
    while rest:
        half = _half(rest, hidden)
        if half is None:
            return None
        comments = [line for line in rest[0].leading_lines if line.comment is not None]
        norm, inner, rest = half
        halves.append((norm, inner))
    if len(halves) != 2 or not all(_fusible(cls, norm) for norm, _ in halves):
        return None
    (first, attention), (second, mlp) = halves
    return _Layer(hidden, first, second, attention, mlp, comments)


def _half(
    body: list[edit.Statement], hidden: str
) -> tuple[str, list[edit.Statement], list[edit.Statement]] | None:
    """Take residual = h; h = self.norm(h); ...; h = residual + h off the front."""
    if len(body) < 3 or _assignment(body[0]) != (RESIDUAL, hidden):
        return None
    pair = edit.assigned(body[1])
    if pair is None or edit.code(pair[0]) != hidden or not isinstance(pair[1], cst.Call):
        return None
    called = edit.code(pair[1].func)
    if not called.startswith("self.") or edit.flat(pair[1]) != f"{called}({hidden})":
        return None
    sums = ((hidden, f"{RESIDUAL} + {hidden}"), (hidden, f"{hidden} + {RESIDUAL}"))
    end = next((i for i in range(2, len(body)) if _assignment(body[i]) in sums), None)
    if end is None or any(RESIDUAL in edit.code(node) for node in body[2:end]):
        return None
    # The last statement must make a tensor of its own: the next norm adds in place.
    made = edit.assigned(body[end - 1])
    if end == 2 or made is None or hidden not in edit.flat(made[0]).split(", "):
        return None
    inner = body[2:end]
    inner[0] = inner[0].with_changes(
        leading_lines=[*body[1].leading_lines, *inner[0].leading_lines]
    )
    return called.removeprefix("self."), inner, body[end + 1 :]


def _assignment(node: edit.Statement) -> tuple[str, str]:
    pair = edit.assigned(node)
    return (edit.flat(pair[0]), edit.flat(pair[1])) if pair else ("", "")


def _fusible(cls: cst.ClassDef, attr: str) -> bool:
    """Whether the attribute is made once, and is a norm of vLLM that adds."""
    made = [
        pair[1]
        for node in edit.find(
            edit.method(cls, "__init__"), lambda n: isinstance(n, cst.SimpleStatementLine)
        )
        if (pair := edit.assigned_attribute(node)) and pair[0] == attr
    ]
    made = [value for value in made if not edit.is_call(value, "PPMissingLayer")]
    return len(made) == 1 and edit.is_call(made[0], *FUSED)


def _layer_forward(old: cst.FunctionDef, layer: _Layer) -> cst.FunctionDef:
    hidden = layer.hidden
    signature = edit.function(f"""
def forward(
    self,
    positions: torch.Tensor,
    {hidden}: torch.Tensor,
    {RESIDUAL}: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    pass
""")
    first, second = edit.statements(f"""
if {RESIDUAL} is None:
    {RESIDUAL} = {hidden}
    {hidden} = self.{layer.first}({hidden})
else:
    # One kernel: {RESIDUAL} = {hidden} + {RESIDUAL}, then the norm of it.
    {hidden}, {RESIDUAL} = self.{layer.first}({hidden}, {RESIDUAL})
{hidden}, {RESIDUAL} = self.{layer.second}({hidden}, {RESIDUAL})
""")
    returned = edit.comment_before(
        edit.statement(f"return {hidden}, {RESIDUAL}"), "The next norm adds them."
    )
    docstring = [node for node in edit.body_of(old) if edit.is_docstring(node)]
    new = edit.with_body(
        signature,
        [
            *docstring,
            first,
            *layer.attention,
            edit.blank_before(second.with_changes(leading_lines=layer.comments)),
            *layer.mlp,
            returned,
        ],
    )
    return new.with_changes(leading_lines=old.leading_lines)


def _model_forward(cls: cst.ClassDef) -> cst.FunctionDef | None:
    """The model's forward, which hands the residual from layer to layer; None if it does more."""
    forward = edit.method(cls, "forward")
    if forward is None:
        return None
    body = edit.body_of(forward)
    stage = next((i for i, n in enumerate(body) if _of_stage(n, "is_first_rank")), None)
    loop = next((i for i, n in enumerate(body) if isinstance(n, cst.For)), None)
    last = next((i for i, n in enumerate(body) if _of_stage(n, "is_last_rank")), None)
    if None in (stage, loop, last) or not (stage + 1 == loop == last - 1 == len(body) - 4):
        return None
    inner = edit.body_of(body[loop])
    call = edit.assigned(inner[0]) if len(inner) == 1 else None
    hidden = edit.code(call[0]) if call else ""
    named = edit.code(body[loop].target)
    norm = _assignment(body[last + 1])[1].removesuffix(f"({hidden})").removeprefix("self.")
    if (
        call is None
        or edit.flat(call[1]) != f"{named}(positions, {hidden})"
        or _assignment(body[last + 1]) != (hidden, f"self.{norm}({hidden})")
        or not _fusible(cls, norm)
        or edit.flat(body[last + 2]) != f"return {hidden}"
    ):
        return None
    first = edit.with_body(
        body[stage], [*edit.body_of(body[stage]), edit.statement(f"{RESIDUAL} = None")]
    )
    other = first.orelse
    received = edit.statement(f'{RESIDUAL} = intermediate_tensors["{RESIDUAL}"]')
    first = first.with_changes(orelse=edit.with_body(other, [*edit.body_of(other), received]))
    step = edit.statement(f"{hidden}, {RESIDUAL} = {named}(positions, {hidden}, {RESIDUAL})")
    handed = edit.statement(
        f'return IntermediateTensors({{"{hidden}": {hidden}, "{RESIDUAL}": {RESIDUAL}}})'
    )
    final = edit.statement(f"{hidden}, _ = self.{norm}({hidden}, {RESIDUAL})")
    return edit.with_body(
        forward,
        [
            *body[:stage],
            first,
            edit.with_body(body[loop], [step.with_changes(leading_lines=inner[0].leading_lines)]),
            edit.with_body(body[last], [handed]),
            final.with_changes(leading_lines=body[last + 1].leading_lines),
            body[last + 2],
        ],
    )


def _of_stage(node: edit.Statement, which: str) -> bool:
    return isinstance(node, cst.If) and which in edit.code(node.test)


def _both_tensors(node: cst.CSTNode) -> cst.CSTNode | None:
    """make_empty_intermediate_tensors_factory(["hidden_states"], n), with the residual."""
    if not edit.is_call(node, "make_empty_intermediate_tensors_factory"):
        return None
    names = node.args[0].value
    if not isinstance(names, cst.List) or len(names.elements) != 1:
        return None
    both = edit.expression(f'[{edit.code(names.elements[0].value)}, "{RESIDUAL}"]')
    return node.with_changes(args=[node.args[0].with_changes(value=both), *node.args[1:]])
