"""Mamba and Mamba 2 mixers: which arguments of MambaMixer or MambaMixer2 compute the same.

Both are read from the shapes of their parameters and from forward's full-sequence branch: what the
projection is split into, which part gates, what is normed, how time steps are limited.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from portkit.analysis.classes import ClassView, argument, call_name, text
from portkit.analysis.read_blocks import linears_of
from portkit.analysis.recurrent import RecurrentFacts, Sizes, convolution_of, parameters_of

if TYPE_CHECKING:
    from portkit.analysis.read import Reader

_DECAY = "-torch.exp(self.A_log.float())"
_A = ("A_log", "A")


class _Strange(Exception):
    """The mixer differs from vLLM's layer; the message says how."""


def _parts(view: ClassView, wanted: set[str]) -> dict[str, str]:
    """Check the linears' names; return (in features, bias) texts of the mixer."""
    linears = linears_of(view)
    if set(linears) != wanted:
        raise _Strange(f"its linears are {', '.join(sorted(linears)) or 'none'}")
    conv = convolution_of(view)
    if conv is None or conv[0] != "conv1d":
        raise _Strange("its convolution is not called conv1d")
    if _DECAY not in text(view.forward):
        raise _Strange("A is not -exp(A_log)")
    sizes = Sizes(view)

    def bias(linear) -> str:
        return sizes.resolved(ast.parse(linear.bias, mode="eval").body)

    into, out = linears["in_proj"], linears["out_proj"]
    return {
        "hidden_size": into.in_features,
        "intermediate_size": out.in_features,
        "conv_kernel_size": sizes.resolved(argument(conv[1], 2, "kernel_size")),
        "use_conv_bias": sizes.resolved(argument(conv[1], 7, "bias")) or "True",
        "use_bias": bias(into),
        "_out_bias": bias(out),
    }


def _bias_guard(found: dict[str, str], name: str) -> tuple[tuple[str, str], ...]:
    """vLLM's layer has one setting for the biases of both projections."""
    into, out = found["use_bias"], found.pop("_out_bias")
    if into == out:
        return ()
    if not (into.startswith("config.") and out.startswith("config.")):
        raise _Strange(f"in_proj and out_proj differ in their bias ({into}, {out})")
    return ((f"{into} != {out}", f"{name} has one setting for the biases of in_proj and out_proj"),)


def _activation(sizes: Sizes) -> str:
    for call in sizes.calls:
        if call_name(call).endswith("causal_conv1d_fn"):
            return sizes.resolved(argument(call, 3, "activation"))
    raise _Strange("forward has no causal_conv1d_fn(...) call")


def _norm_eps(sizes: Sizes, attr: str) -> tuple[ast.Call | None, str]:
    """(constructor call, epsilon) of a norm submodule; the call may stand in a conditional."""
    item = sizes.view.get(attr)
    if item is None:
        return None, ""
    for call in (n for n in ast.walk(item.value) if isinstance(n, ast.Call)):
        for keyword in call.keywords:
            if keyword.arg and "eps" in keyword.arg:
                return call, sizes.resolved(keyword.value)
    return None, ""


# ---- Mamba 2 ------------------------------------------------------------------------------------


def read_mamba2(reader: Reader, view: ClassView) -> RecurrentFacts:
    try:
        return _mamba2(reader, view)
    except _Strange as strange:
        why = f"{view.name} is no Mamba 2 of vLLM's kind: {strange}"
        return RecurrentFacts(
            view.name, view.line, "mamba2", "", why=why, start="MambaMixer2 (mamba_mixer2.py)"
        )


