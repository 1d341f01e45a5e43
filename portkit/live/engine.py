"""vLLM's engine in this process, running the port's class on a checkpoint.

One way in for every job that wants a live engine. `start` registers the port's class object under
its architecture and then makes sure that this is the class that runs: vLLM serves an architecture
it does not know through its Transformers backend, without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.mamba.gdn.base import GatedDeltaNetAttention
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from portkit.errors import PortkitError
from portkit.live import loader as portkit_loader
from portkit.live.checkpoint import Checkpoint, open_checkpoint
from portkit.live.device import find_device
from portkit.live.float32_kernels import allow_float32
from portkit.live.portmodule import port_class
from portkit.live.profile import Profile
from portkit.live.ranks import forked_ranks, imports_without_cuda
from portkit.live.reference import one_thread_if_small
from portkit.live.stages import room_for_the_stage_before, stages_agree
from portkit.port import Port

Prompt = Sequence[int] | torch.Tensor
"""Token ids, or embeddings of shape [n, hidden size] in the engine's dtype."""
CHUNKED_SCAN = "mamba_chunk_scan_combined_varlen"
"""vLLM's kernel for Mamba 2: see `Profile.scanned`."""

POSITION_FIELDS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"),
    *("model_max_length", "max_sequence_length", "max_seq_length", "seq_len"),
)
"""vLLM takes the smallest of those that a config has (model_arch_config_convertor.py)."""
"""Config fields that say how many positions a model has; older ones have their own names."""


@dataclass(frozen=True)
class Generated:
    """What the engine answered to one prompt."""

    tokens: tuple[int, ...]
    """The generated token ids."""
    logprobs: np.ndarray
    """float32 [len(tokens), vocab]: row i is the distribution that token i was taken from."""
    prompt_logprobs: np.ndarray
    """float32 [n - 1, vocab]: row i is the distribution after prompt tokens 0..i.

    [0, vocab] if not asked for.
    """

    @property
    def rows(self) -> np.ndarray:
        """float32 [n, vocab]: the distribution after each prompt token, the last one included."""
        return np.concatenate([self.prompt_logprobs, self.logprobs[:1]])


@dataclass
class Engine:
    """A started engine. Use `start`; it is stopped when its `with` block ends."""

    llm: LLM
    port: Port
    checkpoint: Checkpoint
    profile: Profile
    port_class: type
    tensor_parallel_size: int
    schedule: list[dict[str, int]] = field(default_factory=list)
    """What the scheduler decided: per engine step, request id -> number of tokens computed."""

    @property
    def runner(self) -> Any:
        """vLLM's model runner (one process only)."""
        return self._core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> nn.Module:
        """The port's model, inside the runner (one process only)."""
        return self.runner.get_model()

    @property
    def _core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def vocab_size(self) -> int:
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    def on_model(self, function: Callable[[nn.Module], Any]) -> list[Any]:
        """Call a module-level function on every rank's model and return their answers."""
        return self.llm.apply_model(function)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int = 1,
        *,
        prompt_logprobs: bool = False,
        adapter: LoRARequest | None = None,
    ) -> list[Generated]:
        """Run prompts together, greedily, with the log-probabilities of the whole vocabulary.

        Ends only at max_tokens: an end-of-text token is a token like any other here. `adapter`
        needs an engine with enable_lora.
        """
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            logprobs=-1,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=-1 if prompt_logprobs else None,
            flat_logprobs=True,
        )
        inputs = [
            {"prompt_embeds": p} if isinstance(p, torch.Tensor) else {"prompt_token_ids": list(p)}
            for p in prompts
        ]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False, lora_request=adapter)
        return [
            Generated(
                tuple(output.outputs[0].token_ids),
                self._table(output.outputs[0].logprobs, 0),
                # The first prompt token has no distribution: nothing came before it.
                self._table(output.prompt_logprobs, 1),
            )
            for output in outputs
        ]

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], *, together: bool = False
    ) -> list[np.ndarray]:
        """Return float32 [n, vocab] per prompt: the distribution after each of its n tokens.

        One prompt at a time, or all of them in one batch.
        """
        if together:
            return [g.rows for g in self.generate(prompts, prompt_logprobs=True)]
        return [self.generate([p], prompt_logprobs=True)[0].rows for p in prompts]

    def recover(self) -> None:
        """Forget the requests that an exception in the model left unfinished."""
        llm_engine = self.llm.llm_engine
        llm_engine.abort_request(list(llm_engine.output_processor.request_states), internal=True)

    @contextmanager
    def recorded_schedule(self) -> Iterator[list[dict[str, int]]]:
        """Collect the scheduler's decisions made inside the block."""
        start = len(self.schedule)
        taken: list[dict[str, int]] = []
        yield taken
        taken.extend(step for step in self.schedule[start:] if step)

    @contextmanager
    def embedding_inputs(self, on: bool) -> Iterator[None]:
        """Inside the block the runner gives the model inputs_embeds, or token ids, always."""
        runner = self.runner
        before = runner.enable_prompt_embeds
        runner.enable_prompt_embeds = on
        try:
            yield
        finally:
            runner.enable_prompt_embeds = before

    def _table(self, flat: Any, skip: int) -> np.ndarray:
        if flat is None:
            return np.zeros((0, self.vocab_size), np.float32)
        starts, ends = flat.start_indices[skip:], flat.end_indices[skip:]
        ids = np.asarray(flat.token_ids, np.int64)
        values = np.asarray(flat.logprobs, np.float32)
        table = np.full((len(starts), self.vocab_size), np.nan, np.float32)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            table[row, ids[start:end]] = values[start:end]
        return table

    def _record_schedule(self) -> None:
        scheduler = self._core.scheduler
        original = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.schedule.append(dict(output.num_scheduled_tokens))
            return output

        scheduler.schedule = schedule


