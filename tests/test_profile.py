"""Tolerances follow what float32 itself costs with the weights at hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from portkit.create import new_port
from portkit.live.checkpoint import open_checkpoint
from portkit.live.parity import compare
from portkit.live.profile import CPU, MOST, Profile
from portkit.live.reference import Reference


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tolerance_follows_the_models_own_rounding(device: str) -> None:
    profile = Profile.for_device(device)
    usual = profile.logprobs
    assert profile.measured(1e-7).value < usual.value, "a quiet model is held to more"
    for find in (profile.measured, profile.allowed):
        assert find(0.002).value == pytest.approx(0.002 * profile.seen), "a noisy one its due"
        assert "rounding" in find(0.002).reason
        assert find(1.0).value < 1, "but nothing passes for equal that is not"
        assert find(math.inf) == usual, "not measured: as usual"
    assert profile.allowed(1e-7) == usual


def test_only_a_chunked_scan_is_allowed_more_on_a_gpu() -> None:
    profile = Profile.for_device("cuda")
    noise = 2 * profile.logprobs.value / profile.seen
    plain, scanned = profile.allowed(noise).value, profile.with_scan().allowed(noise).value
    assert plain == pytest.approx(CPU.seen * noise), "others as on a CPU"
    assert plain < scanned <= MOST


@pytest.mark.vllm
def test_what_fails_by_little_is_judged_by_the_noise_of_its_own_tokens(tmp_path) -> None:
    """Here all logits are large; in a recurrent state rounding adds up along a prompt."""
    port = new_port("helium", architecture="HeliumForCausalLM", root=tmp_path)
    index = json.loads((port.checkpoint / "model.safetensors.index.json").read_text())
    path = port.checkpoint / index["weight_map"]["model.norm.weight"]
    with safe_open(path, "pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    tensors["model.norm.weight"] *= 500
    save_file(tensors, path, metadata={"format": "pt"})
    reference = Reference(port, open_checkpoint(port.checkpoint))
    ids = tuple(range(5, 25))
    theirs, noise = reference.logprobs(ids), reference.noise(ids)
    allowed = CPU.measured(noise).value
    assert 1e-3 < allowed < 0.1, (noise, allowed)
    for distance, ok in ((0.9 * allowed, True), (1.1 * allowed, False), (math.nan, False)):
        ours = torch.from_numpy(theirs).clone()
        ours[7, 3] += distance
        found = compare("a prompt", ours.numpy(), theirs, 1e-4)
        again = reference.second_look(found, ids, CPU)
        assert not found.ok and again.ok == ok, (distance, again)
        assert ("allowed" in again.name) == ok, again.name
