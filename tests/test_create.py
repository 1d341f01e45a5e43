"""New ports: whole or not at all, and each kind of bad input with its own error."""

import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from portkit.create import decide, new_port
from portkit.errors import PortkitError
from portkit.port import open_port

HELIUM = Path(__file__).parent.parent / "portkit" / "models" / "helium" / "checkpoint"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HELIUM, tmp_path / "checkpoint"))


def refused(tmp_path: Path, match: str, **asked) -> PortkitError:
    """Ask for a port, see it refused in these words, and nothing left behind."""
    root = tmp_path / "ports"
    with pytest.raises(PortkitError, match=match) as error:
        new_port("mine", root=root, **asked)
    assert not root.exists() or not list(root.iterdir())
    return error.value


def test_a_new_port_is_a_repository_and_a_plugin(tmp_path):
    port = new_port("helium", architecture="helium", root=tmp_path)
    assert port.architecture == "HeliumForCausalLM"
    project = tomllib.loads((port.root / "pyproject.toml").read_text())
    plugins = project["project"]["entry-points"]["vllm.general_plugins"]
    assert plugins == {"vllm_helium": "vllm_helium:register"}
    assert (port.root / port.package / "__init__.py").is_file()
    assert not port.modeling.exists() and port.source == ""
    tracked = port.git("ls-files").split()
    assert "port.toml" in tracked and not any("checkpoint" in name for name in tracked)
    assert not port.git("status", "--porcelain")
    assert (port.checkpoint / "config.json").is_file() and not port.checkpoint.is_symlink()


@pytest.mark.parametrize("model", ["helium", "HeliumForCausalLM"])
def test_a_model_by_name_or_class(tmp_path, model):
    assert (
        new_port("one", architecture=model, root=tmp_path).meta["checkpoint"]["kind"] == "bundled"
    )


def test_the_readers_checkpoint_is_linked_and_says_the_architecture(tmp_path, checkpoint):
    port = new_port("mine", checkpoint=checkpoint, root=tmp_path / "ports")
    assert port.architecture == "HeliumForCausalLM"
    assert port.checkpoint.is_symlink() and port.checkpoint.resolve() == checkpoint.resolve()
    assert port.meta["checkpoint"]["kind"] == "reader"


@pytest.mark.parametrize("name", ["my-model", "3x", "Großes", "", "../x", "a b"])
def test_a_name_that_is_no_module_name_is_refused(tmp_path, name):
    with pytest.raises(PortkitError, match="cannot name a port") as error:
        new_port(name, architecture="helium", root=tmp_path)
    better = error.value.next.rsplit(" ", 1)[-1].rstrip(".")
    assert better.isidentifier() and better.isascii()


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("chapter one")
    with pytest.raises(PortkitError, match="exists already"):
        new_port("mine", architecture="helium", root=tmp_path)
    assert (tmp_path / "mine" / "novel.txt").read_text() == "chapter one"


def test_unknown_architectures_get_the_closest_names(tmp_path):
    assert (
        "HeliumForCausalLM"
        in refused(tmp_path, "no decoder-only", architecture="HelumForCausalLM").next
    )
    assert "Did you mean" not in refused(tmp_path, "no decoder-only", architecture="xyzzy42").next
    assert "Which model" in refused(tmp_path, "Which model").what


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("t5", "encoder-decoder"),
        ("BartForConditionalGeneration", "encoder-decoder"),
        ("whisper", "speech"),
        ("Qwen2VLForConditionalGeneration", "multimodal"),
        ("Phi4MultimodalForCausalLM", "multimodal"),
        ("bert", "masked"),
    ],
)
def test_other_kinds_of_model_are_called_by_name(tmp_path, model, kind):
    refused(tmp_path, kind, architecture=model)


def test_the_catalogue_is_read_without_importing_transformers():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from portkit.architectures import find_architecture\n"
        "assert find_architecture('gpt2').name == 'GPT2LMHeadModel'\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)\n"
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert float(done.stdout) < 5, done.stderr


