"""Values of the rule engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from textwrap import dedent
from typing import Any, Literal

FixSafety = Literal["safe", "unsafe", "none"]
Severity = Literal["task", "info"]
RotaryLayout = Literal["half", "interleaved"]


@dataclass(frozen=True)
class PortContext:
    """What a rule may know besides the text it lints; empty where nobody knows.

    Filled from port.toml, config.json and the first version of the modeling file in the port's
    git history (the code as it was copied), never by importing anything.
    """

    architecture: str = ""
    """Class name of the port, e.g. "HeliumForCausalLM"."""
    architectures: tuple[str, ...] = ()
    """What config.json's "architectures" says."""
    package: str = ""
    """Importable name of the plugin, e.g. "vllm_helium"."""
    module: str = ""
    """Dotted name of the modeling file, e.g. "vllm_helium.modeling_helium"."""
    siblings: frozenset[str] = frozenset()
    """Module names beside the modeling file, e.g. {"configuration_helium"}."""
    source_package: str = ""
    """Package the code was copied from, e.g. "transformers.models.helium"."""
    rotary_layout: RotaryLayout | None = None
    """How the copied code rotates; None if unknown or not rotary."""
    original_linears: frozenset[str] = frozenset()
    """Attribute names of the linear layers in the copied code, e.g. {"q_proj", "lm_head"}."""
    unlicensed: bool = False
    """The reader said that this code may be used without a licence (port.toml)."""
    original_ties: bool | None = None
    """Whether the copied code can tie the LM head to the embedding; None if unknown."""


@dataclass(frozen=True)
class Valid:
    """Code a rule must stay silent on (indented as suits the rule's file; it is dedented)."""

    code: str
    given: PortContext = field(default_factory=PortContext)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", _dedented(self.code))


@dataclass(frozen=True)
class Invalid:
    """Code a rule must report."""

    code: str
    line: int
    """Line (1-based) of the first finding."""
    count: int = 1
    fixed: str | None = None
    """The whole text after fixing; None if the rule has no fix for this case."""
    given: PortContext = field(default_factory=PortContext)
    names: str = ""
    """The symbol that the first message must name; empty to accept any name in the line."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", _dedented(self.code))
        if self.fixed is not None:
            object.__setattr__(self, "fixed", _dedented(self.fixed))


@dataclass(frozen=True)
class Finding:
    """A rule at a line: one task for the reader."""

    rule: str
    """Id of the rule, e.g. "use-parallel-linear"."""
    step: str
    message: str
    """What is there and what vLLM wants instead, naming the symbol."""
    path: str
    """The port's file, relative to the port folder."""
    line: int
    column: int
    """0-based, as in Python's own error messages' AST."""
    symbol: str
    """Qualified name of the class or function around it, e.g. "HeliumAttention.forward"."""
    fix: FixSafety = "none"
    severity: Severity = "task"
    """"info" is worth knowing and needs no edit."""
    crashed: bool = False
    """True if the rule itself failed: the message then says how; the file may be fine."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _dedented(code: str) -> str:
    return dedent(code).lstrip("\n")
