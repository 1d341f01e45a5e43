"""Step parallel: how the checkpoint keeps the experts, where it is not vLLM's default.

vLLM's own loader has experts one by one or stacked, gate before up. Where gate and up alternate
(for `swigluoai`, whose kernels want them so), and where the experts stand one under the other, a
class of the port's takes what is this rank's.
"""

from __future__ import annotations

from portkit.analysis.conversion import Merge, conversions_of
from portkit.analysis.moe_facts import ExpertsFacts, MoeFacts
from portkit.draft import edit
from portkit.draft.blocker import Blocker
from portkit.draft.work import Work

_STACKED = ("gate_up_proj", "down_proj")
_NAMES = ("gate_proj", "down_proj", "up_proj")
_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0
"""Constants in vLLM's kernels of `swigluoai`."""

_ALTERNATING = '''
class {name}(RoutedExperts):
    """Experts whose gate and up alternate in one tensor, as vLLM's swigluoai takes them."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        rank = self.moe_config.moe_parallel_config.tp_rank
        size = self.moe_config.moe_parallel_config.tp_size
        for name, weight in weights:
            # Weights are stored as [experts, in, out].
            if name == "{gate_up}":
                param = "w13_weight"
                weight = weight.chunk(size, dim=2)[rank].transpose(1, 2)
            elif name == "{down}":
                param = "w2_weight"
                weight = weight.chunk(size, dim=1)[rank].transpose(1, 2)
{biases}            else:
                raise ValueError(f"{{self.layer_name}} has no place for {{name}}.")
            target = getattr(self, param)
            for expert_id, loaded in enumerate(weight):
                target.weight_loader(target, loaded, param, "", expert_id)
            yield param

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take what load_weights has cut out for this rank."""
        local = self._map_global_expert_id_to_local_expert_id(expert_id)
        if local >= 0:
            param.data[local].copy_(loaded_weight)
        return True if return_success else None
'''
_BIASES = """\
            elif name == "{gate_up}":
                param = "w13_bias"
                weight = weight.chunk(size, dim=1)[rank]
            elif name == "{down}":
                # The ranks' outputs are summed: one of them adds the bias.
                param = "w2_bias"
                weight = weight if rank == 0 else torch.zeros_like(weight)
"""

_UNDER_EACH_OTHER = '''
class {name}(RoutedExperts):
    """Experts whose projections are stored one under the other, gate and up in two tensors."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        places = {{
            "{gate}": ("w13_weight", "w1"),
            "{up}": ("w13_weight", "w3"),
            "{down}": ("w2_weight", "w2"),
        }}
        for name, weight in weights:
            param, shard_id = places[name]
            experts = weight.unflatten(0, (self.global_num_experts, -1))
            if shard_id == "w2":  # stored as [in, out]
                experts = experts.transpose(1, 2)
            target = getattr(self, param)
            for expert_id, loaded in enumerate(experts):
                target.weight_loader(target, loaded, param, shard_id, expert_id)
            yield param
'''