# ---- checkpoints --------------------------------------------------------------------------------


def test_checkpoint_and_model_that_disagree(tmp_path, checkpoint):
    error = refused(tmp_path, "says HeliumForCausalLM", architecture="llama", checkpoint=checkpoint)
    assert "LlamaForCausalLM" in error.what


def test_no_such_folder(tmp_path):
    refused(tmp_path, "no checkpoint folder", checkpoint="kyutai/helium-1-2b")


def test_no_config(tmp_path, checkpoint):
    (checkpoint / "config.json").unlink()
    refused(tmp_path, "no config.json", checkpoint=checkpoint)


@pytest.mark.parametrize("text", ['{"architectures": [', "[]", "\ud800".encode("utf-8", "replace")])
def test_a_config_that_cannot_be_read(tmp_path, checkpoint, text):
    data = text if isinstance(text, bytes) else text.encode()
    (checkpoint / "config.json").write_bytes(data)
    refused(tmp_path, r"config\.json (cannot be read|holds a list)", checkpoint=checkpoint)


def test_a_config_without_architectures(tmp_path, checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "helium"}')
    refused(tmp_path, 'no "architectures"', checkpoint=checkpoint)


def test_a_truncated_shard(tmp_path, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 1000)
    assert shard.name in refused(tmp_path, "truncated", checkpoint=checkpoint).what


