"""Write a checkpoint of an architecture at a given size, bfloat16, weights random: for speed only.

args: model_type, config (fields over the configuration class's defaults, those that it has), out.
value: parameters. The model is never built in memory; numbers mean nothing in what it generates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from portkit.live.job import JobRequest

SPREAD = 0.02
"""Standard deviation of the matrices; norms are one."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the tensors one after the other and write them as one safetensors file."""
    args = request.args
    out = Path(str(args["out"]))
    out.mkdir(parents=True, exist_ok=True)
    default = AutoConfig.for_model(args["model_type"])
    fields = {k: v for k, v in args["config"].items() if hasattr(default, k)}
    config = AutoConfig.for_model(args["model_type"], **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    tensors = {
        name: torch.ones(p.shape, dtype=torch.bfloat16)
        if p.dim() == 1
        else torch.randn(p.shape, dtype=torch.bfloat16) * SPREAD
        for name, p in model.named_parameters()
    }
    say("writing")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    described = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(described, indent=2, default=str) + "\n")
    return {"parameters": sum(t.numel() for t in tensors.values())}
