"""Copied code keeps its authors' notice and licence."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, PortContext, Valid
from portkit.lint.rule import Rule

COPYRIGHT = re.compile(r"copyright|\(c\) \d{4}|©|SPDX-FileCopyrightText", re.I)
LICENCE = re.compile(r"licen[sc]e|SPDX-License-Identifier", re.I)


class KeepLicenceHeader(Rule):
    """Keep the copyright notice and the licence at the top of the file.

    ## What it does
    Reports a modeling file whose leading comments name no copyright holder or no licence, unless
    port.toml says that you took unlicensed code on purpose.

    ## Why vLLM wants it
    The guide asks you to review and adhere to the original code's copyright and licensing terms.
    Apache-2.0 requires that notices are kept; a pull request without them is sent back.

    ## Example
        import torch

    ## Use instead
        # Copyright 2024 The Example Team. All rights reserved.
        # SPDX-License-Identifier: Apache-2.0
        import torch

    ## Fix safety
    None: only you know whose code it is.

    ## References
    - vLLM guide, Basic model: 1. Bring your model code (the warning on licensing)
    """

    VALID = [
        Valid(
            """
            # Copyright 2024 The Example Team.
            # Licensed under the Apache License, Version 2.0
            import torch
            """
        ),
        Valid('"""A model.\n\nCopyright 2024 The Example Team\nLicense: MIT\n"""\nimport torch\n'),
        Valid(""),
        Valid("import torch\n", PortContext(unlicensed=True)),
    ]
    INVALID = [
        Invalid("import torch\n", line=1, names="copyright"),
        Invalid("# Copyright 2024 The Example Team.\nimport torch\n", line=1, names="licence"),
    ]

    def visit_Module(self, node: cst.Module) -> None:
        if not node.body or self.port.unlicensed:
            return
        lines = [line.comment.value for line in node.header if line.comment]
        lines += [line.comment.value for line in node.body[0].leading_lines if line.comment]
        notice = "\n".join(lines) + (node.get_docstring() or "")
        missing = [
            what
            for what, pattern in (("copyright holder", COPYRIGHT), ("licence", LICENCE))
            if not pattern.search(notice)
        ]
        if missing:
            self.report(
                node,
                f"The file's header names no {' and no '.join(missing)}: copy the notice of the "
                "original file to the top, or write one if the code is yours.",
            )
