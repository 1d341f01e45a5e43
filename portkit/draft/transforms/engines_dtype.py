"""Step forward: what `__init__` makes in the config's dtype, it makes in the engine's."""

from __future__ import annotations

import libcst as cst

from portkit.draft import edit
from portkit.draft.work import Work, set_method

CONFIGS = ("config", "self.config", "hf_config", "text_config", "self.text_config")
DTYPES = frozenset(f"{config}.{name}" for config in CONFIGS for name in ("dtype", "torch_dtype"))
ENGINES = "torch.get_default_dtype()"


def take_the_engines_dtype(work: Work) -> None:
    """Rewrite `config.dtype` in every `__init__`; the rule of that name says why."""

    def change(node: cst.CSTNode) -> cst.CSTNode | None:
        found = isinstance(node, cst.Attribute) and edit.code(node) in DTYPES
        return edit.expression(ENGINES) if found else None

    for cls in [n for n in work.module.body if isinstance(n, cst.ClassDef)]:
        init = edit.method(cls, "__init__")
        made = edit.replace(init, change) if init is not None else None
        if made is not None and not made.deep_equals(init):
            work.put(set_method(cls, made))
            work.did.append(f"{cls.name.value}: parameters in the engine's dtype.")
