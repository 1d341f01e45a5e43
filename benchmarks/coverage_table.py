"""The coverage rows as one line each, and as the page docs/coverage.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from coverage_rows import CoverageRow

Rows = Mapping[tuple[str, str], CoverageRow]
BAR = 0.75


def one_line(row: CoverageRow) -> str:
    """Return "ARCH port match 2.1e-05 (7 s)" or "ARCH port ✗ TP=2: why (9 s)"."""
    said = f"match {row.reason}" if row.matches else f"✗ {row.where}: {row.reason}"
    return f"{row.name} {row.part} {said} ({row.seconds:.0f} s)"


def document(scope: Mapping[str, str], stores: Sequence[Rows]) -> str:
    """Return the page: totals, then a row per architecture, then where the others ended.

    Of several stores a match counts, wherever it was seen; else the first store's row does.
    """
    best = {
        (name, part): _best([rows.get((name, part)) for rows in stores])
        for name in scope
        for part in ("port", "backend", "native")
    }
    count = {
        part: sum(1 for name in scope if _ok(best[name, part]))
        for part in ("port", "backend", "native")
    }
    together = sum(1 for name in scope if _ok(best[name, "backend"]) or _ok(best[name, "native"]))
    measured = Counter(
        f"{row.date}, {'a GPU' if row.device == 'cuda' else 'a CPU'}: {row.versions}"
        for row in best.values()
        if row
    )
    ends = Counter(
        best[name, "port"].where if best[name, "port"] else "not measured"
        for name in scope
        if not _ok(best[name, "port"])
    )
    lines = [
        "# Coverage",
        "",
        "Every decoder-only architecture of the installed Transformers "
        "(`portkit.architectures.in_scope`), on a tiny hardened random checkpoint of its own: does "
        "what `portkit draft` writes match Transformers in vLLM's engine, in float32, with one "
        "rank and with two, weights read by the port's `load_weights`? "
        "`python benchmarks/coverage.py` measures it; `--write` makes this page.",
        "",
        *(f"- {n} rows on {where}." for where, n in sorted(measured.items())),
        "",
        "| | matching | of | share |",
        "|---|---|---|---|",
        *(
            f"| {title} | {n} | {len(scope)} | {n / len(scope):.0%} |"
            for title, n in (
                ("portkit's drafts", count["port"]),
                ("vLLM's Transformers backend", count["backend"]),
                ("vLLM's native classes", count["native"]),
                ("the backend or a native class", together),
            )
        ),
        "",
        f"The bar is {BAR:.0%} for the drafts, and more than the backend and the native classes "
        "together. Backend and native classes are compared on one rank only.",
        "",
        "Where the drafts that do not match end: "
        + "; ".join(f"{where} {n}" for where, n in ends.most_common())
        + ".",
        "",
        "| architecture | draft | largest difference, or why not | backend | native |",
        "|---|---|---|---|---|",
    ]
    for name in scope:
        port = best[name, "port"]
        said = "not measured" if port is None else port.reason if port.matches else _why(port)
        device = f" ({port.device})" if port and port.matches and port.device != "cpu" else ""
        cells = (
            name,
            ("✓ match" if _ok(port) else "✗") + device,
            said,
            _mark(best[name, "backend"]),
            _mark(best[name, "native"]),
        )
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join([*lines, *_variants(stores)]) + "\n"


def _variants(stores: Sequence[Rows]) -> list[str]:
    """Return the table of drafts on configs that switch what a block computes."""
    rows = {name: row for s in reversed(stores) for (name, _), row in s.items() if row.config}
    if not rows:
        return []
    matching = sum(row.matches for row in rows.values())
    lines = [
        "",
        "## Config variants",
        "",
        "A draft keeps the config's branches that Transformers has. These are other ways through "
        f"them than that of the rows above, each with a checkpoint and a draft of its own: "
        f"{matching} of {len(rows)} match (`--variants`).",
        "",
        "| architecture | config | draft | largest difference, or why not |",
        "|---|---|---|---|",
    ]
    for row in rows.values():
        said = row.reason if row.matches else _why(row)
        mark = "✓ match" if row.matches else "✗"
        cells = (row.architecture, f"`{row.config}`", mark, said)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return lines


def _best(rows: Sequence[CoverageRow | None]) -> CoverageRow | None:
    known = [row for row in rows if row is not None]
    return next((row for row in known if row.matches), known[0] if known else None)


def _ok(row: CoverageRow | None) -> bool:
    return row is not None and row.matches


def _why(row: CoverageRow) -> str:
    reason = row.reason if len(row.reason) < 160 else row.reason[:157] + "…"
    return f"{row.where}: {reason}"


def _mark(row: CoverageRow | None) -> str:
    if row is None:
        return "not measured"
    if row.where == "none":
        return "none"
    return "✓" if row.matches else f"✗ {row.where}"
