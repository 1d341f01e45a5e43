"""The worker with real processes: every way a job can end, and that nothing is left behind.

Most workers here import nothing (`preload=()`): what is tested is the transport, the failures and
the processes. The tests marked `vllm` do the same with the worker as users have it.
"""

from __future__ import annotations

import contextlib
import json
import os
import py_compile
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from portkit.errors import PortkitError
from portkit.live import client, log
from portkit.live.client import Live, live_for
from portkit.live.failure import describe
from portkit.live.job import JobResult
from portkit.live.preload import MODULES

REPO = Path(__file__).parents[1]

PORT_CODE = '''
import ctypes, os, sys, time


def add(say, a, b):
    say("adding")
    return a + b


def fails(say):
    try:
        {}["weight"]
    except KeyError as error:
        raise ValueError("q_proj has the wrong shape") from error


def leaves(say):
    sys.exit(3)


def exits(say):
    os._exit(4)


def reads(say):
    return input()


def answers_with_a_function(say):
    return add


def portkit_error(say):
    from portkit.errors import PortkitError
    raise PortkitError("The shard is corrupt.", "model-00001.safetensors", "Copy it again.")


def segfaults(say):
    ctypes.string_at(0)


def killed(say):
    os.kill(os.getpid(), 9)


def loops(say):
    say("looping")
    while True:
        time.sleep(0.01)


def loops_in_a_rank(say):
    pid = os.fork()
    if pid == 0:
        loops(say)
    os.waitpid(pid, 0)


def family(say, file):
    """A child, a child in a group of its own, and a daemon that left its parent; then wait."""
    pids = [os.getpid()]
    for leave in (lambda: None, os.setpgrp, daemonise):
        read, write = os.pipe()
        if os.fork() == 0:
            leave()
            os.write(write, str(os.getpid()).encode())
            time.sleep(600)
        pids.append(int(os.read(read, 20)))
    with open(file, "w") as stream:
        stream.write(" ".join(map(str, pids)))
    time.sleep(600)


def daemonise():
    os.setsid()
    if os.fork():
        os._exit(0)


def hoards(say):
    kept = []
    while True:
        kept.append(bytearray(b"x") * (8 << 20))
        time.sleep(0.001)


def bombs(say):
    """Threads, each of which starts others, up to a number that no test machine minds."""
    import threading

    def thread(depth):
        for _ in range(4):
            if depth and threading.active_count() < 400:
                threading.Thread(target=thread, args=(depth - 1,)).start()
        while True:
            time.sleep(0.01)

    thread(6)


def grabs(say):
    return len(b"x" * (30 << 30))


def breeds(say):
    import threading
    while True:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def floods(say):
    line = "x" * 99
    for i in range(1_000_000):
        print(line)
    print("the last line")


def sleeps(say, seconds):
    began = time.time()
    time.sleep(seconds)
    return began, time.time()


def where_am_i(say):
    return [os.getcwd(), os.environ.get("TMPDIR"), len(os.listdir("/proc/self/task"))]


def tells_a_page(say):
    raise RuntimeError("\\n".join(f"page line {n}" for n in range(40)))
'''


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(PORT_CODE.splitlines(), 1) if text in line)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "code_of_port.py").write_text(PORT_CODE)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def _worker_stays() -> Iterator[Live]:
    """One handle stays open, so that the tests share a worker."""
    with Live(None, preload=()) as live:
        live.device()
        yield live


@pytest.fixture
def live(root: Path) -> Iterator[Live]:
    with Live(root, preload=()) as live:
        yield live


