"""The older guide's way: register by hand, then run vLLM's API server as the main module.

usage: runpy_wrapper.py MODULE:CLASS --model DIR [server options]
"""

import importlib
import runpy
import sys

from vllm import ModelRegistry

module, _, name = sys.argv[1].partition(":")
ModelRegistry.register_model(name, getattr(importlib.import_module(module), name))

if __name__ == "__main__":
    del sys.argv[1]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
