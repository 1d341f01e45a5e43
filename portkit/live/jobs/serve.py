"""Serve the port over HTTP as a user would and ask it with the `openai` client.

args: command (the words before the server's options), environment, cwd.
value: answers [{endpoint, prompt, text, expected, finish_reason, expected_reason}], seconds_up,
ends (what is wrong with the end-of-text token, or ""), backend (the line of the server's log that
says that vLLM's Transformers backend serves the model; "" if the port's class does).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
from transformers import AutoTokenizer

from portkit.errors import PortkitError
from portkit.live.checkpoint import open_checkpoint
from portkit.live.device import find_device
from portkit.live.engine import expand_latents
from portkit.live.job import JobRequest
from portkit.live.profile import Profile
from portkit.live.prompts import prompts_for
from portkit.live.reference import Reference
from portkit.live.subprocesses import free_port, server, user_environment
from portkit.port import Port

TOKENS = 64
UP_SECONDS = 240.0
BACKEND = ("Using Transformers modeling backend", "falling back to Transformers implementation")
"""What vLLM logs when it serves an architecture that it does not know."""


def run(request: JobRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Start the server, compare its text with Transformers', stop it.

    Raises PortkitError if the server does not come up, or the checkpoint has no tokenizer.
    """
    port = Port(Path(request.port_root))
    checkpoint = open_checkpoint(port.checkpoint)
    if not (checkpoint.root / "tokenizer.json").is_file():
        raise PortkitError(
            "The checkpoint has no tokenizer.json, so no text can be served.",
            str(checkpoint.root),
            "Put the model's tokenizer files beside its weights.",
        )
    texts = prompts_for(port, checkpoint, longest=256).texts or ("Once upon a time",)
    expand_latents(port, checkpoint.config, "float32")
    number = free_port()
    command = [*request.args["command"], *_options(checkpoint.config), "--port", str(number)]
    command = [str(port.checkpoint.resolve()) if word == "CHECKPOINT" else word for word in command]
    began = time.monotonic()
    say("starting the server: " + " ".join(request.args["command"][-4:]))
    with server(
        command,
        number,
        cwd=Path(request.args["cwd"]),
        environment=user_environment({**request.args["environment"], "VLLM_LOGGING_LEVEL": "INFO"}),
        log=port.state_dir / "logs" / "server.log",
        say=say,
        timeout=UP_SECONDS,
    ) as base:
        seconds_up = time.monotonic() - began
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=120)
        model = client.models.list().data[0].id
        say(f"the server is up after {seconds_up:.0f} s; asking it")
        answers = [_complete(client, model, text) for text in texts]
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.root), local_files_only=True)
        if tokenizer.chat_template:
            answers.append(_chat(client, model, texts[0]))
    log = (port.state_dir / "logs" / "server.log").read_text(errors="replace")
    say("Transformers on the same prompts")
    reference = Reference(port, checkpoint)
    return {
        "answers": [_expect(a, reference, tokenizer, checkpoint.root) for a in answers],
        "seconds_up": seconds_up,
        "ends": _strange_end(checkpoint.root, checkpoint.config, tokenizer),
        "backend": next(
            (line for line in log.splitlines() if any(said in line for said in BACKEND)), ""
        ),
    }


def _options(config: dict[str, Any]) -> list[str]:
    options = Profile.for_device(find_device()[0]).options
    longest = min(int(config.get("max_position_embeddings") or 512), 512)
    words = [
        "--host",
        "127.0.0.1",
        "--dtype",
        options["dtype"],
        "--enforce-eager",
        "--max-model-len",
        str(longest),
        "--max-num-seqs",
        "8",
    ]
    if "gpu_memory_utilization" in options:
        words += ["--gpu-memory-utilization", str(options["gpu_memory_utilization"])]
        words += ["--kv-cache-memory-bytes", str(options["kv_cache_memory_bytes"])]
    if "attention_config" in options:
        words += ["--attention-config", json.dumps(options["attention_config"])]
    return words


def _complete(client: openai.OpenAI, model: str, text: str) -> dict[str, Any]:
    answer = client.completions.create(model=model, prompt=text, max_tokens=TOKENS, temperature=0.0)
    choice = answer.choices[0]
    return {
        "endpoint": "/v1/completions",
        "prompt": text,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
    }


def _chat(client: openai.OpenAI, model: str, text: str) -> dict[str, Any]:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=TOKENS,
        temperature=0.0,
    )
    choice = answer.choices[0]
    return {
        "endpoint": "/v1/chat/completions",
        "prompt": text,
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
    }


def _expect(
    answer: dict[str, Any], reference: Reference, tokenizer: Any, root: Path
) -> dict[str, Any]:
    """Add what Transformers says: its greedy tokens up to the end-of-text token."""
    if answer["endpoint"].endswith("chat/completions"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": answer["prompt"]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
    else:
        ids = tokenizer(answer["prompt"])["input_ids"]
    tokens, _ = reference.greedy(ids, TOKENS)
    stops = _stop_ids(root)
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    kept = tokens if end is None else tokens[:end]
    return {
        **answer,
        "expected": tokenizer.decode(kept, skip_special_tokens=True),
        "expected_reason": "length" if end is None else "stop",
    }


def _stop_ids(root: Path) -> set[int]:
    """Return the end-of-text ids that Transformers' generate would stop at."""
    for name in ("generation_config.json", "config.json"):
        path = root / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return {found} if isinstance(found, int) else set(found)
    return set()


def _strange_end(root: Path, config: dict[str, Any], tokenizer: Any) -> str:
    """Say so if generation_config.json ends texts by a token that nothing else knows as an end."""
    own = root / "generation_config.json"
    stops = _stop_ids(root) if own.is_file() else set()
    other = config.get("eos_token_id")
    known = {other, tokenizer.eos_token_id} if not isinstance(other, list) else {*other}
    known = {*known, tokenizer.eos_token_id} - {None}
    if not stops or not known or stops & known:
        return ""
    shown = ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in sorted(stops))
    right = ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in sorted(known))
    return f"generation_config.json ends a text by token {shown}; config and tokenizer by {right}."
