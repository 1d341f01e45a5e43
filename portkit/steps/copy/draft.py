"""Draft of step 1: the modeling code brought into the port, standing alone.

From the installed Transformers, or from the reader's own file that `portkit new --source` put into
the port's `original/`. The code itself is not changed: what the class does not reach goes, imports
become absolute, decorators that only write documentation go, header and licence stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from portkit.architectures import find_architecture, transformers_version
from portkit.draft.outcome import DraftOutcome
from portkit.errors import PortkitError
from portkit.port import Port
from portkit.steps.copy.extract import Extracted, extract
from portkit.steps.copy.licence import (
    Licence,
    header_of,
    licence_files,
    licence_of,
    package_licence_text,
    recognise,
)
from portkit.steps.copy.places import BesideFile, InTransformers, siblings_of

STEP = "copy"


@dataclass(frozen=True)
class Original:
    """The file that the port starts from."""

    path: Path
    text: str
    kind: str
    """"transformers" or "file"."""
    package: str
    """"transformers", or "" for the reader's own file."""
    version: str
    module: str
    file: str
    """The path to name: inside the package, or where the reader had it."""

    @property
    def sha256(self) -> str:
        return sha256(self.path.read_bytes()).hexdigest()

    @property
    def title(self) -> str:
        return f"{self.package} {self.version}, {self.file}" if self.package else self.file


def original_of(port: Port) -> Original:
    """Return the file that this port starts from; PortkitError if it is gone."""
    source = port.meta.get("source", {})
    if source.get("kind") == "file":
        path = port.root / "original" / str(source.get("original", ""))
        if not path.is_file():
            raise PortkitError(
                f"The original {path.name} is gone from the port.",
                str(path),
                "`git checkout original` in the port brings it back.",
            )
        text = path.read_bytes().decode(errors="replace")
        return Original(path, text, "file", "", "", "", str(source.get("file", path.name)))
    found = find_architecture(port.architecture)
    return Original(
        found.file,
        found.file.read_text(encoding="utf-8"),
        "transformers",
        "transformers",
        transformers_version(),
        found.module,
        found.module.replace(".", "/") + ".py",
    )


def licence_of_original(original: Original) -> Licence | None:
    """Return the licence of the code to copy, or None if nothing names one."""
    beside = original.path.parent if original.kind == "file" else None
    return licence_of(original.text, beside, original.package)


def draft(port: Port) -> DraftOutcome:
    """Return the port's files with the modeling code in them; nothing is written."""
    try:
        original = original_of(port)
        licence = licence_of_original(original)
        if licence is None and not port.meta["source"].get("accept_unlicensed"):
            return DraftOutcome(STEP, "failed", reason=unlicensed(original.title))
        return _draft(port, original, licence)
    except PortkitError as error:
        return DraftOutcome(STEP, "failed", reason=str(error))


def unlicensed(title: str) -> str:
    """Say what code without a licence means and what lifts the refusal."""
    return (
        f"{title} says no licence, so nobody but its authors may copy it. If you are its author or "
        "have their permission, say so: `portkit new ... --accept-unlicensed`, or set "
        "accept_unlicensed = true under [source] in port.toml."
    )


def _draft(port: Port, original: Original, licence: Licence | None) -> DraftOutcome:
    package = port.root / port.package
    files: dict[Path, str] = {}
    if original.kind == "file":
        siblings = siblings_of(original.path)
        place: BesideFile | InTransformers = BesideFile(original.path, original.path.name)
        taken = extract(original.text, port.architecture, original.path.name, place)
        for path in siblings:
            files[package / path.name] = path.read_text(encoding="utf-8")
    else:
        siblings = ()
        place = InTransformers(original.module)
        taken = extract(original.text, port.architecture, original.path.name, place)
    files[port.modeling] = f"{_header(original, licence, port.architecture)}\n{taken.code}"
    files |= _licence_texts(port, original)
    source = port.meta_with(
        "source",
        kind=original.kind,
        package=original.package,
        version=original.version,
        module=original.module,
        file=original.file,
        sha256=original.sha256,
        licence=licence.spdx if licence else "none",
        licence_found=licence.found if licence else "",
        copyright=list(licence.holders) if licence else [],
    )
    files[port.root / "port.toml"] = source
    return DraftOutcome(
        STEP,
        "success",
        tuple((path.relative_to(port.root).as_posix(), text) for path, text in files.items()),
        _did(original, taken, licence, siblings, port),
        _warnings(port, taken, licence),
    )


def _header(original: Original, licence: Licence | None, architecture: str) -> str:
    """Return the file's own header without the generator's banner, and where it comes from."""
    lines: list[str] = []
    banner = False
    for line in original.text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if "🚨" in line:
            banner = not banner
        elif not banner:
            lines.append(line)
    if not recognise("\n".join(lines), "header"):
        lines = _modular_header(original) or [
            *lines,
            *([f"# SPDX-License-Identifier: {licence.spdx}"] if licence else []),
        ]
    while lines and not lines[-1].strip("# "):
        lines.pop()
    return "\n".join(
        [
            *lines,
            "#" if lines else "",
            f"# From {original.title}",
            f"# (sha256 {original.sha256[:16]}…): what {architecture} reaches. Changed for vLLM.",
        ]
    ).lstrip("\n")


def _modular_header(original: Original) -> list[str]:
    """Return the header of the modular file that a header-less modeling file was generated from."""
    path = original.path.with_name(original.path.name.replace("modeling_", "modular_", 1))
    if not path.is_file() or path == original.path:
        return []
    text = path.read_text(encoding="utf-8")
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line)
    return comment if recognise("\n".join(comment), "header") else []


def _licence_texts(port: Port, original: Original) -> dict[Path, str]:
    """Return the licence files to ship with the code; the port's own are left alone."""
    if original.package:
        text = package_licence_text(original.package)
        texts = {port.root / "LICENSE": text} if text else {}
    else:
        beside = licence_files(original.path.parent)
        texts = {
            port.root / p.name: p.read_text(encoding="utf-8", errors="replace") for p in beside
        }
    return {path: text for path, text in texts.items() if not path.exists()}


def _did(
    original: Original,
    taken: Extracted,
    licence: Licence | None,
    siblings: tuple[Path, ...],
    port: Port,
) -> tuple[str, ...]:
    lines = [f"Brought {len(taken.kept)} classes and functions from {original.title}."]
    if taken.left_out:
        lines.append(
            f"Left out what {port.architecture} does not reach: {', '.join(taken.left_out)}."
        )
    lines.append("Made every import absolute and dropped the unused ones.")
    if taken.undecorated:
        lines.append(f"Dropped {taken.undecorated} decorators that only write documentation.")
    if siblings:
        lines.append(f"Copied beside it: {', '.join(path.name for path in siblings)}.")
    if licence:
        where = "kept its header" if header_of(original.text) else "named it in a header"
        lines.append(f"Licence: {licence.name} (from the {licence.found}); {where}.")
    return (*lines, "Recorded origin, version, sha256 and licence in port.toml.")


def _warnings(port: Port, taken: Extracted, licence: Licence | None) -> tuple[str, ...]:
    warnings = []
    if licence is None:
        warnings.append("The code has no licence; you said that you may copy it.")
    elif not licence.fits_vllm:
        warnings.extend(licence.terms)
    for line in taken.code.splitlines():
        if line.startswith("from transformers.models.") and ".modeling_" in line:
            warnings.append(f"Still uses another model's file: {line}")
    if port.source:
        warnings.append(f"Replaces {port.modeling.name}, whose present text is committed first.")
    return tuple(warnings)
