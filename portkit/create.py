"""Making a new port: all of it or nothing.

The folder is built under a temporary name beside its place and renamed at the end, so a kill, a
full disk or a fault in the checkpoint leaves no half port. Nothing is downloaded and no code of the
model is run, unless the reader says `trust_remote_code` (which is only recorded here).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from portkit import __version__, models
from portkit.architectures import Architecture, find_architecture, transformers_version
from portkit.atomic import sync_folder
from portkit.checkpoint import read_checkpoint
from portkit.errors import PortkitError
from portkit.live.checkpoint import open_checkpoint
from portkit.port import Port, ports_dir
from portkit.portfiles import IGNORED, PortFacts, port_files
from portkit.repository import Repository
from portkit.steps.copy.draft import unlicensed
from portkit.steps.copy.extract import class_names, extract, parse
from portkit.steps.copy.licence import licence_files, licence_of
from portkit.steps.copy.places import BesideFile, siblings_of

Destination = Literal["out_of_tree", "in_tree"]
BUILDING = "portkit-new"


def new_port(
    name: str,
    *,
    architecture: str | None = None,
    checkpoint: str | Path | None = None,
    source: str | Path | None = None,
    root: str | Path | None = None,
    accept_unlicensed: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Port:
    """Create the port `name` in the folder `root` (default: the ports folder) and return it.

    `architecture` is a class ("HeliumForCausalLM"), a model type ("helium") or a bundled model's
    name; without it, the checkpoint's config.json says it. `source` is the reader's own modeling
    file. Without a checkpoint the bundled one is copied, else a tiny random one is made. Raises
    PortkitError for a bad name, an existing folder, an unknown architecture, a faulty checkpoint or
    source, and what the disk refuses.
    """
    place = _place(name, Path(root).expanduser().absolute() if root else ports_dir())
    with _new_folder(place) as folder:
        given = _Given.read(architecture, checkpoint, source, allow_pickle, accept_unlicensed)
        _fill_checkpoint(given, folder, progress)
        facts = PortFacts(
            name=name,
            architecture=given.architecture,
            model_type=given.model_type,
            checkpoint_kind=given.checkpoint_kind,
            checkpoint_origin=given.checkpoint_origin,
            source_kind="file" if given.source else "transformers",
            source_module=given.found.module if given.found else "",
            source_file=str(given.source or ""),
            transformers=transformers_version(),
            portkit=__version__,
            accept_unlicensed=accept_unlicensed,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        for path, text in port_files(facts).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        if given.source:
            _keep_original(given.source, folder / "original")
        repository = Repository(folder)
        repository.create()
        (folder / ".git" / "info").mkdir(exist_ok=True)
        (folder / ".git" / "info" / "exclude").write_text(IGNORED, encoding="utf-8")
        repository.run("add", "-A")
        repository.run("commit", "-q", "-m", f"portkit new {name}: {given.architecture}")
    return Port(place.resolve())


def decide(port: Port, destination: Destination, reason: str) -> None:
    """Write down where the port will live, and why."""
    port.update_meta("decisions", **decision(destination, reason))


def decision(destination: str, reason: str) -> dict[str, str]:
    """Return the values of [decisions]; PortkitError unless there is a destination and a reason."""
    if destination not in ("out_of_tree", "in_tree"):
        raise PortkitError(
            f"{destination!r} is no place for a port.", "", 'Choose "out_of_tree" or "in_tree".'
        )
    if not reason.strip():
        raise PortkitError(
            "A decision needs its reason.", "", 'E.g. decide(port, "out_of_tree", "our own model")'
        )
    return {"destination": destination, "reason": " ".join(reason.split())}


# ---- the place ----------------------------------------------------------------------------------


def _place(name: str, parent: Path) -> Path:
    if not (name.isidentifier() and name.isascii() and name == name.lower()):
        better = "".join(c if c.isalnum() and c.isascii() else "_" for c in name.lower()).strip("_")
        better = f"m_{better}" if not better or better[0].isdigit() else better
        raise PortkitError(
            f"{name!r} cannot name a port: it becomes part of a Python module's name.",
            "",
            f"Use small letters, digits and _, e.g. {better}.",
        )
    place = parent / name
    if place.exists() or place.is_symlink():
        raise PortkitError(
            f"{place} exists already; portkit does not write over it.",
            str(place),
            f"Open it with `open_port({name!r})`, or choose another name.",
        )
    return place


class _new_folder:
    """A temporary folder beside `place` that becomes `place` if all goes well."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> Path:
        prefix = f".{self.place.name}.{BUILDING}."
        with self._explained():
            self.place.parent.mkdir(parents=True, exist_ok=True)
            for left in self.place.parent.glob(f".*.{BUILDING}.*"):
                pid = left.name.split(f".{BUILDING}.")[1].split(".")[0]
                if not pid.isdigit() or not psutil.pid_exists(int(pid)):
                    shutil.rmtree(left, ignore_errors=True)
            self.folder = Path(
                tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}.", dir=self.place.parent)
            )
        self.folder.chmod(0o755)
        return self.folder

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                with self._explained():
                    if self.place.exists():
                        raise FileExistsError(17, "it was made meanwhile by another process")
                    os.rename(self.folder, self.place)
                    sync_folder(self.place.parent)
            elif issubclass(kind, OSError):
                with self._explained():
                    raise error
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _explained(self) -> _explain:
        return _explain(self.place)


