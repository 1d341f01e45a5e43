"""What the worker imports before it forks, so that a job's engine starts at once.

Found by running one engine and comparing sys.modules before and after: of some 800 modules that an
engine start still imports after `import vllm`, these are the entries that bring in the rest.
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
    """Do once what every engine start would do again and that leaves nothing behind but its result."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for module in CPU_MODULES:
            importlib.import_module(module)
        # Looks through every attribute of every module, a quarter of a second; once is enough, as
        # the replacements it makes are inherited by the jobs.
        current_platform.register_triton_kernel_overrides()
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
