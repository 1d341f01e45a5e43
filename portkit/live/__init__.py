"""Everything that touches torch and vLLM, in a worker process beside the reader's kernel.

The kernel's side is `client` (Live, live_for): it imports neither torch nor vLLM. `server` is the
worker, `child` a job's own process, `jobs/` what they run.
"""
