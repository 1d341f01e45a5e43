"""Step out_of_tree: the plugin in a fresh process and behind a server; and what can go wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from portkit.checks.base import CheckContext
from portkit.create import new_port
from portkit.live.client import live_for
from portkit.steps.out_of_tree.checks import (
    FreshProcess,
    Installs,
    NoCudaOnImport,
    RunpyWrapper,
    Serves,
)
from portkit.steps.out_of_tree.draft import draft

GOLDEN = Path(__file__).parent / "ports" / "helium" / "weights.py"
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    port = new_port(
        "helium", architecture="HeliumForCausalLM", root=tmp_path_factory.mktemp("ports")
    )
    port.apply({port.modeling: GOLDEN.read_text()}, "the finished port")
    return port


def run(check, port):
    return check().run(CheckContext(port, live_for(port)))


@pytest.fixture
def plugin(port):
    """The drafted plugin; what a test writes over it is taken back."""
    for name, text in draft(port).files:
        port.apply({port.root / name: text}, "draft of out_of_tree")
    text = port.init_file.read_text()
    yield text
    port.init_file.write_text(text)


def test_before_the_draft_nothing_is_registered(port):
    assert run(Installs, port).status == "passed"
    verdict = run(NoCudaOnImport, port)
    assert verdict.status == "failed" and "register" in verdict.what


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "    from vllm import",
            "    import torch; torch.zeros(1, device='cuda')\n    from vllm import",
            "initialises CUDA",
        ),
        (
            "    from vllm import",
            "    import torch; torch.cuda.current_device()\n    from vllm import",
            "initialises CUDA",
        ),
        (
            '        "HeliumForCausalLM",\n',
            '        "HeliumForCasualLM",\n',
            "does not know HeliumForCausalLM",
        ),
        (
            "    from vllm import",
            "    import vllm_helium.modeling_helium\n    from vllm import",
            "imports vllm_helium.modeling_helium",
        ),
        ("    from vllm import", "    from vlm import", "register() fails"),
    ],
)
def test_a_wrong_register_is_named(port, plugin, old, new, said):
    assert old in plugin
    port.init_file.write_text(plugin.replace(old, new, 1))
    verdict = run(NoCudaOnImport, port)
    assert verdict.status == "failed" and said in verdict.what
    if "CUDA" in said:  # the port's own line, not torch's
        assert "vllm_helium/__init__.py:" in verdict.where


def test_a_misspelt_group_is_named(port, plugin):
    path = port.root / "pyproject.toml"
    text = path.read_text()
    path.write_text(text.replace("vllm.general_plugins", "vllm.general_plugin"))
    verdict = run(Installs, port)
    path.write_text(text)
    assert verdict.status == "failed" and "vllm.general_plugins" in verdict.what
    assert run(Installs, port).status == "passed"


def test_a_fresh_process_finds_it_and_a_server_answers(port, plugin):
    assert run(NoCudaOnImport, port).status == "passed"
    for check in (FreshProcess, Serves):
        verdict = run(check, port)
        assert verdict.status == "passed", verdict.what


def test_the_older_guides_wrapper_works_without_the_plugin(port, plugin):
    verdict = run(RunpyWrapper, port)
    assert verdict.status == "passed", verdict.what