def test_a_shard_whose_header_is_corrupt(tmp_path, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    with shard.open("r+b") as stream:
        stream.seek(8)
        stream.write(b"\xff" * 40)
    assert shard.name in refused(tmp_path, "corrupt", checkpoint=checkpoint).what


def test_a_shard_that_is_no_safetensors_file(tmp_path, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(struct.pack("<Q", 10**15) + b"<html>404</html>")
    refused(tmp_path, "not a whole safetensors file", checkpoint=checkpoint)


def test_a_shard_that_the_index_names_and_that_is_absent(tmp_path, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[2]
    shard.unlink()
    assert shard.name in refused(tmp_path, "absent", checkpoint=checkpoint).what


def test_no_weights_at_all(tmp_path, checkpoint):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    refused(tmp_path, "no .*safetensors", checkpoint=checkpoint)


def test_a_pickle_is_refused_until_the_reader_trusts_it(tmp_path, checkpoint):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "--allow-pickle" in refused(tmp_path, "pickle", checkpoint=checkpoint).next


@pytest.mark.vllm
def test_a_trusted_pickle_is_converted_and_one_with_code_is_not(tmp_path, checkpoint):
    make = (
        "import sys, torch, pathlib\nfrom safetensors.torch import load_file\n"
        "folder = pathlib.Path(sys.argv[1]); state = {}\n"
        "for path in folder.glob('*.safetensors'): state |= load_file(path); path.unlink()\n"
        "torch.save(state, folder / 'pytorch_model.bin')"
    )
    subprocess.run([sys.executable, "-c", make, str(checkpoint)], check=True, timeout=120)
    (checkpoint / "model.safetensors.index.json").unlink()
    port = new_port("mine", checkpoint=checkpoint, root=tmp_path / "ports", allow_pickle=True)
    assert list(port.checkpoint.glob("*.safetensors")) and not port.checkpoint.is_symlink()
    assert (port.checkpoint / "tokenizer.json").is_file()
    # A pickle that calls a function when it is loaded.
    trap = tmp_path / "trap"
    pickled = f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()
    (checkpoint / "pytorch_model.bin").write_bytes(pickled)
    refused_root = tmp_path / "other"
    with pytest.raises(PortkitError, match="cannot be read as plain tensors"):
        new_port("mine", checkpoint=checkpoint, root=refused_root, allow_pickle=True)
    assert not (refused_root / "mine").exists() and not trap.exists()


@pytest.mark.vllm
def test_an_architecture_without_a_bundled_checkpoint_gets_a_hardened_one(tmp_path):
    port = new_port("gemma2", architecture="gemma2", root=tmp_path)
    config = json.loads((port.checkpoint / "config.json").read_text())
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    look = (
        "import sys, pathlib\nfrom safetensors.torch import load_file\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.safetensors'):\n"
        "    for name, t in load_file(path).items():\n"
        "        if 'norm' in name or 'bias' in name: assert float(t.std()) > 0.05, name"
    )
    done = subprocess.run(
        [sys.executable, "-c", look, str(port.checkpoint)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(port.checkpoint.glob("*.safetensors"))) > 1


# ---- source files -------------------------------------------------------------------------------


def test_a_source_that_does_not_parse_names_the_line(tmp_path, checkpoint):
    source = tmp_path / "modeling_x.py"
    source.write_text("import torch\n\nclass X(:\n    pass\n")
    error = refused(tmp_path, "no valid Python", source=source, checkpoint=checkpoint)
    assert error.where.endswith(":3") and "class X(:" in error.what


def test_a_source_without_the_class_names_what_it_has(tmp_path, checkpoint):
    source = tmp_path / "modeling_x.py"
    source.write_text("class HeliumForCausalLm:\n    pass\n")
    error = refused(tmp_path, "defines no class Helium", source=source, checkpoint=checkpoint)
    assert "HeliumForCausalLm" in error.next


def test_a_source_needs_a_checkpoint_and_must_exist(tmp_path, checkpoint):
    source = tmp_path / "modeling_x.py"
    refused(tmp_path, "needs a checkpoint", source=source)
    refused(tmp_path, "no file", source=source, checkpoint=checkpoint)


# ---- the disk, and kills ------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        refused(tmp_path, "No space left", architecture="helium")


def test_a_full_disk_in_every_process_leaves_nothing(tmp_path):
    """A limit on file sizes stands for the disk: the checkpoint's shards do not fit."""
    code = (
        "import resource, signal, sys\nfrom portkit.create import new_port\n"
        "from portkit.errors import PortkitError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    new_port('mine', architecture='helium', root=sys.argv[1])\n"
        "except PortkitError as error:\n    print(error.what)"
    )
    root = tmp_path / "ports"
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=60
    )
    assert "could not be made" in done.stdout, done.stderr
    assert not list(root.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PortkitError, match="Permission denied"):
            new_port("mine", architecture="helium", root=tmp_path / "ports")
    finally:
        tmp_path.chmod(0o755)


def test_a_kill_or_an_interrupt_leaves_a_whole_port_or_none(tmp_path):
    code = (
        "import sys\nfrom portkit.create import new_port\nprint('go', flush=True)\n"
        "new_port(sys.argv[2], architecture='helium', root=sys.argv[1])"
    )
    chance = random.Random(3)
    whole = 0
    for round_ in range(12):
        name = f"port{round_}"
        worker = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert worker.stdout.readline() == "go\n"
        time.sleep(chance.uniform(0, 0.5))
        worker.send_signal(signal.SIGINT if round_ % 2 else signal.SIGKILL)
        worker.communicate()
        if (tmp_path / name).exists():
            port = open_port(tmp_path / name)
            assert port.steps_passed() == () and not port.git("status", "--porcelain")
            assert (port.checkpoint / "config.json").is_file()
            whole += 1
    assert whole < 12, "no signal came in time to prove anything"
    new_port("last", architecture="helium", root=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---- the decision -------------------------------------------------------------------------------


def test_a_decision_has_a_place_and_a_reason(tmp_path):
    port = new_port("helium", architecture="helium", root=tmp_path)
    decide(port, "in_tree", "everybody should have it")
    assert port.meta["decisions"]["destination"] == "in_tree"
    with pytest.raises(PortkitError, match="no place"):
        decide(port, "somewhere", "why not")
    with pytest.raises(PortkitError, match="reason"):
        decide(port, "in_tree", "  ")
