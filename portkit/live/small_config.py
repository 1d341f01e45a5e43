"""Sizes of a small config: under other names, in the configs inside it, where one lacks a value.

Beside jobs/random_checkpoint.py, which says what sizes and which values make mistakes show.
"""

from __future__ import annotations

import re
from typing import Any

import torch

NO_OPTIONS = ("num_key_value_heads", "rope_theta", "attention_multiplier")
"""Fields that published checkpoints set, whatever the class's default."""
LAYER_TYPES = ("sliding_attention", "full_attention")


def sizes_of(default: Any, fields: dict[str, Any], sizes: dict[str, int]) -> dict[str, int]:
    """The sizes that the config has a field for; some configs keep a usual name as an alias."""
    aliases = {
        real: sizes[alias]
        for alias, real in getattr(default, "attribute_map", {}).items()
        if alias in sizes and real not in sizes
    }
    every = {**sizes, **aliases}
    return {k: v for k, v in every.items() if isinstance(fields.get(k, ""), (int, type(None)))}


def inner_sizes(default: Any, sizes: dict[str, int], chosen: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the configs inside: of a stack of layers each, or of a part of every layer.

    `chosen`: what was already chosen for the outer config, and stays in the parts.
    """
    found = {}
    for name in getattr(default, "sub_configs", {}):
        inner = getattr(default, name, None)
        fields = inner.to_dict() if inner is not None else {}
        own = {k: v for k, v in sizes.items() if isinstance(fields.get(k), int)}
        if "num_hidden_layers" in fields:
            found[name] = own
        elif own and name in chosen:
            found[name] = {**chosen[name], **own}
        elif own:
            found[name] = own
    return found


def shared_layers(default: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Layers that share the keys and values of earlier ones: each kind once without, once with.

    Lists with a number for each layer come along, the first layer's other than the rest's.
    """
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if not kinds or not getattr(default, "num_kv_shared_layers", 0):
        return {}
    count = 2 * len(kinds)
    found = {
        "num_hidden_layers": count,
        "num_kv_shared_layers": len(kinds),
        "layer_types": kinds * 2,
    }
    for name, value in default.to_dict().items():
        each = isinstance(value, list) and len(value) == default.num_hidden_layers
        if each and all(isinstance(v, (int, float)) for v in value):
            first, last = (sizes.get(name, v) for v in (value[0], value[-1]))
            found[name] = [first, *[last] * (count - 1)]
    return found


def without_options(default: Any, hard: dict[str, Any]) -> dict[str, Any]:
    """The hard values without those of options: what a config class leaves out, off, or at one.

    What is left are numbers that published checkpoints vary too (an eps, the base of the rotation,
    a window) and the lists that say which layers there are.
    """
    fields = default.to_dict()
    found = {k: v for k, v in hard.items() if not is_option(default, fields, k, v)}
    given = found.get("rope_parameters")
    if given and "rope_theta" in given:  # else they are by kind of layer, and the class's own
        rope = fields.get("rope_parameters") or {}
        found["rope_parameters"] = {**rope, "rope_theta": given["rope_theta"]}
    return found


def is_option(default: Any, fields: dict[str, Any], name: str, value: Any) -> bool:
    """Whether a field is a switch, a cap or a factor that its class's default leaves off."""
    usual = fields.get(name)
    if isinstance(value, (list, dict)):  # kinds of layers and configs inside are no options
        return isinstance(value, list) and any(isinstance(v, float) for v in value)
    unset = usual in (None, 0, 1, 0.0, 1.0) or isinstance(usual, bool)
    return name not in NO_OPTIONS and (unset or is_derived(default, fields, name))


def is_derived(default: Any, fields: dict[str, Any], name: str) -> bool:
    """Whether the class computes a size from others unless it is given (`head_dim`, `n_inner`)."""
    return (
        name not in NO_OPTIONS
        and getattr(type(default), name, name) is None
        and fields.get(name) is not None
    )


def refused_by_name(error: Exception, sizes: dict[str, Any]) -> set[str]:
    """Names of sizes in the message of a config that refuses a value."""
    return {name for name in sizes if re.search(rf"\b{name}\b", str(error))}


def build(cls: type, config_class: type, values: dict[str, Any]) -> torch.nn.Module:
    """Make the model and run it once. Raises whatever its code raises, ValueError for infinities.

    Checkpoints give a config inside the config fields that its class does not declare, so a class
    made without them may lack what the model reads: it gets the outer config's value.
    """
    for _ in range(4):
        try:
            model = cls(config_class(**values)).float().eval()
            with torch.inference_mode():
                logits = model(input_ids=torch.arange(4, 12)[None], use_cache=False).logits
            break
        except AttributeError as error:
            more = _lacking(error, config_class, values)
            if more is None:
                raise
            values = {**values, **more}
        except KeyError as error:
            if values.get("rope_parameters") or error.args[0] not in LAYER_TYPES:
                raise
            values = {**values, **_rope_by_layer_type(config_class, values)}
    if not torch.isfinite(logits).all():
        raise ValueError("the logits are not finite")
    return model


def without_ungated_experts(model: torch.nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """The lists of kinds of layers without those whose experts have no gate, {} if none have."""
    found = {
        int(match[1])
        for name, module in model.named_modules()
        if getattr(module, "has_gate", True) is False
        and (match := re.search(r"\blayers\.(\d+)\.", name))
    }
    fewer: dict[str, Any] = {}
    for name, value in values.items():
        if found and isinstance(value, list) and len(value) > max(found):
            gone = {value[i] for i in found}
            kept = [kind for kind in value if kind not in gone]
            if kept and all(isinstance(kind, str) for kind in value):
                fewer |= {name: kept, "num_hidden_layers": len(kept)}
    return fewer


def _rope_by_layer_type(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Give sliding layers a rotation and full ones none, where the config has none by default.

    Sections for rows and columns of images are left to the code, whose default is for heads of 128:
    a config that names them asks vLLM for positions of images.
    """
    config = config_class(**values)
    found: dict[str, Any] = {
        "layer_types": [LAYER_TYPES[i % 2] for i in range(config.num_hidden_layers)],
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
        },
    }
    if "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()):
        found["head_dim"] = 128
    return found


def _lacking(
    error: AttributeError, config_class: type, values: dict[str, Any]
) -> dict[str, Any] | None:
    """{inner config: its values with the one it lacks}, if the outer config has that."""
    outer = {**(values.get("rope_parameters") or {}), **values}
    for part, kind in getattr(config_class, "sub_configs", {}).items():
        if isinstance(error.obj, kind) and error.name in outer:
            return {part: {**(values.get(part) or {}), error.name: outer[error.name]}}
    return None