def _mamba2(reader: Reader, view: ClassView) -> RecurrentFacts:
    sizes = Sizes(view)
    found = _parts(view, {"in_proj", "out_proj"})
    missing = {"A_log", "D", "dt_bias"} - set(parameters_of(view))
    if missing:
        raise _Strange(f"it has no parameter {sorted(missing)[0]}")
    gate = _check_splits(sizes, found)
    if "dt_softplus=True" not in text(view.forward):
        raise _Strange("the time step has no softplus")
    limits, note = _time_limit(sizes)
    guards = [*_bias_guard(found, "MambaMixer2"), *limits]
    rms, eps, whole, more = _gated_norm(reader, sizes, gate)
    guards += more
    found |= {
        "num_heads": sizes.resolved(_first_size(parameters_of(view)["dt_bias"])),
        "head_dim": _head_dim(sizes),
        "rms_norm_eps": eps,
        "activation": _activation(sizes),
        "use_rms_norm": rms,
    }
    if rms == "True":
        found.pop("use_rms_norm")
    order = (
        "hidden_size", "ssm_state_size", "conv_kernel_size", "intermediate_size", "use_conv_bias",
        "use_bias", "n_groups", "num_heads", "head_dim", "rms_norm_eps", "activation",
        "use_rms_norm",
    )  # fmt: skip
    arguments = tuple((name, found[name]) for name in order if found.get(name))
    scale, vector = _scales(reader, sizes)
    return RecurrentFacts(
        view.name, view.line, "mamba2", "MambaMixer2", arguments, renames=(_A,),
        guards=tuple(guards), whole_norm=whole, in_scale=scale, channel_scale=vector, note=note,
    )  # fmt: skip


def _check_splits(sizes: Sizes, found: dict[str, str]) -> str:
    """The projection is gate | x, B, C | dt, and x | B | C after the convolution."""
    splits = [s for s in sizes.splits() if len(s[0]) == 3]
    if len(splits) < 2:
        raise _Strange("its projection is not split into gate, convolved part and time step")
    (names, first), (_, second) = splits[0], splits[1]
    inner = found["intermediate_size"]
    if sizes.resolved(first[0]) != inner or sizes.resolved(second[0]) != inner:
        raise _Strange("gate and convolved part do not come in the order gate, x, B, C, dt")
    groups = second[1]
    if text(groups) != text(second[2]):
        raise _Strange("B and C differ in size")
    product = groups
    if isinstance(groups, ast.Attribute):  # a name for the product
        item = sizes.view.get(groups.attr)
        product = item.value if item else groups
    if not (isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult)):
        raise _Strange("B is not groups * states wide")
    left, right = product.left, product.right
    if "group" not in text(left):
        left, right = right, left
    if "group" not in text(left) or "state" not in text(right):
        raise _Strange("cannot tell groups from states in the size of B")
    found["n_groups"], found["ssm_state_size"] = sizes.resolved(left), sizes.resolved(right)
    return names[0]


def _first_size(parameter: ast.Call) -> ast.expr | None:
    """The n of nn.Parameter(torch.empty(n)), torch.ones(n), ..."""
    made = parameter.args[0] if parameter.args else None
    return made.args[0] if isinstance(made, ast.Call) and made.args else None


def _head_dim(sizes: Sizes) -> str:
    """The last size of the view of x that the scan takes."""
    for call in sizes.calls:
        if call_name(call).endswith("chunk_scan") and call.args:
            first = call.args[0]
            if isinstance(first, ast.Call) and call_name(first).endswith((".view", ".reshape")):
                return sizes.resolved(first.args[-1])
    raise _Strange("forward has no chunk_scan(x.view(..., heads, head_dim), ...) call")


def _time_limit(sizes: Sizes) -> tuple[list[tuple[str, str]], str]:
    """(guards, note): vLLM's kernels do not clamp the time step.

    A lower limit that the original has for prompts alone is none while it decodes: there, too, it
    goes by the time step as it is, and so does the port.
    """
    for call in sizes.calls:
        for keyword in call.keywords:
            if keyword.arg == "dt_limit":
                limit = sizes.resolved(keyword.value)
                wanted = "(0.0, float('inf'))"
                if limit == wanted:
                    return [], ""
                lower = re.fullmatch(r"\((config\.\w+), float\('inf'\)\)", limit)
                if lower is not None and _decodes_unlimited(sizes):
                    guard = f"{lower[1]} > 0.01", "MambaMixer2 does not limit time steps from below"
                    return [guard], (
                        f"{sizes.view.name} limits time steps to at least {lower[1]} over prompts, "
                        "not while decoding; MambaMixer2 limits them nowhere."
                    )
                value = f"tuple({limit})" if limit.startswith("config.") else limit
                guard = (
                    f'{value} != (0.0, float("inf"))', "MambaMixer2 does not clamp time steps"
                )  # fmt: skip
                return [guard], ""
    return [], ""


