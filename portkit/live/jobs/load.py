"""Job: start vLLM with the port's own load_weights, all parameters NaN before, and compare.

args: "variant", "" for the port's checkpoint, "tied" or "untied" for one derived from it.
value: returned (the names that load_weights returned, None if it returned none), nan (parameter ->
elements that are still NaN), coverage, memory, error (what load_weights or vLLM's check raised),
stopped (the engine ended after a bad load), cases, divergence, misplaced (what does not hold its
tensor), nan_case (one tensor with a NaN), again (if all cases are right: loading into the running
engine once more; error, changed parameters, the largest difference, or "nothing" with a reason);
or "refused", why Transformers does not take the derived checkpoint.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import inplace
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from portkit.errors import PortkitError
from portkit.live.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from portkit.live.coverage import Tracer
from portkit.live.derived import head_of, write_variant
from portkit.live.device import find_device
from portkit.live.engine import Engine, start
from portkit.live.failure import describe
from portkit.live.ignored import ignored_by
from portkit.live.job import JobRequest
from portkit.live.jobs.rehearsal import compare_with_reference, diverges_at
from portkit.live.loading import describe_load
from portkit.live.memory import peak_of
from portkit.live.misplaced import misplaced
from portkit.live.reference import load_model, original_class
from portkit.port import Port


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Load, audit, compare. What load_weights raises is in the value, not raised."""
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    variant = request.args.get("variant", "")
    if variant:
        head = head_of(original_class(port), checkpoint)
        if head is None:
            return {"nothing": "the original cannot share one weight between embedding and head"}
        folder = port.state_dir / "cache" / variant
        say(f"writing the checkpoint with {'a tied' if variant == 'tied' else 'an untied'} head")
        write_variant(checkpoint, head, variant == "tied", folder)
        checkpoint = open_checkpoint(folder)
        try:
            AutoConfig.from_pretrained(str(folder))
            load_model(original_class(port), checkpoint)
        except PortkitError as error:
            return {"refused": error.what}
        except Exception as error:
            return {"refused": str(error).strip().splitlines()[-1].strip()}
    value: dict[str, Any] = {"memory": _memory(checkpoint), "cases": [], "divergence": {}}
    say("loading real shards with the port's own load_weights")
    try:
        with (
            _audited(value, checkpoint, port),
            start(port.root, loader="port", checkpoint=checkpoint.root) as engine,
        ):
            say("comparing with Transformers")
            cases, prompts, tolerance = compare_with_reference(engine)
            value["tolerance"] = [tolerance.value, tolerance.reason]
            value["cases"] = [case.to_dict() for case in cases]
            if not value["nan"]:
                # With NaN in a weight, everything after it differs: the coverage says more.
                value["divergence"] = diverges_at(engine, cases, prompts)
                if value["divergence"]:
                    places = misplaced(engine.model, checkpoint)
                    value["misplaced"] = [(str(p), p.wanted) for p in places]
            if all(case.ok for case in cases) and not value["nan"]:
                say("loading again into the running engine")
                value["again"] = _again(engine, prompts)
    except Exception as error:
        # What stops a model that was not loaded whole is told by what was not loaded.
        if "error" not in value and not value.get("nan"):
            raise
        traceback.print_exc()
        value["stopped"] = describe(error, str(port.root))
    return value


