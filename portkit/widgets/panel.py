"""Buttons for a step: tasks, check, hint, draft, undo; each with the line of code it stands for.

Where no widget can be drawn (a terminal, GitHub, a converted notebook) the same panel is the list
of those lines, as text or HTML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portkit.report.blocks import Fold, Line, Report
from portkit.report.render import text_report

if TYPE_CHECKING:
    from portkit.notebook import Session

ACTIONS: tuple[tuple[str, str, str], ...] = (
    ("Tasks", "tasks()", "what the rules still find"),
    ("Check", "check()", "run the checks in the real vLLM"),
    ("Nudge", 'hint(level="nudge")', "what to look at"),
    ("Pointer", 'hint(level="pointer")', "what vLLM wants"),
    ("Answer", 'hint(level="answer")', "the change, as a diff"),
    ("Draft", "draft()", "a solution for this model; changes nothing"),
    ("Undo", "undo()", "take back the last fix or draft"),
)
"""(button, call on the session, what it does)."""

CALLS: dict[str, tuple[str, dict[str, str]]] = {
    "Tasks": ("tasks", {}),
    "Check": ("check", {}),
    "Draft": ("draft", {}),
    "Undo": ("undo", {}),
    "Nudge": ("hint", {"level": "nudge"}),
    "Pointer": ("hint", {"level": "pointer"}),
    "Answer": ("hint", {"level": "answer"}),
}


class Panel:
    """The buttons of one session."""

    def __init__(self, session: Session, name: str = "step") -> None:
        self.session = session
        self.name = name

    def as_report(self) -> Report:
        """Return the panel without widgets: one line of code for each button."""
        return text_report(
            *(Line(f"`{self.name}.{call}`: {what}", "note") for _, call, what in ACTIONS)
        )

    def press(self, button: str) -> Report:
        """Do what a button does."""
        method, options = CALLS[button]
        return getattr(self.session, method)(**options)

    def widget(self) -> Any:
        """Return the ipywidgets of the panel."""
        import ipywidgets

        output = ipywidgets.Output()
        buttons = []
        for label, call, what in ACTIONS:
            button = ipywidgets.Button(
                description=label,
                tooltip=f"{self.name}.{call}: {what}",
                layout=ipywidgets.Layout(width="auto"),
            )
            button.on_click(lambda pressed, label=label: self._pressed(label, output, buttons))
            buttons.append(button)
        row = ipywidgets.HBox(buttons, layout=ipywidgets.Layout(flex_flow="row wrap"))
        return ipywidgets.VBox([row, output])

    def _pressed(self, label: str, output: Any, buttons: list[Any]) -> None:
        from IPython.display import display

        output.clear_output()
        for button in buttons:
            button.disabled = True
        try:
            with output:
                display(self.press(label))
        finally:
            for button in buttons:
                button.disabled = False

    def __repr__(self) -> str:
        return str(self.as_report())

    def _ipython_display_(self) -> None:
        """Show the buttons and below them what they stand for, which is left without widgets."""
        from IPython.display import display

        try:
            display(self.widget())
        except ImportError:
            display(self.as_report())
        else:
            lines = self.as_report().blocks
            display(Report((Fold("what the buttons stand for", lines),)))