def call(
    live: Live, function: str, *, timeout: float = 60, progress: Any = None, **kwargs: Any
) -> JobResult:
    limit = kwargs.pop("max_memory_mib", None)
    return live.run(
        "call",
        timeout=timeout,
        progress=progress,
        max_memory_mib=limit,
        module="code_of_port",
        function=function,
        kwargs=kwargs,
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


def pids_in(file: Path) -> list[int]:
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


# ---- a job that works -----------------------------------------------------------------------


def test_the_kernel_side_imports_neither_torch_nor_vllm():
    code = (
        "import sys, portkit.live.client\n"
        "print([m for m in ('torch', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_job_answers_with_its_progress_device_time_and_memory(live: Live):
    said: list[str] = []
    result = call(live, "add", progress=said.append, a=1, b=2)
    assert (result.ok, result.value, said) == (True, {"returned": 3}, ["adding"])
    assert result.device == "cpu" and result.device_reason
    assert 0 < result.seconds < 10
    assert 5 < result.peak_memory_mib < 500


def test_each_job_reads_the_port_afresh(live: Live, root: Path):
    """Also an edit of the same length within the same second, which a .pyc would hide."""
    file = root / "fresh.py"
    stamp = time.time()
    for number in (1, 2, 3):
        file.write_text(f"def value(say):\n    return {number}\n")
        os.utime(file, (stamp, stamp))
        if number == 1:  # what pip, pytest or a server of the reader's leaves behind
            py_compile.compile(str(file))
        result = live.run("call", module="fresh", function="value")
        assert result.value == {"returned": number}
    assert len(list(root.rglob("*.pyc"))) == 1


def test_a_job_runs_in_the_port_with_a_temporary_folder_of_its_own(live: Live, root: Path):
    where, temporary, threads = call(live, "where_am_i").value["returned"]
    assert where == str(root) and threads == 1
    assert temporary and not Path(temporary).exists()


def test_the_log_lies_in_the_port(live: Live, root: Path):
    result = call(live, "fails")
    assert Path(result.log).parent == root / ".portkit" / "logs"
    assert "Traceback" in Path(result.log).read_text()


def test_live_for_gives_one_handle_for_a_port(root: Path):
    assert live_for(root) is live_for(root / ".." / root.name)
    assert live_for(None) is live_for(None)


def test_the_developers_entry_prints_the_result(root: Path):
    done = subprocess.run(
        [sys.executable, "-m", "portkit.live.run", "echo", str(root), "x=1"],
        cwd=REPO,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2 and "not a port" in done.stderr


# ---- failures in the reader's code ----------------------------------------------------------


def test_an_exception_names_the_line_of_the_port_and_its_cause(live: Live):
    result = call(live, "fails")
    assert result.status == "error"
    assert result.what == "ValueError: q_proj has the wrong shape\ncaused by KeyError: 'weight'"
    line = line_of("raise ValueError")
    assert result.where.startswith(f"code_of_port.py:{line}, in fails: raise ValueError(")
    assert result.next and "Traceback" in result.log_tail


def test_a_page_of_error_is_cut_and_the_log_has_it_all(live: Live):
    result = call(live, "tells_a_page")
    assert result.what.startswith("RuntimeError: page line 0\n")
    assert "page line 39" not in result.what and "the log" in result.what
    assert "page line 39" in result.log_tail


def test_portkits_own_error_keeps_its_three_parts(live: Live):
    result = call(live, "portkit_error")
    assert (result.what, result.where, result.next) == (
        "The shard is corrupt.",
        "model-00001.safetensors",
        "Copy it again.",
    )


def test_a_file_that_does_not_parse_is_named_with_its_line(live: Live, root: Path):
    (root / "code_of_port.py").write_text("import os\n\ndef broken(:\n    pass\n")
    result = call(live, "broken")
    assert result.status == "error" and result.what.startswith("SyntaxError: ")
    assert result.where == "code_of_port.py:3: def broken(:"


def test_an_import_that_fails_is_named(live: Live, root: Path):
    (root / "code_of_port.py").write_text("from no_such_library import layer\n")
    result = call(live, "add")
    assert result.what == "ModuleNotFoundError: No module named 'no_such_library'"
    assert result.where.startswith("code_of_port.py:1, in <module>: from no_such_library")


def test_leaving_by_sys_exit_is_an_error_there(live: Live):
    result = call(live, "leaves")
    assert result.status == "error" and "sys.exit(3)" in result.what
    assert result.where.startswith(f"code_of_port.py:{line_of('sys.exit(3)')}")


def test_leaving_by_os_exit_is_a_crash_there(live: Live):
    result = call(live, "exits")
    assert result.status == "crashed" and "exit code 4" in result.what
    assert result.where.startswith(f"code_of_port.py:{line_of('os._exit(4)')}")


def test_waiting_for_a_keyboard_is_refused(live: Live):
    result = call(live, "reads")
    assert (
        result.status == "error"
        and result.what.startswith("EOFError")
        and "keyboard" in result.next
    )


def test_an_answer_that_is_no_plain_value_is_an_error(live: Live):
    result = call(live, "answers_with_a_function")
    assert result.status == "error" and "plain values" in result.what


def test_a_segmentation_fault_costs_the_job_only(live: Live):
    result = call(live, "segfaults")
    assert result.status == "crashed" and "SIGSEGV" in result.what
    assert result.where.startswith(f"code_of_port.py:{line_of('ctypes.string_at')}, in segfaults")
    assert call(live, "add", a=1, b=1).ok


def test_a_sigkill_is_explained_by_memory_with_figures(live: Live):
    result = call(live, "killed")
    assert (
        result.status == "crashed" and "SIGKILL" in result.what and "out of memory" in result.what
    )
    assert "MiB" in result.what


def test_a_hang_names_the_line_where_it_hung(live: Live, root: Path):
    result = call(live, "loops", timeout=0.5)
    assert result.status == "timeout" and "0.5 s" in result.what
    assert result.where.startswith(f"code_of_port.py:{line_of('time.sleep(0.01)')}, in loops")
    assert "most recent call first" in result.log_tail


def test_a_hang_of_a_forked_rank_names_the_line_too(live: Live):
    result = call(live, "loops_in_a_rank", timeout=0.5)
    assert result.status == "timeout"
    assert result.where.startswith(f"code_of_port.py:{line_of('time.sleep(0.01)')}, in loops:")


def test_a_hoarder_is_stopped_at_its_limit(live: Live):
    result = call(live, "hoards", max_memory_mib=300)
    assert result.status == "crashed" and "its limit is 300 MiB" in result.what
    assert result.where.startswith("code_of_port.py:") and "in hoards" in result.where
    assert 300 < result.peak_memory_mib < 3000


def test_a_bomb_of_threads_ends_at_its_timeout(live: Live):
    result = call(live, "bombs", timeout=1)
    assert result.status == "timeout"
    assert call(live, "add", a=1, b=1).ok


def test_thirty_gigabytes_at_once_cost_the_job_only(live: Live):
    result = call(live, "grabs", max_memory_mib=300)
    assert not result.ok and result.where.startswith("code_of_port.py:")
    assert "in grabs" in result.where
    assert call(live, "add", a=1, b=1).ok


def test_a_bomb_of_threads_costs_the_job_only(live: Live):
    result = call(live, "breeds")
    assert result.status == "crashed" and "thousands of threads" in result.what
    assert "in breeds" in result.where and "loop" in result.next
    assert call(live, "add", a=1, b=1).ok


def test_a_flood_of_output_is_bounded(live: Live):
    result = call(live, "floods")
    assert result.ok
    size = Path(result.log).stat().st_size
    assert size < log.HEAD + 2 * log.TAIL and len(result.log_tail) <= log.SHOWN_CHARACTERS
    assert result.log_tail.endswith("the last line")
    assert "left out" in Path(result.log).read_text()
    status = Path(f"/proc/{live._worker.pid}/status").read_text()
    peak_kib = int(
        next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    )
    assert peak_kib < 100 * 1024


# ---- nothing is left behind -----------------------------------------------------------------


@pytest.mark.parametrize("ending", ["timeout", "close"])
def test_a_jobs_whole_family_ends_with_it(live: Live, root: Path, ending: str):
    file = root / "pids"
    if ending == "timeout":
        assert call(live, "family", timeout=1, file=str(file)).status == "timeout"
    else:
        results: list[JobResult] = []
        thread = threading.Thread(
            target=lambda: results.append(call(live, "family", file=str(file)))
        )
        thread.start()
        assert wait_for(lambda: pids_in(file))
        live.close()
        thread.join(10)
        assert [r.status for r in results] == ["interrupted"]
    pids = pids_in(file)
    assert len(pids) == 4
    assert wait_for(lambda: not any(map(alive, pids))), [p for p in pids if alive(p)]


def test_the_worker_ends_with_its_last_handle(root: Path):
    live = Live(root, preload=("json",))  # another list of modules: a worker of its own
    assert call(live, "add", a=1, b=1).ok
    pid = live._worker.pid
    live.close()
    assert not alive(pid)
    assert call(live, "add", a=1, b=1).ok  # and starts anew when it is needed
    live.close()


CLIENT = """
import os, sys, threading, time
from pathlib import Path
from portkit.live.client import Live
if sys.argv[3] == "forked" and os.fork() == 0:
    time.sleep(15)   # holds what the kernel held open
    os._exit(0)
live = Live(Path(sys.argv[1]), preload=())
live.device()
if sys.argv[3] == "forked later" and os.fork() == 0:
    time.sleep(15)
    os._exit(0)
Path(sys.argv[2] + ".worker").write_text(str(live._worker.pid))
args = dict(module="code_of_port", function="family", kwargs={"file": sys.argv[2]})
if sys.argv[3] == "thread":
    thread = threading.Thread(target=lambda: live.run("call", **args))
    thread.start()
    thread.join()
else:
    live.run("call", **args)
"""


@pytest.mark.parametrize("how", ["main", "thread", "forked", "forked later"])
def test_nothing_outlives_a_killed_kernel(root: Path, how: str):
    file = root / "pids"
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(root), str(file), how], cwd=REPO
    ) as process:
        try:
            assert wait_for(lambda: pids_in(file))
            pids = [*pids_in(file), *pids_in(Path(f"{file}.worker"))]
            assert len(pids) == 5 and all(map(alive, pids))
        finally:
            process.kill()
    assert wait_for(lambda: not any(map(alive, pids))), [p for p in pids if alive(p)]


def test_a_killed_worker_is_a_crash_and_the_next_job_has_a_fresh_one(live: Live, root: Path):
    file = root / "pids"
    live.device()
    before = live._worker.pid
    killer = threading.Thread(
        target=lambda: (wait_for(lambda: pids_in(file)), os.kill(before, signal.SIGKILL))
    )
    killer.start()
    result = call(live, "family", file=str(file))
    killer.join()
    assert result.status == "crashed" and "SIGKILL" in result.what and "worker" in result.what
    group = pids_in(file)[:2]  # what left the group has no parent to be found by any more
    assert wait_for(lambda: not any(map(alive, group)))
    for pid in pids_in(file):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    assert call(live, "add", a=1, b=1).ok
    assert live._worker.pid != before


def test_a_worker_that_answers_no_more_is_replaced(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "GRACE_SECONDS", 0.5)
    live.device()
    before = live._worker.pid
    os.kill(before, signal.SIGSTOP)
    result = call(live, "add", a=1, b=1, timeout=0.5)
    assert result.status == "crashed" and "stopped answering" in result.what
    assert not alive(before)
    assert call(live, "add", a=1, b=1).ok


# ---- interrupts and threads -----------------------------------------------------------------


def test_an_interrupt_stops_the_job_and_passes_through(live: Live, root: Path):
    file = root / "pids"
    live.device()
    worker = live._worker.pid

    def interrupt() -> None:
        wait_for(lambda: pids_in(file))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # A shell has its background jobs ignore SIGINT, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            call(live, "family", file=str(file))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(map(alive, pids_in(file)[:1]))
    assert wait_for(lambda: not any(map(alive, pids_in(file))))
    assert call(live, "add", a=1, b=1).ok
    assert live._worker.pid == worker


def test_a_progress_callback_that_raises_stops_the_job(live: Live):
    def broken(text: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(live, "loops", progress=broken)
    assert call(live, "add", a=1, b=1).ok


def test_a_job_from_the_callback_of_a_job_is_refused(live: Live):
    with pytest.raises(PortkitError, match="progress callback"):
        call(live, "add", a=1, b=1, progress=lambda text: call(live, "add", a=1, b=1))


def test_jobs_of_one_port_take_turns_and_ports_do_not_wait(
    live: Live, root: Path, tmp_path_factory
):
    other_root = tmp_path_factory.mktemp("other")
    (other_root / "code_of_port.py").write_text(PORT_CODE)
    spans: dict[str, list[Any]] = {"one": [], "other": []}
    with Live(other_root, preload=()) as other:

        def run(name: str, handle: Live) -> None:
            spans[name].append(call(handle, "sleeps", seconds=0.6).value["returned"])

        threads = [
            threading.Thread(target=run, args=a)
            for a in (("one", live), ("one", live), ("other", other))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert live._worker.pid == other._worker.pid
    (first, second), (beside,) = sorted(spans["one"]), spans["other"]
    assert first[1] <= second[0]
    assert beside[0] < second[0]


# ---- a worker that cannot start -------------------------------------------------------------


def test_a_module_that_cannot_be_imported_is_an_error_result(root: Path):
    with Live(root, preload=("json", "no_such_module_at_all")) as live:
        result = call(live, "add", a=1, b=1)
        assert result.status == "error" and "no_such_module_at_all" in result.what and result.next
        assert "Traceback" in result.log_tail
        with pytest.raises(PortkitError, match="could not import"):
            live.device()


def fake_distribution(folder: Path, version: str) -> Path:
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder


def test_another_version_of_vllm_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(fake_distribution(tmp_path / "site", "0.31.1")))
    with Live(root) as live:
        result = live.run("echo")
    assert (
        result.status == "error"
        and "0.31.1" in result.what
        and "0.32.0" in result.what
        and result.next
    )


def test_a_local_build_of_the_right_version_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from portkit.live.environment import require_vllm

    monkeypatch.syspath_prepend(str(fake_distribution(tmp_path / "site", "0.32.0+cu129")))
    require_vllm()


def test_a_missing_vllm_is_said_so(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    with Live(root) as live:
        result = live.run("echo")
    assert (
        result.status == "error" and "not installed" in result.what and "make setup" in result.next
    )


def test_the_worker_is_a_single_thread_before_it_forks(_worker_stays: Live):
    assert _worker_stays._worker.ready["threads"] == 1


# ---- with vLLM ------------------------------------------------------------------------------

VLLM_CODE = textwrap.dedent("""
    import json, os, sys

    import torch
    from vllm import LLM, ModelRegistry, SamplingParams
    from vllm.model_executor.models.llama import LlamaForCausalLM

    from portkit.live.ranks import forked_ranks


    class BrokenForCausalLM(LlamaForCausalLM):
        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            if os.environ["BROKEN"] == "raise":
                raise ValueError("the gate and the up projection are swapped")
            if os.environ["BROKEN"] == "hang":
                while True:
                    pass
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)


    def make(say, to):
        from transformers import LlamaConfig, LlamaForCausalLM
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )).save_pretrained(to)


    def generate(say, checkpoint, ranks=1, broken=""):
        before = [len(os.listdir("/proc/self/task")), torch.cuda.is_initialized()]
        os.environ["BROKEN"] = broken
        torch.compiler.set_stance("force_eager")
        ModelRegistry.register_model("LlamaForCausalLM", BrokenForCausalLM)
        options = dict(
            skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
            max_num_seqs=4, num_gpu_blocks_override=16,
        )
        if ranks == 1:
            llm = LLM(checkpoint, **options)
        else:
            torch.ones(1000, 1000).matmul(torch.ones(1000, 1000))  # starts OpenMP's threads
            with forked_ranks():
                options.update(tensor_parallel_size=ranks, distributed_executor_backend="mp")
                llm = LLM(checkpoint, **options)
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
        out = llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)
        return [before, list(out[0].outputs[0].token_ids)]
""")


def segments() -> set[Path]:
    """Shared memory of vLLM's ranks that no living process has mapped: left behind."""
    found = {s for pattern in ("vllm_dist_*", "psm_*") for s in Path("/dev/shm").glob(pattern)}
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += maps.read_text()
    return {s for s in found if str(s) not in mapped}


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        (
            "vllm/_custom_ops.py",
            """raise AttributeError("'_OpNamespace' '_C' object has no attribute 'scan_fwd'")""",
            "This build of vLLM has no kernel scan_fwd",
        ),
        (
            "vllm/triton_utils/allocation.py",
            """raise AttributeError("module 'triton' has no attribute 'set_allocator'")""",
            "no Triton, which vllm/triton_utils/allocation.py",
        ),
        (
            "vllm/layers/mamba/ops/cpu/gdn.py",
            "assert False, 'requires BF16.'",
            "vLLM's CPU build does not take this",
        ),
        (
            "vllm/model_executor/layers/fused_moe/router/cpu_router.py",
            "assert 'sigmoid' == 'softmax'",
            "vLLM's CPU build does not take this",
        ),
        (
            "vllm/v1/attention/backends/mla/amx_mla.py",
            "raise RuntimeError('expect weight to be bfloat16, float16 or int8.')",
            "A kernel of this build of vLLM takes no float32",
        ),
        (
            "port/modeling.py",
            "raise AttributeError('no attribute')",
            "AttributeError: no attribute",
        ),
    ],
)
def test_a_kernel_that_this_build_lacks_is_no_mistake_of_the_port(
    file: str, line: str, words: str
) -> None:
    with pytest.raises((AttributeError, AssertionError, RuntimeError)) as caught:
        exec(compile(line, f"/env/site-packages/{file}", "exec"), {})
    told = describe(caught.value, "/nowhere")
    assert words in told["what"]
    assert ("on a GPU" in told["next"]) == file.startswith("vllm")


def test_an_index_out_of_range_on_a_gpu_is_sent_to_where_its_line_is_named() -> None:
    """CUDA says so after the call that asked, so no frame of the port is in the traceback."""
    told = describe(RuntimeError("CUDA error: device-side assert triggered"), "/nowhere")
    assert "out of range" in told["next"] and "PORTKIT_DEVICE=cpu" in told["next"]


@pytest.mark.vllm
def test_the_real_worker_starts_engines_and_survives_them(tmp_path_factory):
    root = tmp_path_factory.mktemp("port")
    (root / "code_of_port.py").write_text(VLLM_CODE)
    checkpoint = str(root / "checkpoint")
    said: list[str] = []
    shared = segments()
    # One module more than usual: a worker of its own, whatever tests ran before this one.
    with Live(root, preload=(*MODULES, "colorsys")) as live:
        assert call(live, "make", to=checkpoint, progress=said.append).ok
        assert "importing vllm" in said
        worker = live._worker
        assert worker.ready["threads"] == 1
        assert live.device() == (worker.ready["device"], worker.ready["device_reason"])

        one = call(live, "generate", checkpoint=checkpoint)
        assert one.ok, one.log_tail
        before, tokens = one.value["returned"]
        assert before == [1, False] and len(tokens) == 8
        print(
            json.dumps(
                {"start": worker.ready["seconds"], "job": one.seconds, "MiB": one.peak_memory_mib}
            )
        )

        broken = call(live, "generate", checkpoint=checkpoint, broken="raise")
        assert broken.status == "error" and broken.what.startswith(
            "ValueError: the gate and the up"
        )
        assert (
            broken.where.startswith("code_of_port.py:")
            and "in forward: raise ValueError" in broken.where
        )

        if one.device == "cpu":
            two = call(live, "generate", checkpoint=checkpoint, ranks=2)
            assert two.ok, two.log_tail
            assert two.value["returned"][1] == tokens
            print(json.dumps({"job of two ranks": two.seconds}))

            broken = call(live, "generate", checkpoint=checkpoint, ranks=2, broken="raise")
            assert broken.status == "error" and "in forward: raise ValueError" in broken.where
            assert (
                broken.what.startswith("ValueError: the gate and the up") and "rank" in broken.what
            )

            hung = call(live, "generate", checkpoint=checkpoint, ranks=2, broken="hang", timeout=8)
            assert hung.status == "timeout" and "in forward" in hung.where
            assert segments() <= shared
        pid = worker.pid
        assert live._worker is worker and alive(pid)
    assert not alive(pid)
