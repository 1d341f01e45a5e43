"""vLLM finds a plugin by the name of its entry-point group."""

from __future__ import annotations

import re
import tomllib

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import TextRule

GROUP = "vllm.general_plugins"
TOY = PortContext(package="vllm_toy")
RIGHT = """
[project]
name = "vllm-toy"

[project.entry-points."vllm.general_plugins"]
vllm_toy = "vllm_toy:register"
"""


class NameTheEntryPoint(TextRule):
    """Name the entry-point group `vllm.general_plugins`, and the function in it.

    ## What it does
    Reads pyproject.toml: reports a group that is missing, misspelt or without its quotes (a dot
    in a bare key makes two tables), and an entry that does not name a function of the port.

    ## Why vLLM wants it
    vLLM loads what stands under exactly this name. With any other nothing happens: no plugin, no
    message.

    ## Example
        [project.entry-points."vllm.general_plugin"]
        toy = "vllm_toy:register"

    ## Use instead
        [project.entry-points."vllm.general_plugins"]
        toy = "vllm_toy:register"

    ## Fix safety
    Safe: offered for a misspelt or unquoted group. Install the port again afterwards.

    ## References
    - vLLM guide, Registering a model: Out-of-tree models; vllm/plugins/__init__.py
    """

    target = "pyproject"
    fix_safety = "safe"

    VALID = [
        Valid(RIGHT, TOY),
        Valid(
            '[project.entry-points]\n"vllm.general_plugins" = { toy = "vllm_toy:register" }\n', TOY
        ),
        Valid(
            '[project.entry-points."vllm.general_plugins"]\ntoy = "elsewhere.plugin:add_models"\n'
        ),
    ]
    INVALID = [
        Invalid(
            RIGHT.replace("general_plugins", "general_plugin"),
            line=4,
            given=TOY,
            names="vllm.general_plugin",
            fixed=RIGHT,
        ),
        Invalid(
            RIGHT.replace('"vllm.general_plugins"', "vllm.general_plugins"),
            line=4,
            given=TOY,
            names=GROUP,
            fixed=RIGHT,
        ),
        Invalid('[project]\nname = "vllm-toy"\n', line=1, given=TOY, names=GROUP),
        Invalid(
            RIGHT.replace("vllm_toy:register", "vllm_toi:register"),
            line=5,
            given=TOY,
            names="vllm_toi",
        ),
        Invalid(
            RIGHT.replace("vllm_toy:register", "vllm_toy.register"),
            line=5,
            given=TOY,
            names="vllm_toy.register",
        ),
    ]

    def check(self, text: str) -> None:
        try:
            groups = tomllib.loads(text).get("project", {}).get("entry-points", {})
        except tomllib.TOMLDecodeError as error:
            where = re.search(r"line (\d+)", str(error))
            self.report_line(
                int(where[1]) if where else 1, f"pyproject.toml is not valid TOML: {error}."
            )
            return
        group = groups.get(GROUP) if isinstance(groups, dict) else None
        if group is None:
            self._no_group(text)
        for name, value in (group or {}).items():
            self._entry(text, name, str(value))

    def _no_group(self, text: str) -> None:
        for number, line in enumerate(text.splitlines(), 1):
            header = re.match(r"\s*\[project\.entry-points\.(.+?)\]", line)
            if header and "vllm" in header[1]:
                lines = text.splitlines(keepends=True)
                lines[number - 1] = line.replace(header[1], f'"{GROUP}"') + "\n"
                self.report_line(
                    number,
                    f'The group is written {header[1]}: vLLM looks for "{GROUP}", in quotes.',
                    "".join(lines),
                )
                return
        self.report_line(
            1, f'There is no entry-point group "{GROUP}": vLLM never learns of the plugin.'
        )

    def _entry(self, text: str, name: str, value: str) -> None:
        number = next((n for n, line in enumerate(text.splitlines(), 1) if f'"{value}"' in line), 1)
        module, colon, function = value.partition(":")
        if not colon or not function:
            self.report_line(
                number, f'"{value}" of `{name}` names no function: write "module:register".'
            )
        elif self.port.package and module.partition(".")[0] != self.port.package:
            self.report_line(
                number,
                f'"{value}" of `{name}` is not in the port\'s package `{self.port.package}`.',
            )