def _decodes_unlimited(sizes: Sizes) -> bool:
    """Does the step of one token take no limit, while a limit is only given by this name?"""
    steps = [c for c in sizes.calls if call_name(c).endswith("state_update")]
    return bool(steps) and not any(
        k.arg == "dt_limit" or "limit" in text(k.value) for c in steps for k in c.keywords
    )


def _gated_norm(
    reader: Reader, sizes: Sizes, gate: str
) -> tuple[str, str, str, list[tuple[str, str]]]:
    """(use_rms_norm, eps, eps if over all channels, guards) of the norm after the scan."""
    name = next(
        (
            call_name(c).removeprefix("self.")
            for c in sizes.calls
            if call_name(c).startswith("self.") and len(c.args) == 2 and text(c.args[1]) == gate
        ),
        "",
    )
    if name != "norm":
        raise _Strange("there is no gated norm(x, gate) after the scan")
    made, eps = _norm_eps(sizes, name)
    item = sizes.view.get(name)
    if made is None or not eps or item is None:
        raise _Strange("the epsilon of its norm is not given")
    cls = reader.module.classes.get(call_name(made))
    if cls is None or cls.forward is None:
        raise _Strange(f"{call_name(made)} is not in the file")
    written = text(cls.forward)
    guards = []
    given = {k.arg: k.value for k in made.keywords if k.arg}
    before, after = written.find("silu(gate"), written.find(".pow(2)")
    if before < 0 or after < 0:
        raise _Strange(f"{cls.name} is not rms(x * silu(gate))")
    if "norm_before_gate" in given:
        condition = sizes.resolved(given["norm_before_gate"])
        if condition != "False":
            guards.append((condition, "MambaMixer2 gates before it norms"))
    elif before > after:
        raise _Strange(f"{cls.name} gates after it norms; MambaMixer2 does it before")
    use = "True"
    if isinstance(item.value, ast.IfExp):
        use = sizes.resolved(item.value.test)
        guards = [(f"{use} and {c}", m) for c, m in guards]
    grouped = [n for n in given if n in ("group_size", "n_groups")]
    if not grouped:
        return use, eps, eps, guards
    size = sizes.resolved(given[grouped[0]])
    groups = [t for t in (size, size.rsplit("// ", 1)[-1]) if t]
    if not any("group" in t for t in groups):
        raise _Strange(f"{cls.name} norms groups of {size}, which are not the scan's")
    return use, eps, "", guards


def _scales(reader: Reader, sizes: Sizes) -> tuple[str, tuple[str, str] | None]:
    """Factors on the input before in_proj (one number) and on what in_proj returns (a vector)."""
    forward = sizes.view.forward
    hidden = forward.args.args[1].arg
    scale, vector = "", None
    for node in ast.walk(forward):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp)):
            continue
        value, target = node.value, text(node.targets[0])
        if not isinstance(value.op, ast.Mult) or text(value.left) != target:
            continue
        if target == hidden and text(value.right).startswith("self."):
            scale = sizes.resolved(value.right)
        elif text(value.right).startswith("self."):
            name = text(value.right).removeprefix("self.")
            vector = (name, _registered_outside(reader, name))
    return scale, vector


def _registered_outside(reader: Reader, name: str) -> str:
    """Value of a buffer that another class registers on its mixers: `f(config)`."""
    for view in reader.module.classes.values():
        for call in (n for n in ast.walk(view.init or view.node) if isinstance(n, ast.Call)):
            registers = call_name(call).endswith(".register_buffer") and len(call.args) >= 2
            if registers and text(call.args[0]) == repr(name) and "self." not in call_name(call):
                value = call.args[1]
                if call_name(value).endswith(".clone"):
                    value = value.func.value
                found = view.local.get(text(value), value)
                if text(found).endswith("(config)"):
                    return text(found)
    raise _Strange(
        f"it multiplies its projection by self.{name}, which is not made from the config"
    )


# ---- Mamba --------------------------------------------------------------------------------------


