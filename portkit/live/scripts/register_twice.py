"""Load a plugin as vLLM does, twice, and say what that did: entry points, imports, CUDA.

Run as a plain script in a fresh interpreter. CUDA is watched at torch's own door,
`torch.cuda._lazy_init`, so that a plugin which opens it is seen on a machine without a GPU too.

usage: register_twice.py REQUEST.json    (prints one line "RESULT {json}" at the end)
"""

import json
import sys
import traceback
from importlib.metadata import entry_points


def main() -> None:
    with open(sys.argv[1]) as stream:
        request = json.load(stream)
    import torch

    def place(frames):
        """Return file:line of the deepest frame that is the port's own, "" if none is."""
        own = [frame for frame in frames if request["package"] in frame.filename]
        return f"{own[-1].filename}:{own[-1].lineno}" if own else ""

    opened = []
    lazy_init = torch.cuda._lazy_init

    def watched():
        opened.append(place(traceback.extract_stack()))
        return lazy_init()

    torch.cuda._lazy_init = watched
    error = where = ""
    try:
        for point in entry_points(group="vllm.general_plugins"):
            if point.value.split(":")[0].split(".")[0] == request["package"]:
                register = point.load()
                register()
                register()
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        where = place(traceback.extract_tb(problem.__traceback__))
    from vllm.model_executor.models import ModelRegistry

    answer = {
        "error": error,
        "where": where,
        "cuda_opened": opened,
        "cuda_initialized": torch.cuda.is_initialized(),
        "modeling_imported": request["module"] in sys.modules,
        "supported": request["architecture"] in ModelRegistry.get_supported_archs(),
    }
    print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
