"""Step forward, feed-forward: F.silu(x) becomes a module, which step parallel can fuse."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import set_method

_MODULES = {"silu": "nn.SiLU()", "gelu": "nn.GELU()", "relu": "nn.ReLU()"}
_PREFIXES = ("F.", "nn.functional.", "torch.nn.functional.")
_NAME = "act_fn"


def name_activation(cls: cst.ClassDef) -> cst.ClassDef:
    """self.act_fn = nn.SiLU() for the one activation that forward calls as a function."""
    init, forward = edit.method(cls, "__init__"), edit.method(cls, "forward")
    calls = [c for c in edit.find(forward, lambda n: isinstance(n, cst.Call)) if _activation(c)]
    kinds = {_activation(c) for c in calls}
    if len(kinds) != 1 or f"self.{_NAME}" in edit.code(cls):
        return cls
    made = edit.statement(f"self.{_NAME} = {_MODULES[kinds.pop()]}")
    cls = set_method(cls, edit.with_body(init, [*edit.body_of(init), made]))
    new = edit.replace(
        forward,
        lambda n: (
            n.with_changes(func=edit.expression(f"self.{_NAME}"))
            if isinstance(n, cst.Call) and _activation(n)
            else None
        ),
    )
    return set_method(cls, new)


def _activation(call: cst.Call) -> str:
    """Name of the activation that a call of one argument applies; "" if it is none."""
    name = edit.code(call.func)
    short = name.rsplit(".", 1)[-1]
    known = any(name == f"{prefix}{short}" for prefix in _PREFIXES) and short in _MODULES
    return short if known and len(call.args) == 1 else ""
