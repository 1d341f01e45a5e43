"""Which architectures the installed Transformers has, and where each is written.

Reads the tables of `transformers/models/auto/*.py` with `ast`, so it imports neither Transformers
nor torch and answers in a fraction of a second.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from portkit.errors import PortkitError

CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
NOT_PORTABLE = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder model",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a speech model with an encoder and a decoder",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "a multimodal model",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "a multimodal model",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES": "part of a model that makes sound",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "an encoder trained by masking (a masked language model)",
}
"""Transformers' table → what its classes are, for kinds that the workbook does not port."""


@dataclass(frozen=True)
class Architecture:
    """A decoder-only class of the installed Transformers."""

    name: str
    """The class, e.g. "HeliumForCausalLM"."""
    model_type: str
    """As in config.json, e.g. "helium"."""
    config_class: str
    """E.g. "HeliumConfig"; empty if Transformers names none."""
    module: str
    """E.g. "transformers.models.helium.modeling_helium"."""
    file: Path


def transformers_folder() -> Path:
    """Return the folder of the installed package, without importing it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise PortkitError(
            "Transformers is not installed.", "", "Set the environment up: `make setup` in portkit."
        )
    return Path(spec.submodule_search_locations[0])


def transformers_version() -> str:
    """Return the installed version, e.g. "5.19.0"."""
    return metadata.version("transformers")


@cache
def tables() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return Transformers' auto tables: table name → model type → class names."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    auto = transformers_folder() / "models" / "auto"
    for name in ("auto_mappings.py", "configuration_auto.py", "modeling_auto.py"):
        path = auto / name
        if not path.exists():
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for table, pairs in _pairs(node):
                found.setdefault(table, {}).update(pairs)
    return found


def _pairs(node: ast.stmt) -> list[tuple[str, dict[str, tuple[str, ...]]]]:
    """Read `NAME = OrderedDict([(key, value), ...])` and `NAME.update({key: value})`."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name, value = node.targets[0].id, node.value
    elif (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and isinstance(node.value.func.value, ast.Name)
        and node.value.func.attr == "update"
    ):
        name, value = node.value.func.value.id, node.value
    else:
        return []
    pairs: dict[str, tuple[str, ...]] = {}
    for part in ast.walk(value):
        items = []
        if isinstance(part, ast.Tuple) and len(part.elts) == 2:
            items = [(part.elts[0], part.elts[1])]
        elif isinstance(part, ast.Dict):
            items = list(zip(part.keys, part.values, strict=True))
        for key, entry in items:
            names = [n.value for n in ast.walk(entry) if isinstance(n, ast.Constant)]
            if isinstance(key, ast.Constant) and names and all(isinstance(n, str) for n in names):
                pairs.setdefault(str(key.value), tuple(names))
    return [(name, pairs)]


def causal_architectures() -> dict[str, str]:
    """Return architecture → model type of all decoder-only classes, in Transformers' order."""
    found: dict[str, str] = {}
    for model_type, names in tables()[CAUSAL].items():
        for name in names:
            # Where two types share a class, the one with a modeling file of its own counts.
            if not name.endswith("ForConditionalGeneration") and (
                name not in found or not _modeling_files(found[name])
            ):
                found[name] = model_type
    return found


@cache
def in_scope() -> Mapping[str, str]:
    """Return architecture → model type of what the workbook ports: decoders that stand alone.

    Out, by Transformers' own tables and nothing else: decoders of encoder-decoder, speech and sound
    models, masked language models, multimodal wrappers. The text decoder of a multimodal model
    stays in. A few more are decoders of something else by their code (`_needs_another`).
    """
    found = {}
    for name, model_type in causal_architectures().items():
        if not _not_portable(name) and not _kind_of_type(model_type):
            architecture = _architecture(name, model_type)
            if not _needs_another(architecture):
                found[name] = model_type
    return MappingProxyType(found)


def _kind_of_type(model_type: str) -> str:
    """Say what a model type is, if all of its classes are of a kind that is not ported."""
    for table, kind in NOT_PORTABLE.items():
        if table not in PARTLY and model_type in tables().get(table, {}):
            return kind
    return ""


PARTLY = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
"""Tables that name a whole; the model type's ForCausalLM class is its decoder, which stands alone.
"""


def _partly(model_type: str) -> bool:
    return any(model_type in tables().get(table, {}) for table in PARTLY)