def checkpoint_layout(work: Work, experts: ExpertsFacts, facts: MoeFacts) -> list[str]:
    """Arguments of FusedMoEFactory that say it."""
    merges = {
        c.target.rsplit(".", 1)[-1]: c
        for c in conversions_of(work.facts.architecture)
        if isinstance(c, Merge) and f"{facts.experts_attr}." in c.target
    }
    if experts.parts and not merges:
        gate, down, up = experts.parts
        text = _UNDER_EACH_OTHER.format(name=experts.cls, gate=gate, down=down, up=up)
        _put_loader(work, experts, text)
        return [f"routed_experts_cls={experts.cls}"]
    if experts.clamp[0]:
        if merges or not experts.transposed:
            raise Blocker(
                f"{experts.cls}: gate and up alternate in {experts.gate_up}, and its checkpoint "
                "does not keep it as [experts, in, out]: no draft for that yet.",
                experts.line,
            )
        return _alternating(work, experts)
    if not experts.has_gate:
        return _without_gate(experts, merges)
    if not merges:
        if (experts.gate_up, experts.down) != _STACKED:
            raise Blocker(
                f"{experts.cls} names its parameters {experts.gate_up} and {experts.down}; vLLM "
                f"loads stacked experts by the names {' and '.join(_STACKED)}.",
                experts.line,
            )
        return ["is_fused_checkpoint_transposed=True"] if experts.transposed else []
    both, down = merges.get(experts.gate_up), merges.get(experts.down)
    if both is None or down is None or not (both.stacks_experts and down.stacks_experts):
        raise Blocker(
            f"{experts.cls}: Transformers builds its parameters from the checkpoint in a way that "
            "vLLM's loader of experts has not.",
            experts.line,
        )
    names = (both.parts[0], down.parts[0], both.parts[-1])
    quoted = ", ".join(f'"{n}"' for n in names)
    return [] if names == _NAMES else [f"ckpt_names=({quoted})"]


def _without_gate(experts: ExpertsFacts, merges: dict[str, Merge]) -> list[str]:
    """The names of up and down, one expert each: vLLM's loader takes no others without a gate."""
    up, down = merges.get(experts.gate_up), merges.get(experts.down)
    if (
        up is None
        or down is None
        or not all(m.operations == ("MergeModulelist",) for m in (up, down))
    ):
        raise Blocker(
            f"{experts.cls} has no gate, and its checkpoint does not keep each expert's "
            f"{experts.gate_up} and {experts.down} by itself: vLLM has no loader for that.",
            experts.line,
        )
    return [f'ckpt_names=("{up.parts[0]}", "{down.parts[0]}", None)']


def _alternating(work: Work, experts: ExpertsFacts) -> list[str]:
    """Experts that load what alternates, and their biases."""
    biases = ""
    if experts.biases:
        biases = _BIASES.format(gate_up=experts.biases[0], down=experts.biases[1])
    text = _ALTERNATING.format(
        name=experts.cls, gate_up=experts.gate_up, down=experts.down, biases=biases
    )
    _put_loader(work, experts, text)
    bias = ["has_bias=True"] if experts.biases else []
    return [*bias, f"routed_experts_cls={experts.cls}"]


def _put_loader(work: Work, experts: ExpertsFacts, text: str) -> None:
    """The port's class in the place of the author's experts."""
    made = edit.statement(text)
    work.put(made.with_changes(leading_lines=work.cls(experts.cls).leading_lines))


def constants_guard(experts: ExpertsFacts) -> list[edit.Statement]:
    """Stop at start where the config's constants of the activation are not the kernels'."""
    found = {experts.clamp[0]: _OAI_ALPHA, experts.clamp[1]: _OAI_LIMIT}
    if not experts.clamp[0]:
        return []
    open_ones = {name: value for name, value in found.items() if not _number(name)}
    if wrong := [n for n, value in found.items() if _number(n) and float(n) != value]:
        raise Blocker(
            f"{experts.cls}: its activation has the constant {wrong[0]}; vLLM's swigluoai has "
            f"{_OAI_ALPHA} and {_OAI_LIMIT}.",
            experts.line,
        )
    if not open_ones:
        return []
    names, values = ", ".join(open_ones), ", ".join(map(str, open_ones.values()))
    test = f"({names}) != ({values})" if len(open_ones) > 1 else f"{names} != {values}"
    guard = edit.statement(
        f"if {test}:\n"
        f'    raise ValueError("vLLM\'s swigluoai has alpha {_OAI_ALPHA} and limit {_OAI_LIMIT}.")'
    )
    return [edit.comment_before(edit.blank_before(guard), "Constants in vLLM's kernels.")]


def _number(written: str) -> bool:
    try:
        float(written)
    except ValueError:
        return False
    return True