def read_mamba(reader: Reader, view: ClassView) -> RecurrentFacts:
    try:
        return _mamba(reader, view)
    except _Strange as strange:
        why = f"{view.name} is no Mamba of vLLM's kind: {strange}"
        return RecurrentFacts(
            view.name, view.line, "mamba", "", why=why, start="MambaMixer (mamba_mixer.py)"
        )


def _mamba(reader: Reader, view: ClassView) -> RecurrentFacts:
    sizes = Sizes(view)
    if "x_proj_weight" in parameters_of(view):
        raise _Strange(
            "each of its heads has x_proj and dt_proj of its own (x_proj_weight), and MambaMixer "
            "has one of each"
        )
    found = _parts(view, {"in_proj", "x_proj", "dt_proj", "out_proj"})
    if "D" not in parameters_of(view):
        raise _Strange("it has no parameter D")
    splits = [s for s in sizes.splits() if len(s[0]) == 3]
    if not splits or text(splits[-1][1][1]) != text(splits[-1][1][2]):
        raise _Strange("x_proj is not split into time step, B and C")
    names, parts = splits[-1]
    if "delta_softplus=True" not in text(view.forward):
        raise _Strange("the time step has no softplus")
    _check_gate(sizes)
    if linears_of(view)["x_proj"].bias != "False":
        raise _Strange("x_proj has a bias")
    if linears_of(view)["dt_proj"].bias != "True":
        raise _Strange("dt_proj has no bias")
    found["time_step_rank"] = sizes.resolved(parts[0])
    found["ssm_state_size"] = sizes.resolved(parts[1])
    guards = _bias_guard(found, "MambaMixer")
    norms = _inner_norms(reader, sizes, names)
    found["use_rms_norm"] = str(bool(norms))
    renames = [_A]
    if norms:
        weights = {reader.norm_formula(call_name(made)) for _, made, _ in norms}
        if weights == {"rms_no_weight"}:
            found["rms_norm_has_weight"] = "False"
        elif not weights <= {"rms", "rms_fp32_weight"}:
            raise _Strange("its inner norms are no RMSNorm")
        epsilons = {eps for *_, eps in norms}
        if len(epsilons) != 1:
            raise _Strange("its inner norms differ in epsilon")
        found["rms_norm_eps"] = epsilons.pop()
        theirs = ("dt_layernorm", "b_layernorm", "c_layernorm")
        renames += [(a, b) for (a, *_), b in zip(norms, theirs, strict=True) if a != b]
    found["activation"] = _activation(sizes)
    order = (
        "hidden_size", "ssm_state_size", "conv_kernel_size", "intermediate_size", "time_step_rank",
        "use_conv_bias", "use_bias", "use_rms_norm", "rms_norm_has_weight", "rms_norm_eps",
        "activation",
    )  # fmt: skip
    arguments = tuple((name, found[name]) for name in order if found.get(name))
    return RecurrentFacts(
        view.name, view.line, "mamba", "MambaMixer", arguments, renames=tuple(renames),
        guards=guards,
    )  # fmt: skip


def _check_gate(sizes: Sizes) -> None:
    """x first, gate second: `x, gate = projected.chunk(2, dim=1)`, and z=gate in the scan."""
    for node in ast.walk(sizes.view.forward):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            if not text(node.value).endswith(".chunk(2, dim=1)"):
                continue
            gate = text(node.targets[0].elts[1])
            if f"z={gate}" in text(sizes.view.forward):
                return
    raise _Strange("in_proj is not x, then gate")


def _inner_norms(reader: Reader, sizes: Sizes, names: list[str]) -> list[tuple[str, ast.Call, str]]:
    """(attr, constructor, eps) of the norms on time step, B and C; none, or all three."""
    found = []
    for name in names:
        for node in ast.walk(sizes.view.forward):
            if isinstance(node, ast.Assign) and text(node.targets[0]) == name:
                attr = call_name(node.value).removeprefix("self.")
                made, eps = _norm_eps(sizes, attr)
                if made is not None and text(node.value.args[0]) == name:
                    found.append((attr, made, eps))
    if found and len(found) != 3:
        raise _Strange("it norms only some of time step, B and C")
    return found
