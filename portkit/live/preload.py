"""What the worker imports before it forks, so that a job's engine starts at once.

Found by running one engine and comparing sys.modules before and after: of some 860 modules that an
engine start still imports after `import vllm`, these are the entries that bring in all but 30.

Measured on two cores without a GPU (vLLM 0.32.0, CPU build; Llama of two layers; seconds):

| | |
|---|---|
| worker ready (everything below imported, files in the page cache) | 5.5 |
| job from fork to result: engine start, 4 tokens of prompt, 2 generated, engine stopped | 0.8-1.2 |
| the same with only `vllm` and `vllm.entrypoints.llm` imported | 3.9-4.7 |
| the same with two tensor-parallel ranks, forked (ranks.py) | 2.1 |

The rest of a job's time, where a profile puts it: engine start 0.5 (of which the KV cache is
zeroed at 0.26 per GiB, unless it is made small), the first generation 0.1-0.3, shutdown 0.3.
Three things that are not imports cost more than that before they were dealt with: vLLM's sampler
compiles a function by itself, 1.4 (12 with an empty cache), where log-probabilities are asked for
(torch.compiler.set_stance("force_eager") in an eager engine); its shutdown collects garbage over
the worker's whole heap, 1.4 (child.py keeps that frozen); and the CPU platform looks through every
module for Triton kernels to replace, 0.25 (`warm`).

General plugins (`vllm.general_plugins`) are not loaded here: the port may be one, and a job must
read it afresh. The worker is one thread afterwards and has not initialised CUDA.
"""

from __future__ import annotations

import importlib

MODULES = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.config",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.transformers",
    "vllm.model_executor.models.deepseek_v2",
    "vllm.model_executor.layers.quantization.fp8",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
)

CPU_MODULES = (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.attention.backends.cpu_attn",
)


def warm() -> None:
    """Do once what every engine start would do again, to the same effect."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for module in CPU_MODULES:
            importlib.import_module(module)
        # Looks through every attribute of every module, a quarter of a second; once is enough, as
        # the replacements it makes are inherited by the jobs.
        current_platform.register_triton_kernel_overrides()
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