def _needs_another(architecture: Architecture) -> bool:
    """Whether the class's forward takes the states of another model that it cannot do without."""
    tree = ast.parse(architecture.file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == architecture.name:
            taken = {
                a.arg
                for f in node.body
                if isinstance(f, ast.FunctionDef) and f.name == "forward"
                for a in f.args.args
            }
            if "shared_kv_states" in taken:
                return True
            if "cross_attention_states" in taken and _partly(architecture.model_type):
                return True
            # GPT-2 and others take encoder states too, but stand alone unless a config asks; the
            # BERT kind looks at `config.is_decoder` and is an encoder by default.
            asks = any(
                isinstance(n, ast.Attribute) and ast.unparse(n) == "config.is_decoder"
                for n in ast.walk(tree)
            )
            return "encoder_hidden_states" in taken and asks
    return False


def _modeling_files(model_type: str) -> tuple[Path, ...]:
    """Return the modeling files in the folder of a model type."""
    special = tables().get("SPECIAL_MODEL_TYPE_TO_MODULE_NAME", {})
    folder = special.get(model_type, (model_type.replace("-", "_"),))[0]
    return tuple(sorted((transformers_folder() / "models" / folder).glob("modeling_*.py")))


def find_architecture(query: str) -> Architecture:
    """Return the architecture of this class name or model type; PortkitError names the closest."""
    causal = causal_architectures()
    by_type = {model_type: name for name, model_type in reversed(causal.items())}
    kind = _not_portable(query)
    if kind:
        decoder = by_type.get(query, "")
        usable = decoder and not _not_portable(decoder)
        raise PortkitError(
            f"{query} is {kind}; the workbook ports decoder-only language models.",
            f"Transformers {transformers_version()}",
            f"Its decoder alone is {decoder}: `--model {decoder}`."
            if usable
            else "Choose a decoder-only class (…ForCausalLM), e.g. `--model helium`.",
        )
    if query in causal:
        return _architecture(query, causal[query])
    normal = query.strip().lower().replace("_", "-")
    for model_type, name in by_type.items():
        if model_type.lower().replace("_", "-") == normal:
            return _architecture(name, model_type)
    close = closest(query, [*causal, *by_type])
    raise PortkitError(
        f"Transformers {transformers_version()} has no decoder-only architecture {query!r}.",
        "",
        (f"Did you mean {close}? " if close else "")
        + "For code of your own: `--source FILE.py --checkpoint DIR`.",
    )


def _not_portable(query: str) -> str:
    """Say what this class or model type is, if it is of a kind that the workbook does not port."""
    causal = causal_architectures()
    for table, kind in NOT_PORTABLE.items():
        for model_type, names in tables().get(table, {}).items():
            # A few old classes serve as masked and as causal models; those are welcome.
            if query in names and not ("MASKED" in table and query in causal):
                return kind
            if query == model_type:
                return kind
    return ""


def closest(query: str, names: Iterable[str], count: int = 4) -> str:
    """Return the names most like the query, in one line of words; empty if none is near."""
    lowered = {name.lower(): name for name in names}
    stem = re.sub(r"(forcausallm|lmheadmodel|model)$", "", query.lower())
    close = difflib.get_close_matches(stem, lowered, n=count, cutoff=0.6)
    close += difflib.get_close_matches(query.lower(), lowered, n=count, cutoff=0.6)
    close.sort(key=lambda name: -max(_likeness(name, stem), _likeness(name, query.lower())))
    return ", ".join(lowered[name] for name in list(dict.fromkeys(close))[:count])


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _architecture(name: str, model_type: str) -> Architecture:
    config = tables().get("CONFIG_MAPPING_NAMES", {}).get(model_type, ("",))[0]
    path = _defining_file(name, model_type)
    relative = path.relative_to(transformers_folder()).with_suffix("")
    return Architecture(name, model_type, config, ".".join(("transformers", *relative.parts)), path)


def _defining_file(name: str, model_type: str) -> Path:
    """Return the modeling file with `class NAME`, first where the model type says it should be."""
    models = transformers_folder() / "models"
    pattern = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    likely = _modeling_files(model_type)
    for path in (*likely, *sorted(models.glob("*/modeling_*.py"))):
        if pattern.search(path.read_text(encoding="utf-8")):
            return path
    raise PortkitError(
        f"Transformers names {name} but no modeling file defines it.",
        str(models),
        "Its installation looks incomplete: reinstall it.",
    )
