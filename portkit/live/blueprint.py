"""The port's modules without their weights: built for any rank of any tensor-parallel size.

One process, no engine, and no memory for the weights: the storage that a layer asks for with
`torch.empty` is put on the meta device, everything else (rotary tables, ALiBi slopes) is computed
as ever. The tensor-parallel group is told another size and rank while the model is built, so every
rank's shapes can be had in turn. What a module was given (prefix, quant_config) and the line of the
port that built it are recorded meanwhile.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from vllm import ModelRegistry
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from portkit.live.checkpoint import Checkpoint
from portkit.live.device import find_device
from portkit.live.engine import _register_config, expand_latents, longest
from portkit.live.portmodule import port_class
from portkit.live.profile import Profile
from portkit.port import Port


@dataclass
class Blueprint:
    """One rank's model, its weights without storage."""

    model: nn.Module
    ranks: int
    rank: int
    asked: dict[int, str]
    """id of a module -> the prefix under which it asked the quantisation config for its method."""
    lines: dict[int, int]
    """id of a module -> line of the port's file that constructed it."""

    def line_of(self, module: nn.Module) -> int:
        return self.lines.get(id(module), 0)


@dataclass
class Workbench:
    """What is needed to build the port; use `workbench`."""

    port: Port
    checkpoint: Checkpoint
    port_class: type
    config: VllmConfig
    _built: list[nn.Module] = field(default_factory=list)

    def build(self, ranks: int = 1, rank: int = 0, **hf_config: Any) -> Blueprint:
        """Build the port as rank `rank` of `ranks` would; whatever its code raises passes through.

        `hf_config`: values of the model's configuration to change first.
        """
        config = copy.copy(self.config)
        config.parallel_config = copy.copy(self.config.parallel_config)
        config.parallel_config.tensor_parallel_size = ranks
        config.compilation_config = copy.copy(self.config.compilation_config)
        # Attention layers enter themselves here, each name once.
        config.compilation_config.static_forward_context = {}
        config.compilation_config.static_all_moe_layers = []
        if hf_config:
            config.model_config = copy.copy(self.config.model_config)
            config.model_config.hf_config = copy.deepcopy(self.config.model_config.hf_config)
            config.model_config.hf_text_config = config.model_config.hf_config.get_text_config()
            for name, value in hf_config.items():
                setattr(config.model_config.hf_config, name, value)
                setattr(config.model_config.hf_text_config, name, value)
        recorder = Recorder()
        config.quant_config = recorder
        lines: dict[int, int] = {}
        dtype = config.model_config.dtype
        with (
            as_rank(ranks, rank),
            set_default_torch_dtype(dtype),
            EmptyOnMeta(),
            _recorded_lines(str(self.port.modeling), lines),
        ):
            model = initialize_model(
                config, model_class=self.port_class, model_config=config.model_config
            )
        # ids are compared later: the modules must live as long as the workbench.
        self._built.append(model)
        return Blueprint(model, ranks, rank, recorder.asked, lines)


@contextmanager
def workbench(port: Port, checkpoint: Checkpoint) -> Iterator[Workbench]:
    """Prepare this process for building the port: its class, vLLM's config, one-rank groups.

    Raises PortkitError for a port without its class, and what vLLM says to the configuration.
    """
    cls = port_class(port)
    ModelRegistry.register_model(port.architecture, cls)
    _register_config(checkpoint, port)
    expand_latents(port, checkpoint.config, "float32")
    config = engine_config(checkpoint)
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        parallel_state.initialize_model_parallel(1)
        try:
            yield Workbench(port, checkpoint, cls, config)
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def engine_config(checkpoint: Checkpoint, **options: Any) -> VllmConfig:
    """Return what vLLM makes of the checkpoint's configuration; some of it is refused here."""
    profile = Profile.for_device(find_device()[0])
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    arguments = {
        **profile.options,
        "max_model_len": longest(checkpoint.config, profile),
        "enable_prompt_embeds": False,
        **options,
    }
    return EngineArgs(model=str(checkpoint.root), **arguments).create_engine_config()


class EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` gives tensors without storage; that is how layers make room for weights."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty and "out" not in kwargs:
            kwargs["device"] = "meta"
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)


class Recorder(QuantizationConfig):
    """A quantisation that quantises nothing and notes which layer asks, and by which name."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[int, str] = {}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        self.asked[id(layer)] = prefix
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return UnquantizedEmbeddingMethod()
        return None

    @classmethod
    def get_name(cls) -> str:
        return "compressed-tensors"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Recorder:
        return cls()


@contextmanager
def as_rank(ranks: int, rank: int) -> Iterator[None]:
    """Tell vLLM's code that this process is rank `rank` of `ranks`."""
    group = parallel_state.get_tp_group()
    before = group.world_size, group.rank_in_group
    group.world_size, group.rank_in_group = ranks, rank
    try:
        yield
    finally:
        group.world_size, group.rank_in_group = before


@contextmanager
def _recorded_lines(file: str, lines: dict[int, int]) -> Iterator[None]:
    """Note for each module made inside the block the line of `file` that made it."""
    original = nn.Module.__init__
    wanted = str(Path(file).resolve())

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            # Frames in which `self` is this module are its own constructors.
            if frame.f_locals.get("self") is not self and frame.f_code.co_filename == wanted:
                lines[id(self)] = frame.f_lineno
                break
            frame = frame.f_back
        original(self, *args, **kwargs)

    nn.Module.__init__ = recorded
    try:
        yield
    finally:
        nn.Module.__init__ = original
