"""Live checks of step `copy`: the modeling code stands alone, may be copied, and is the same."""

from __future__ import annotations

from hashlib import sha256

from portkit.analysis.facts import facts_of
from portkit.checks.base import Check, CheckContext, place
from portkit.checks.verdict import Table, Verdict
from portkit.steps.copy.changes import first_change
from portkit.steps.copy.draft import licence_of_original, original_of, unlicensed
from portkit.steps.copy.licence import header_of, holders_of, licence_files, licence_of

STEP = "copy"


class StandsAlone(Check):
    """The modeling file imports in a fresh process with nothing beside it but what the port
    brings along: no import relative to the place it came from, no other model's modeling file
    that its classes derive from.
    """

    id = "stands_alone"
    step = STEP
    title = "The copied file stands alone"

    def run(self, context: CheckContext) -> Verdict:
        job = context.live.run("copy_stands_alone", progress=context.progress)
        if not job.ok:
            return self.failed_job(job)
        port, found = context.port, job.value
        beside = {path.stem for path in (port.root / port.package).glob("*.py")}
        astray = [
            (file, module, line)
            for file, module, line in found["imports"]
            if module.startswith("..")
            or (module.startswith(".") and module[1:].partition(".")[0] not in {*beside, ""})
        ]
        table = Table(
            "Imports",
            ("file", "line", "module"),
            tuple(
                (file, line, module)
                for file, module, line in found["imports"]
                if file == port.modeling.name
            ),
        )
        if astray:
            file, module, line = astray[0]
            return self.failed(
                f"{len(astray)} imports are relative to where the file came from: "
                f"{', '.join(m for _, m, _ in astray)}.",
                table,
                where=f"{file}:{line}",
                job=job,
                next="Make them absolute: `from transformers. ...`.",
            )
        if found["bases"]:
            module, name = found["bases"][0]
            return self.failed(
                f"Its classes derive from another model's file: {name} of {module}.",
                table,
                where=port.modeling.name,
                job=job,
                next=f"Copy {name} into the port.",
            )
        return self.passed(f"{found['class']} imports by itself.", table, job=job)


class LicenceKept(Check):
    """The original's licence allows the copy (or the reader said so), its copyright header is in
    the port, and port.toml names it. The terms are shown. This is no legal advice.
    """

    id = "licence"
    step = STEP
    title = "The licence is kept and its terms are known"
    requires = ("stands_alone",)

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        original = original_of(port)
        licence = licence_of_original(original)
        source = port.meta.get("source", {})
        place = port.modeling.name
        if licence is None:
            if source.get("accept_unlicensed"):
                return self.passed(
                    "The code names no licence; you said in port.toml that you may copy it."
                )
            return self.failed(
                unlicensed(original.title),
                where="port.toml [source]",
                next="Set accept_unlicensed = true, if it is.",
            )
        terms = Table(
            f"Terms of {licence.name}", ("what it asks",), tuple((term,) for term in licence.terms)
        )
        if source.get("licence") != licence.spdx:
            return self.failed(
                f"port.toml says the licence is {source.get('licence', '(nothing)')!r}, the "
                f"original says {licence.spdx}.",
                terms,
                where="port.toml [source] licence",
                next=f'Write licence = "{licence.spdx}" there.',
            )
        missing = [line for line in holders_of(original.text) if line not in header_of(port.source)]
        if missing:
            return self.failed(
                f"The copyright line is gone from the port: {missing[0]}",
                terms,
                where=f"{place}:1",
                next="Put the original's header back at the top of the file.",
            )
        own = licence_of(port.source)
        if licence.found == "header" and (own is None or own.spdx != licence.spdx):
            return self.failed(
                f"The port's header no longer names {licence.name}.",
                terms,
                where=f"{place}:1",
                next="Put the original's header back at the top of the file.",
            )
        if not licence_files(port.root):
            return self.failed(
                "The licence text is not in the port.",
                terms,
                where=str(port.root.name),
                next="Copy the original's LICENSE file into the port.",
            )
        fits = (
            "vLLM, itself Apache-2.0, can take it."
            if licence.fits_vllm
            else "vLLM would not take it in: keep the port out of tree."
        )
        return self.passed(
            f"{licence.name}, from the {licence.found}; header and text are in the port. {fits}",
            terms,
        )