class _explain(suppress):
    """Turn an OSError into a PortkitError about the new port."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __exit__(self, kind, error, trace) -> bool:
        if isinstance(error, OSError):
            raise PortkitError(
                f"The port could not be made: {_reason(error)}.",
                str(error.filename or self.place),
                "Nothing was left behind. Free some disk space, or choose a folder you may write "
                "to (PORTKIT_PORTS, --root).",
            ) from error
        return False


def _reason(error: OSError) -> str:
    """Return the system's words; of a copy of many files, those of the first that failed."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return re.sub(r": '.*", "", str(error.args[0][0][2]))
    return str(error.strerror or error)


# ---- what was asked for -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """What the reader's arguments come to."""

    architecture: str
    model_type: str
    found: Architecture | None
    """In Transformers; None for the reader's own class."""
    source: Path | None
    checkpoint: Path | None
    checkpoint_kind: Literal["bundled", "reader", "random"]
    pickles: tuple[str, ...] = ()
    """The checkpoint's weight files, if they are pickles that the reader trusts."""

    @property
    def checkpoint_origin(self) -> str:
        return str(self.checkpoint) if self.checkpoint_kind == "reader" else self.model_type

    @classmethod
    def read(
        cls,
        architecture: str | None,
        checkpoint: str | Path | None,
        source: str | Path | None,
        allow_pickle: bool,
        accept_unlicensed: bool,
    ) -> _Given:
        bundle = models.find(architecture) if architecture else None
        wanted = bundle.architecture if bundle else architecture
        folder = Path(checkpoint).expanduser().absolute() if checkpoint else None
        named = None
        if folder:
            named = read_checkpoint(folder, allow_pickle=allow_pickle)
            wanted = _agree(wanted, named.architecture, source is not None)
        elif source:
            raise PortkitError(
                "A modeling file of your own needs a checkpoint to be checked with.",
                "--source",
                "Add `--checkpoint DIR`: a small one, even with random weights, is best.",
            )
        elif not wanted:
            raise PortkitError(
                "Which model is it?",
                "",
                "Say `--model ARCHITECTURE` (e.g. helium), or `--checkpoint DIR`.",
            )
        if source:
            file = Path(source).expanduser().absolute()
            name = _class_in(file, wanted)
            _check_licence(file, accept_unlicensed)
            model_type = str(named.config.get("model_type", ""))
            return cls(name, model_type, None, file, folder, "reader", named.pickles)
        found = find_architecture(str(wanted))
        if named:
            model_type = str(named.config.get("model_type", found.model_type))
            return cls(found.name, model_type, found, None, folder, "reader", named.pickles)
        bundle = models.find(found.name)
        kind = "bundled" if bundle else "random"
        return cls(
            found.name, found.model_type, found, None, bundle.checkpoint if bundle else None, kind
        )


def _agree(wanted: str | None, named: str, own: bool) -> str:
    """Return the architecture that `--model` and config.json agree on."""
    if wanted is None:
        return named
    name = wanted if own else find_architecture(wanted).name
    if name != named:
        raise PortkitError(
            f"--model is {name}, but the checkpoint's config.json says {named}.",
            "config.json: architectures",
            "Leave --model out, or give the checkpoint of that model.",
        )
    return name


def _class_in(file: Path, wanted: str | None) -> str:
    """Return the class to port of the reader's file, after checking that it can be taken out."""
    if not file.is_file():
        raise PortkitError(f"There is no file {str(file)!r}.", "--source", "Check the path.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PortkitError(
            f"{file.name} is not UTF-8 text.", str(file), "Save it as UTF-8."
        ) from error
    names = class_names(parse(text, file.name))
    causal = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))]
    name = wanted or (causal[0] if len(causal) == 1 else "")
    extract(text, name, file.name, BesideFile(file, file.name))
    siblings_of(file)
    return name


def _check_licence(file: Path, accepted: bool) -> None:
    text = file.read_text(encoding="utf-8")
    if not accepted and licence_of(text, file.parent) is None:
        raise PortkitError(unlicensed(file.name).split(" If you are")[0], str(file), _SAY_SO)


_SAY_SO = "If you are its author or have their permission, say so: --accept-unlicensed."


def _keep_original(file: Path, folder: Path) -> None:
    """Copy the reader's file, what it imports from beside it, and the licence, into the port."""
    folder.mkdir()
    for path in (file, *siblings_of(file), *licence_files(file.parent)):
        shutil.copyfile(path, folder / path.name)


def _fill_checkpoint(given: _Given, folder: Path, progress: Callable[[str], None]) -> None:
    """Put the checkpoint into the port: a small bundled one as a copy, the reader's as a link."""
    target = folder / "checkpoint"
    if given.pickles:
        progress("The checkpoint is a pickle: writing it as safetensors")
        _in_worker(
            "convert_pickle",
            "The pickled checkpoint could not be converted",
            progress,
            source=str(given.checkpoint),
            files=list(given.pickles),
            out=str(target),
        )
    elif given.checkpoint_kind == "reader" and given.checkpoint:
        target.symlink_to(given.checkpoint.resolve(), target_is_directory=True)
    elif given.checkpoint:
        shutil.copytree(given.checkpoint, target)
    else:
        progress(f"No checkpoint given: making a tiny random one of {given.architecture}")
        _in_worker(
            "random_checkpoint",
            f"A tiny random checkpoint of {given.architecture} could not be made",
            progress,
            architecture=given.architecture,
            model_type=given.model_type,
            out=str(target),
        )
    open_checkpoint(target)


def _in_worker(
    job: str, failure: str, progress: Callable[[str], None], **args: str | list[str]
) -> dict[str, Any]:
    """Run a job that needs torch; PortkitError in words if it fails."""
    from portkit.live.client import live_for

    result = live_for(None).run(job, progress=progress, **args)
    if not result.ok:
        raise PortkitError(
            f"{failure}: {result.what}",
            result.where,
            result.next or "Give a checkpoint in safetensors: `--checkpoint DIR`.",
        )
    return result.value