def _again(engine: Engine, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Poison the running model, let vLLM load it again, and see what that changed."""
    if limit := _cannot_load_again(engine.model):
        return {"nothing": limit}
    before, was = engine.prompt_logprobs(prompts), _sums(engine.model)
    poison(engine.model)
    passed_over: list[str] = []
    finalize = inplace.finalize_layerwise_reload

    def noted(model: nn.Module, model_config: Any) -> None:
        passed_over.extend(name for name in _not_given(model) if name in was)
        finalize(model, model_config)

    # A job is a process of its own: nothing has to be put back.
    inplace.finalize_layerwise_reload = noted
    try:
        engine.llm.collective_rpc("reload_weights")
    except Exception as error:
        traceback.print_exc()
        return {"error": describe(error, str(engine.port.root))}
    now = _sums(engine.model)
    after = engine.prompt_logprobs(prompts)
    difference = max(map(_distance, before, after))
    changed = [name for name, sums in was.items() if now.get(name) != sums]
    if difference:
        # On a CPU a linear keeps a packed copy of its weight only, which no parameter shows.
        changed = list(dict.fromkeys([*passed_over, *changed]))
    return {"changed": changed, "difference": difference}


def _not_given(model: nn.Module) -> Iterator[str]:
    """Yield the parameters of unfinished layers that no weight_loader was given a tensor for."""
    for path, module in model.named_modules():
        info = get_layerwise_info(module)
        if info.can_load():
            given = {name for name, _ in info.loaded_weights}
            own = (name for name, _ in module.named_parameters(recurse=False))
            yield from (f"{path}.{name}" for name in own if name not in given)


def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return parameter -> sum and sum of magnitudes, for those of numbers with a point."""
    return {
        name: (float(p.data.double().sum()), float(p.data.double().abs().sum()))
        for name, p in model.named_parameters()
        if p.is_floating_point()
    }


def _cannot_load_again(model: nn.Module) -> str:
    """Return what vLLM itself does not load again, whatever the port does; "" if nothing."""
    modules = list(model.modules())
    if find_device()[0] == "cpu" and any(isinstance(m, RoutedExperts) for m in modules):
        return "vLLM's kernel for experts on a CPU packs their weights the first time only"
    owned = [{id(p) for p in m.parameters(recurse=False)} for m in modules]
    owners = Counter(parameter for own in owned for parameter in own)
    if any(own and 0 < sum(owners[p] > 1 for p in own) < len(own) for own in owned):
        return (
            "vLLM loads no layer again that shares one parameter with another layer (a tied "
            "head) and has one of its own (its bias)"
        )
    return ""


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference, infinite where only one is NaN."""
    return float(np.nan_to_num(np.abs(one - other), nan=np.inf).max(initial=0.0))


def _memory(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the sizes that loading is measured by, in bytes."""
    shards: dict[str, int] = {}
    layers: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        shards[tensor.shard] = shards.get(tensor.shard, 0) + tensor.bytes
        number = _layer(tensor)
        if number:
            layers[number] = layers.get(number, 0) + tensor.bytes
    return {
        "checkpoint": sum(shards.values()),
        "largest_shard": max(shards.values()),
        "shards": len(shards),
        "largest_layer": max(layers.values(), default=0),
        "largest_tensor": max(t.bytes for t in checkpoint.tensors),
    }


def _layer(tensor: TensorInfo) -> str:
    parts = tensor.name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")


@contextmanager
def _audited(value: dict[str, Any], checkpoint: Checkpoint, port: Port) -> Iterator[None]:
    """Inside the block, vLLM's loader poisons the model first and notes what happens in `value`."""
    original = DefaultModelLoader.load_weights
    ignored = ignored_by(original_class(port), checkpoint)

    def audited(self: DefaultModelLoader, model: nn.Module, model_config: Any) -> None:
        value["nan_case"] = _nan_case(self, model, model_config, ignored)
        poison(model)
        tracer = Tracer(model)
        stream, own = self.get_all_weights, model.load_weights
        returned: list[Any] = []

        def watched(config: Any, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
            return tracer.watch(stream(config, module))

        def kept(weights: Any) -> Any:
            with tracer:
                returned.append(own(weights))
            return returned[0]

        self.get_all_weights, model.load_weights = watched, kept
        value["memory"]["model"] = sum(p.numel() * p.element_size() for p in model.parameters())
        error: Exception | None = None
        try:
            with peak_of(find_device()[0]) as peak:
                original(self, model, model_config)
        except Exception as raised:
            error = raised
        finally:
            del self.get_all_weights, model.load_weights
        coverage = tracer.coverage(returned[0] if returned else None)
        value["coverage"] = coverage.to_dict()
        value["returned"] = coverage.returned
        value["nan"] = nans(model)
        value["memory"].update(
            peak=peak.bytes, held=tracer.held_peak, held_then=tracer.held_then[:8], how=peak.how
        )
        if error is not None:
            value["error"] = {
                **describe_load(error, tracer, str(port.root)),
                "vllm": bool(returned),
            }
            raise error

    DefaultModelLoader.load_weights = audited
    try:
        yield
    finally:
        DefaultModelLoader.load_weights = original


def poison(model: nn.Module) -> None:
    """Fill every floating-point parameter with NaN: what is not loaded cannot pass for a weight."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(float("nan"))


def nans(model: nn.Module) -> dict[str, int]:
    """Return parameter -> number of NaN elements, for those that have any."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            count = int(torch.isnan(parameter.data).sum())
            if count:
                found[name] = count
    return found


def _nan_case(
    loader: DefaultModelLoader, model: nn.Module, model_config: Any, ignored: Collection[str]
) -> dict[str, Any]:
    """Give load_weights one tensor with a NaN: does anything raise, and does `nans` see it?"""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.zero_()
    for name, tensor in loader.get_all_weights(model_config, model):
        if not tensor.is_floating_point() or name in ignored:
            continue
        bad = tensor.clone()
        bad.view(-1)[0] = float("nan")
        try:
            model.load_weights(iter([(name, bad)]))
        except Exception as error:
            return {"tensor": name, "raised": f"{type(error).__name__}: {error}", "seen": {}}
        return {"tensor": name, "raised": "", "seen": nans(model)}
    return {}
