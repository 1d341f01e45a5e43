"""Writes docs/rules.md from the rules themselves: `python -m portkit.lint.document`."""

from __future__ import annotations

import textwrap
from pathlib import Path

from portkit.curriculum import steps
from portkit.lint.registry import all_rules, rules_of
from portkit.lint.rule import HEADINGS, Rule

PATH = Path(__file__).parents[2] / "docs" / "rules.md"

INTRO = """\
# Rules

<!-- Written by `python -m portkit.lint.document`. Edit the rules, not this file. -->

A rule is a static fact about the port's source that a step wants changed or kept. `portkit tasks`
shows what the rules find; `portkit fix` applies the safe fixes, `portkit fix RULE` one rule's fix.
To keep what a rule reports, say why, on the line or above it:

```python
# portkit: ignore[use-parallel-linear] a 16-wide router; splitting it costs more than it saves
```
"""


def render() -> str:
    """Return the whole page."""
    lines = [INTRO, "| rule | step | fix | what |", "|---|---|---|---|"]
    for rule in all_rules():
        lines.append(
            f"| [`{rule.id}`](#{rule.id}) | {rule.step} | {rule.fix_safety} | "
            f"{rule.headings()['']} |"
        )
    for step in steps():
        if rules := rules_of(step.id):
            lines.append(f"\n## Step {step.number}: {step.title}")
            lines += [_section(rule) for rule in rules]
    return "\n".join(lines) + "\n"


def _section(rule: type[Rule]) -> str:
    parts = rule.headings()
    note = " For information: it asks for no edit." if rule.severity == "info" else ""
    body = [f'\n<a id="{rule.id}"></a>\n', f"### {rule.id}\n", parts[""] + note]
    for heading in HEADINGS:
        body.append(f"\n**{heading}.** {_block(parts[heading])}")
    return "\n".join(body)


def _block(text: str) -> str:
    """Indented lines are code; fence them so that they look it."""
    code, rest = [], []
    for line in text.splitlines():
        (code if line.startswith("    ") or (code and not rest and not line) else rest).append(line)
    if not code:
        return text
    language = "toml" if code[0].lstrip().startswith(("[", "toy =")) else "python"
    fenced = f"\n\n```{language}\n{textwrap.dedent(chr(10).join(code)).rstrip()}\n```"
    return fenced + ("\n\n" + "\n".join(rest).strip() if rest else "")


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render())
