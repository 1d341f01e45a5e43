"""Which licence a modeling file is under, and what it asks of whoever copies it.

Recognises the common ones by their own words, in the file's header, else in a licence file beside
it, else in the metadata of the installed package. This is a help for reading, not legal advice; a
licence it does not know is named "custom" and shown, never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*")


@dataclass(frozen=True)
class Licence:
    """A licence and where it was found."""

    spdx: str
    """SPDX id, e.g. "Apache-2.0"; "LicenseRef-custom" for one that is not recognised."""
    found: str
    """Where: "header", a file name, or "metadata of transformers"."""
    terms: tuple[str, ...]
    """What you must do, one duty a line."""
    holders: tuple[str, ...] = ()
    """The copyright lines of the header."""

    @property
    def name(self) -> str:
        return "a custom licence" if self.spdx == CUSTOM else self.spdx

    @property
    def fits_vllm(self) -> bool:
        """Whether vLLM, which is Apache-2.0, can take such code in."""
        return self.spdx in FITS_VLLM


FITS_VLLM = ("Apache-2.0", "MIT", "BSD-3-Clause", "BSD-2-Clause")
CUSTOM = "LicenseRef-custom"
_COPYLEFT = (
    "Whoever gets your port must be given its source under the same licence.",
    "vLLM is Apache-2.0 and would not take this code in; keep the port out of tree.",
    "Keep the copyright notice and the licence text.",
)
TERMS: dict[str, tuple[str, ...]] = {
    "Apache-2.0": (
        "Keep the copyright and licence header at the top of the file.",
        "Say in the file that you changed it.",
        "Ship the licence text with it, and the NOTICE file if the source has one.",
    ),
    "MIT": ("Keep the copyright line and the licence text in every copy.",),
    "BSD-3-Clause": (
        "Keep the copyright line, the conditions and the disclaimer in every copy.",
        "Do not use the authors' names to endorse your work.",
    ),
    "BSD-2-Clause": ("Keep the copyright line, the conditions and the disclaimer in every copy.",),
    "GPL-3.0-or-later": _COPYLEFT,
    "GPL-2.0-or-later": _COPYLEFT,
    "AGPL-3.0-or-later": (*_COPYLEFT, "That holds for users who reach it over a network, too."),
    "LGPL-3.0-or-later": _COPYLEFT,
    "MPL-2.0": ("Keep this file under MPL-2.0 and its source open; other files are free.",),
    "CC-BY-NC-4.0": (
        "No commercial use.",
        "Name the authors and say what you changed.",
        "vLLM is Apache-2.0 and would not take this code in; keep the port out of tree.",
    ),
    CUSTOM: (
        "portkit does not know this licence: read it (it is at the top of the file, or the file "
        "named above) before you copy or publish anything.",
        "vLLM is Apache-2.0; ask the authors before you propose this code there.",
    ),
}
_WORDS: tuple[tuple[str, str], ...] = (
    ("Apache-2.0", r"Apache(-| License,? (Version )?| )2\.0|apache\.org/licenses/LICENSE-2\.0"),
    ("AGPL-3.0-or-later", r"GNU Affero General Public License"),
    ("LGPL-3.0-or-later", r"GNU (Lesser|Library) General Public License"),
    ("GPL-2.0-or-later", r"GNU General Public License.{0,80}version 2"),
    ("GPL-3.0-or-later", r"GNU General Public License"),
    ("MPL-2.0", r"Mozilla Public License"),
    ("CC-BY-NC-4.0", r"CC[- ]BY[- ]NC|Attribution-NonCommercial"),
    ("MIT", r"Permission is hereby granted, free of charge|\bMIT License\b|under the MIT\b|^MIT$"),
    (
        "BSD-3-Clause",
        r"Redistribution and use in source and binary forms.*Neither the name|BSD[ -]3",
    ),
    ("BSD-2-Clause", r"Redistribution and use in source and binary forms|BSD[ -]2"),
    (
        CUSTOM,
        r"COMMUNITY LICENSE|LICENSE AGREEMENT|[Ll]icen[sc]ed under"
        r"|governed by the .{0,60}licen[sc]e|found in the LICEN[SC]E file"
        r"|terms of (the|this) .{0,40}licen[sc]e",
    ),
)


def header_of(source: str) -> str:
    """Return the comment block (and a module docstring) at the top of a file, without the `#`."""
    lines: list[str] = []
    for line in source.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    body = source.split("\n", len(lines))[-1].lstrip() if lines else source.lstrip()
    docstring = re.match(r'[rRuU]?("""|\'\'\')(.*?)\1', body, re.DOTALL)
    return "\n".join(lines) + ("\n" + docstring[2] if docstring else "")


def holders_of(source: str) -> tuple[str, ...]:
    """Return the copyright lines of a file's header."""
    found = re.findall(r"^.*\b(?:Copyright|\(c\)|©).*$", header_of(source), re.MULTILINE | re.I)
    return tuple(line.strip() for line in found if re.search(r"^Copyright|\d{4}", line))


def recognise(text: str, found: str, holders: tuple[str, ...] = ()) -> Licence | None:
    """Return the licence that a header or licence text names, or None if it names none."""
    tag = re.search(r"SPDX-License-Identifier:\s*([\w.+-]+)", text)
    if tag:
        spdx = tag[1]
        return Licence(spdx, found, TERMS.get(spdx, TERMS[CUSTOM]), holders)
    words = " ".join(text.split())
    for spdx, pattern in _WORDS:
        if re.search(pattern, words if spdx != "MIT" else text.strip() + " " + words):
            return Licence(spdx, found, TERMS[spdx], holders)
    return None


def licence_of(source: str, beside: Path | None = None, package: str = "") -> Licence | None:
    """Return the licence of a modeling file, or None if nothing says one.

    Looks in the header, then in licence files in the folder `beside`, then in the metadata of the
    installed `package`.
    """
    holders = holders_of(source)
    licence = recognise(header_of(source), "header", holders)
    if licence is None and beside is not None:
        for path in licence_files(beside):
            text = path.read_text(encoding="utf-8", errors="replace")
            own = tuple(dict.fromkeys((*holders, *_copyright_lines(text))))
            licence = recognise(text, path.name, own) or Licence(
                CUSTOM, path.name, TERMS[CUSTOM], own
            )
            break
    if licence is None and package:
        data = metadata.metadata(package)
        text = data.get("License-Expression") or data.get("License") or ""
        licence = recognise(text, f"metadata of {package}", holders)
    return licence


def _copyright_lines(text: str) -> tuple[str, ...]:
    found = re.findall(r"^\s*(Copyright\b.*\d{4}.*)$", text, re.MULTILINE)
    return tuple(line.strip() for line in found[:5])


def licence_files(folder: Path) -> tuple[Path, ...]:
    """Return the licence and notice files of a folder."""
    paths = [path for kind in LICENCE_FILES for path in folder.glob(kind) if path.is_file()]
    return tuple(sorted(set(paths)))


def package_licence_text(package: str) -> str:
    """Return the text of the licence file that an installed package ships, or ""."""
    for file in metadata.files(package) or ():
        if re.fullmatch(r"LICEN[SC]E(\.\w+)?|COPYING", file.name) and ".dist-info" in str(file):
            path = Path(str(file.locate()))
            if path.is_file():
                return path.read_text(encoding="utf-8")
    return ""
