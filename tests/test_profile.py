"""Tolerances follow what float32 itself costs with the weights at hand."""

from __future__ import annotations

import math

import pytest

from portkit.live.profile import Profile


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tolerance_follows_the_models_own_rounding(device: str) -> None:
    profile = Profile.for_device(device)
    usual = profile.logprobs
    assert profile.measured(1e-7).value < usual.value, "a quiet model is held to more"
    for find in (profile.measured, profile.allowed):
        assert find(0.01).value == pytest.approx(0.05), "a noisy one is given what it needs"
        assert "rounding" in find(0.01).reason
        assert find(1.0).value < 1, "but nothing passes for equal that is not"
        assert find(math.inf) == usual, "not measured: as usual"
    assert profile.allowed(1e-7) == usual
