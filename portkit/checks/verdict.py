"""Values that a check answers with. No logic of any check lives here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Table:
    """Evidence in rows: rendered as text and as HTML by report/."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a check found out."""

    check: str
    """Id of the check, e.g. "prefill_parity"."""
    step: str
    title: str
    status: Status
    what: str
    """What was found, with the failing value; for a skip, the reason."""
    where: str = ""
    """File:line, module path or tensor name."""
    next: str = ""
    """The edit or command that helps."""
    causes: tuple[str, ...] = ()
    """Likely causes of a failure, most likely first."""
    tables: tuple[Table, ...] = ()
    log: str = ""
    """Tail of the worker's output, where that helps."""
    device: str = ""
    """"cpu" or "cuda", empty if nothing ran."""
    device_reason: str = ""
    seconds: float = 0.0
    judged: bool = True
    """False for a failure before the port's code could run: vLLM missing, a file that does not
    parse. Hints about the code would lead astray then."""

    @property
    def ok(self) -> bool:
        return self.status != "failed"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        tables = tuple(
            Table(
                t["title"],
                tuple(t["columns"]),
                tuple(tuple(r) for r in t["rows"]),
                t.get("note", ""),
            )
            for t in data.get("tables", ())
        )
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        return cls(**{**known, "tables": tables, "causes": tuple(data.get("causes", ()))})
