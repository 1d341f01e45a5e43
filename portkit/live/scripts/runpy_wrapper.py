"""The older guide's way: register by hand, then run vLLM's API server as the main module.

usage: runpy_wrapper.py MODULE:CLASS --model DIR [server options]
"""

import importlib
import os
import runpy
import sys

from vllm import ModelRegistry

VARIABLE = "RUNPY_WRAPPER_MODEL"

if __name__ == "__main__":
    os.environ[VARIABLE] = sys.argv.pop(1)

# vLLM spawns the processes that hold the model, and each imports the main module again: this
# registers there too.
module, _, name = os.environ[VARIABLE].partition(":")
ModelRegistry.register_model(name, getattr(importlib.import_module(module), name))

if __name__ == "__main__":
    # Not alter_sys=True, as in the older guide: the main module would be the server's from here on,
    # the spawned processes would not register, and vLLM would serve its Transformers backend.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
