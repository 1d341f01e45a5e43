"""The evidence of step `forward` as words and tables, always with both sides' numbers."""

from __future__ import annotations

from typing import Any

from portkit.checks.verdict import Table


def numbers(trace: dict[str, Any]) -> str:
    if trace["kind"] == "never called":
        return "which the port never computes"
    if trace["kind"] == "shape":
        return "has another shape"
    agree = (
        f"positions 0 to {trace['first_ok'] - 1} agree, "
        if trace["first_ok"]
        else "already at position 0, "
    )
    return (
        f"{agree}then it differs by up to {trace['max_abs']:.3g} ({100 * trace['relative']:.2g} "
        f"% of its largest value); "
        f"vLLM {few(trace['ours'])}, Transformers {few(trace['theirs'])}"
    )


def few(values: list[float]) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values) + "]"


def edit(trace: dict[str, Any], causes: tuple[str, ...]) -> str:
    if trace.get("where"):
        return f"Look at {trace['where'].split(': ')[0]} in the port" + (
            f": {causes[0]}" if causes else "."
        )
    return causes[0] if causes else "Compare forward with the original's, line by line."


def top_table(case: dict[str, Any], texts: dict[str, str]) -> Table:
    def cell(pair: list[Any]) -> str:
        text = texts.get(str(pair[0]))
        return f"{pair[0]}" + (f" {text!r}" if text is not None else "") + f"  {pair[1]:.4f}"

    rows = tuple(
        (rank + 1, cell(ours), cell(theirs))
        for rank, (ours, theirs) in enumerate(zip(case["ours"], case["theirs"], strict=True))
    )
    return Table(
        f"Most likely next tokens at position {case['position']} ({case['name']})",
        ("", "vLLM (token, log-probability)", "the other side"),
        rows,
        note=f"Largest difference there: token {case['token']}.",
    )


def walk_table(trace: dict[str, Any]) -> Table:
    roles = {"in": "input", "out": "output", "attn": "attention output"}
    rows = [
        (
            path,
            roles.get(role, role),
            " x ".join(map(str, shape)),
            f"{worst:.1e}",
            f"{relative:.1e}",
            "yes" if ok else "NO",
        )
        for path, role, shape, worst, relative, ok in trace["steps"]
    ]
    if trace["kind"] != "value":
        rows.append(
            (trace["path"], roles.get(trace["role"], trace["role"]), "", trace["kind"], "", "NO")
        )
    return Table(
        "Module by module, in the original's order",
        ("module", "what", "tokens x width", "max |Δ|", "relative", "agrees"),
        tuple(rows),
        note=f"In the port: {trace['where']}" if trace.get("where") else "",
    )


def cases_table(cases: list[dict[str, Any]], note: str = "") -> Table:
    return Table(
        "Comparisons",
        ("what", "positions", "max |Δ log-prob|", "agrees"),
        tuple(
            (c["name"], c["rows"], f"{c['max_abs']:.1e}", "yes" if c["ok"] else "NO") for c in cases
        ),
        note=note,
    )