class Provenance(Check):
    """port.toml says where the code came from (package, version or file) with the sha256 of the
    original, and that is the original which is there now.
    """

    id = "provenance"
    step = STEP
    title = "Where the code came from is written down"
    requires = ("stands_alone",)

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        original = original_of(port)
        source = port.meta.get("source", {})
        actual = sha256(original.path.read_bytes()).hexdigest()
        rows = tuple(
            (key, str(source.get(key, "")) or "(none)")
            for key in ("kind", "package", "version", "module", "file", "sha256")
        )
        table = Table("port.toml [source]", ("key", "value"), rows)
        wanted = {
            "sha256": actual,
            "kind": original.kind,
            "package": original.package,
            "version": original.version,
        }
        wrong = {key: value for key, value in wanted.items() if str(source.get(key, "")) != value}
        if wrong:
            key, value = next(iter(wrong.items()))
            return self.failed(
                f"port.toml records {key} {source.get(key) or '(none)'!r}, the original has "
                f"{value!r}.",
                table,
                where=f"port.toml [source] {key}",
                next="Draft the step again to copy what is installed now, or install the "
                "version that was copied.",
                causes=(
                    "Transformers was updated since the copy.",
                    "The entry was never written, or edited by hand.",
                ),
            )
        return self.passed(f"{original.title}, sha256 {actual[:16]}, as recorded.", table)


class BitEqual(Check):
    """The copied class computes, bit by bit, what the original computes on the checkpoint: logits
    with and without a cache, a padded batch, and generate. Not covered: training, other dtypes.
    """

    id = "bit_equal"
    step = STEP
    title = "Bit-equal to the original"
    requires = ("stands_alone",)

    def run(self, context: CheckContext) -> Verdict:
        state = facts_of(context.port.source, context.port.architecture).state
        if state != "copy":
            return self._moved_on(context, state)
        job = context.live.run("copy_parity", progress=context.progress)
        if not job.ok:
            return self.failed_job(job)
        found = job.value
        table = Table(
            f"{found['copy']} against {found['original']}",
            ("what", "shape", "bit-equal", "max |Δ|"),
            tuple(
                (what, shape, "yes" if equal else "NO", f"{worst:.1e}")
                for what, shape, equal, worst, _ in found["rows"]
            ),
        )
        bad = [row for row in found["rows"] if not row[2]]
        if bad:
            what, _, _, worst, position = bad[0]
            changed = first_change(context.port)
            return self.failed(
                f"{len(bad)} of {len(found['rows'])} outputs are not the original's. First: "
                f"{what}, by up to {worst:.3g}"
                + (f", from position {position} on." if position >= 0 else ".")
                + (f" {changed.what} is not the original's." if changed else ""),
                table,
                where=place(context.port, changed.line if changed else 0),
                job=job,
                next="Compare the file with the original: `portkit draft copy` shows the "
                "difference.",
                causes=(
                    "This step only brings the code over; a change of what it computes belongs "
                    "to step forward.",
                    "A helper was replaced by another of the same name.",
                ),
            )
        return self.passed(
            f"{len(found['rows'])} outputs of {found['copy']} are bit-equal to "
            f"{found['original']}.",
            table,
            job=job,
        )

    def _moved_on(self, context: CheckContext, state: str) -> Verdict:
        """vLLM's classes cannot run in Transformers: what was copied is judged only before them."""
        if STEP in context.port.steps_passed():
            return self.skipped(
                f"the file has moved on to step {state}, whose checks compare it with "
                f"Transformers; "
                "the copy was bit-equal when this step passed (`git log` in the port)"
            )
        return self.failed(
            f"The file is already rewritten for vLLM (as in step {state}), so it cannot run "
            "beside the original.",
            where=context.port.modeling.name,
            next="Go on with that step: its checks compare with Transformers. Or begin again from "
            "the copy: "
            "`portkit draft copy --apply`, which `portkit undo` takes back.",
        )


CHECKS: tuple[type[Check], ...] = (StandsAlone, LicenceKept, Provenance, BitEqual)