@contextmanager
def start(
    root: Path,
    *,
    loader: Literal["portkit", "port"],
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    checkpoint: Path | None = None,
    **llm_options: Any,
) -> Iterator[Engine]:
    """Start vLLM on the port and yield the engine; stop it afterwards.

    `loader`: "portkit" fills the weights for the port, "port" uses its own load_weights.
    `checkpoint`: another folder than the port's. `llm_options` go to vllm.LLM, over the profile's.
    With several ranks, start before anything else runs torch here: they are forks (ranks.py).
    Raises PortkitError for a bad checkpoint or if another class than the port's was started, and
    whatever the port's own code raises.
    """
    port = Port(Path(root).resolve())
    opened = open_checkpoint(checkpoint or port.checkpoint)
    profile = Profile.for_device(find_device()[0])
    alone = tensor_parallel_size * pipeline_parallel_size == 1
    with nullcontext() if alone or profile.device == "cpu" else imports_without_cuda():
        cls = port_class(port)
    architectures = opened.config["architectures"]
    if port.architecture not in architectures:
        raise PortkitError(
            f"The checkpoint is of {', '.join(architectures)}, not of {port.architecture}.",
            str(opened.root / "config.json"),
            "Use a checkpoint of the architecture being ported.",
        )
    ModelRegistry.register_model(port.architecture, cls)
    reach = longest(opened.config, profile)
    block = int(profile.options["block_size"])
    options = {
        **profile.options,
        "max_model_len": reach,
        # Room for two of the longest prompts. Filling the cache's memory takes seconds on a CPU.
        "num_gpu_blocks_override": 2 * (reach // block) + 32,
        "load_format": portkit_loader.LOAD_FORMAT if loader == "portkit" else "safetensors",
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        **llm_options,
    }
    if not alone:
        # The switch of `embedding_inputs` reaches only a runner in this process.
        options["enable_prompt_embeds"] = False
    _register_config(opened, port)
    # One process holds engine and model, so that a job can reach the model.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Needed to call a function on the models of other ranks; nothing comes over a network here.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    # The runner that takes inputs_embeds from any prompt; the newer one does not yet.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    expand_latents(port, opened.config, str(options["dtype"]))
    options.update(allow_float32(profile.device, str(options["dtype"])))
    if profile.device == "cpu":
        one_thread_if_small(opened)  # vLLM fixes the number when its worker starts
    if options["enforce_eager"]:
        # vLLM's sampler compiles small functions of its own: 12 s the first time, for nothing here.
        torch.compiler.set_stance("force_eager")
    with _dummy_runs_by_ids() if alone else forked_ranks(), stages_agree():
        llm = LLM(str(opened.root), **options)
    engine = Engine(llm, port, opened, profile, cls, tensor_parallel_size)
    try:
        if pipeline_parallel_size > 1:
            llm.collective_rpc(room_for_the_stage_before)
        engine._record_schedule()
        if alone:
            engine.runner.enable_prompt_embeds = False
        served = set(engine.on_model(_class_of))
        if served != {(cls.__module__, cls.__qualname__)}:
            raise PortkitError(
                f"vLLM started {' and '.join('.'.join(s) for s in sorted(served))}, not the "
                f"port's class.",
                f"{cls.__module__}.{cls.__qualname__}",
                'Its name must be the one in config.json\'s "architectures".',
            )
        scheduler = llm.llm_engine.vllm_config.scheduler_config
        if scheduler.max_num_batched_tokens < reach and not scheduler.enable_chunked_prefill:
            # A longer prompt would never be scheduled, and generate never end.
            raise PortkitError(
                "vLLM turned chunked prefill off: the port has attention that is not causal, in "
                "which a prompt's tokens see later ones.",
                f"{cls.__module__}.{cls.__qualname__}",
                "portkit compares causal models: use Attention where the original's is causal.",
            )
        if any(engine.on_model(_scans_in_chunks)):
            engine.profile = profile.with_scan()
        yield engine
    finally:
        llm.llm_engine.engine_core.shutdown()
        if alone:
            cleanup_dist_env_and_memory()


def expand_latents(port: Port, config: dict[str, Any], dtype: str) -> None:
    """Have vLLM take plain Attention for latent attention, for this process, where it has to.

    Where the file says so (it expands latents itself), and where checks choose the dtype: vLLM's
    kernels for latents take 16 bits, or one size of head. "auto" is what users run. Attention that
    is sparse (index_topk) has no other form in vLLM.
    """
    latents = config.get("kv_lora_rank") and not config.get("index_topk")
    if "VLLM_MLA_DISABLE" in port.source or (latents and dtype != "auto"):
        os.environ["VLLM_MLA_DISABLE"] = "1"


def longest(config: dict[str, Any], profile: Profile) -> int:
    """Return the context length to start with: all positions the model has, within reason.

    Beyond a sliding window or a rotary scaling's original length, if the model has one.
    """
    lengths = [config.get(field) for field in POSITION_FIELDS]
    positions = min((n for n in lengths if isinstance(n, int) and n > 0), default=profile.far)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    marks = [config.get("sliding_window"), rope.get("original_max_position_embeddings")]
    wanted = max([profile.far, *(int(m) + 128 for m in marks if isinstance(m, int))])
    return min(positions, wanted, 8192)


def _register_config(checkpoint: Checkpoint, port: Port) -> None:
    """Make a configuration class that the port brings along known to Transformers."""
    model_type = checkpoint.config.get("model_type", "")
    if model_type in CONFIG_MAPPING:
        return
    package = port.package
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            for value in list(vars(module).values()):
                if (
                    isinstance(value, type)
                    and issubclass(value, PreTrainedConfig)
                    and value.model_type == model_type
                ):
                    AutoConfig.register(model_type, value)
                    return


@contextmanager
def _dummy_runs_by_ids() -> Iterator[None]:
    """Inside the block vLLM's dummy runs give the model token ids, inputs_embeds enabled or not.

    The runner's embeddings are as wide as the layers. An OPT with word_embed_proj_dim takes
    narrower ones, and would stop in the run that measures a GPU's memory.
    """
    dummy_run = GPUModelRunner._dummy_run

    def by_ids(runner: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        enabled, runner.enable_prompt_embeds = runner.enable_prompt_embeds, False
        try:
            return dummy_run(runner, *args, **kwargs)
        finally:
            runner.enable_prompt_embeds = enabled

    GPUModelRunner._dummy_run = by_ids
    try:
        yield
    finally:
        GPUModelRunner._dummy_run = dummy_run


def _class_of(model: nn.Module) -> tuple[str, str]:
    return type(model).__module__, type(model).__qualname__


def _scans_in_chunks(model: nn.Module) -> bool:
    """Whether a layer's class, or one it inherits from, is written where the scan is imported.

    Gated delta nets take decays in a chunk as differences of running sums, too.
    """
    if any(isinstance(module, GatedDeltaNetAttention) for module in model.modules()):
        return True
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    return any(hasattr(sys.modules.get(cls.__module__), CHUNKED_SCAN) for cls in classes)
