"""From what the worker said about a job to the JobResult that the kernel gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from portkit.live.failure import crash_words, frame_in_log, rank_failure, signal_name
from portkit.live.job import JobRequest, JobResult, JobStatus
from portkit.live.log import last_lines

if TYPE_CHECKING:
    from portkit.live.worker import Worker

RANK_FAILED = (
    "Worker failed with error",
    "WorkerProc initialization failed",
    "RuntimeError: cancelled",  # a rank has left: see ranks.py
)
"""What vLLM's executor raises here when a rank raised; what that was is in the log."""


def result_of(request: JobRequest, heard: dict[str, dict[str, Any]], log: Path) -> JobResult:
    """Compose the result of a job that the worker saw to its end."""
    done = heard["done"]
    common = {
        "log_tail": done["log_tail"],
        "log": str(log),
        "seconds": done["seconds"],
        "peak_memory_mib": done["peak_mib"],
    }
    hung_at = frame_in_log(done["stack"], request.port_root, innermost_first=True)
    if "answer" in heard:
        return JobResult(request.job, "ok", heard["answer"]["value"], **common)
    if "error" in heard:
        words = {part: heard["error"].get(part, "") for part in ("what", "where", "next")}
        if any(said in words["what"] for said in RANK_FAILED):
            words |= rank_failure(_text(log), request.port_root)
        return JobResult(request.job, "error", **words, **common)
    status, words = _unanswered(request, done, hung_at)
    return JobResult(request.job, status, where=hung_at, **words, **common)


def _unanswered(
    request: JobRequest, done: dict[str, Any], hung_at: str
) -> tuple[JobStatus, dict[str, str]]:
    if done["cause"] == "timeout":
        return "timeout", {
            "what": f"The job was still running after {request.timeout:g} s and was stopped"
            + (f"; it was at {hung_at}" if hung_at else "; it was not in the port's own code")
            + ".",
            "next": "Look for a loop that does not end; the log has every thread's stack."
            if hung_at
            else "The log has every thread's stack. A slow machine may need a longer timeout.",
        }
    if done["cause"] == "memory":
        return "crashed", {
            "what": f"The job was stopped at {done['peak_mib']:,.0f} MiB: "
            f"its limit is {done['limit_mib']:,.0f} MiB, "
            f"of the machine's {done['machine_mib']:,.0f} MiB.",
            "next": "Look at the shapes of what the port allocates"
            + (" at that line" if hung_at else "")
            + "; use a smaller checkpoint or a shorter sequence.",
        }
    if done["cause"] == "threads":
        return "crashed", {
            "what": "The job was stopped because it started thousands of threads or processes"
            + (f"; it was at {hung_at}" if hung_at else "")
            + ".",
            "next": "Look for a loop that starts them; vLLM makes the ranks and threads that a "
            "model needs.",
        }
    if done["cause"] == "interrupted":
        return "interrupted", {
            "what": "The job was stopped before it had an answer.",
            "next": "Run it again.",
        }
    return "crashed", crash_words(done["exit_code"], done["peak_mib"], done["machine_mib"])


def worker_gone(request: JobRequest, log: Path, worker: Worker) -> JobResult:
    """Compose the result of a job whose worker ended, or stopped answering, in the middle of it."""
    code = worker.wait_for_exit()
    if code is None:
        how = "stopped answering"
    else:
        how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    return JobResult(
        request.job,
        "crashed",
        what=f"The worker process {how} while the job ran.",
        next="Run it again: a fresh worker starts by itself.",
        log_tail=last_lines(log) or worker.log_tail(),
        log=str(log),
    )


def _text(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""
