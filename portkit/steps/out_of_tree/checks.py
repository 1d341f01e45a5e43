"""Checks of step `out_of_tree`: the port as users install, load and serve it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from portkit.checks.base import Check, CheckContext
from portkit.checks.verdict import Table, Verdict
from portkit.errors import PortkitError
from portkit.live.subprocesses import SCRIPTS
from portkit.steps.out_of_tree.environment import install, plugin_environment

GROUP = "vllm.general_plugins"


class Installs(Check):
    """`pip install -e` works on the port, and vLLM will find its entry point.

    Done in an environment of the port's own, so that yours stays as it is. vLLM looks for the
    group `vllm.general_plugins`; a misspelt group is not an error to anybody, the plugin is just
    never called.
    """

    id = "installs"
    step = "out_of_tree"
    title = "The port installs as a plugin"

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        context.progress("pip install -e, into the port's own environment")
        try:
            install(port)
            place = plugin_environment(port)
        except PortkitError as error:
            return self.failed(error.what, where=error.where, next=error.next)
        points = [
            (point.group, point.name, point.value)
            for folder in place.root.glob("lib/python*/site-packages")
            for found in metadata.distributions(path=[str(folder)])
            for point in found.entry_points
            if point.value.partition(":")[0].partition(".")[0] == port.package
        ]
        table = Table("Entry points of the port", ("group", "name", "value"), tuple(points))
        if not any(group == GROUP for group, _, _ in points):
            return self.failed(
                f"The port has no entry point in the group {GROUP!r}.",
                table,
                where="pyproject.toml",
                next=f'Under [project.entry-points."{GROUP}"] say: '
                f'{port.name} = "{port.package}:register"',
                causes=("The group's name is misspelt: nothing reports that, nothing is called.",),
            )
        return self.passed(f"Installed. In your own environment: pip install -e {port.root}", table)


class NoCudaOnImport(Check):
    """`register()` runs twice without harm, does not import the model nor initialise CUDA.

    vLLM calls it in the API server, the engine core and each worker, before it forks: a process
    that has initialised CUDA cannot fork ("Cannot re-initialize CUDA in forked subprocess").
    """

    id = "no_cuda_on_import"
    step = "out_of_tree"
    title = "register() is light and can run again"
    requires = ("installs",)
    timeout = 180.0

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        job = self.job(
            context,
            "register_twice",
            cwd=str(port.state_dir),
            python=plugin_environment(port).python,
            package=port.package,
            module=port.module,
            architecture=port.architecture,
        )
        if not job.ok:
            return self.failed_job(job)
        answer, where = job.value, f"{port.package}/__init__.py"
        if answer["cuda_opened"] or answer["cuda_initialized"]:
            return self.failed(
                "Registering the port initialises CUDA.",
                job=job,
                where=next(filter(None, answer["cuda_opened"]), where),
                next='Register with the lazy string "module:Class" and keep device code out of '
                "module level.",
            )
        if answer["error"]:
            return self.failed(
                f"register() fails: {answer['error']}",
                job=job,
                where=answer["where"] or where,
                next="vLLM only logs that, at debug level, and goes on without your model.",
            )
        if not answer["supported"]:
            return self.failed(
                f"After register() vLLM still does not know {port.architecture}.",
                job=job,
                where=where,
                next="portkit draft out_of_tree writes it, or register exactly "
                f'{port.architecture!r}, the name in config.json\'s "architectures".',
            )
        if answer["modeling_imported"]:
            return self.failed(
                f"register() imports {port.module}.",
                job=job,
                where=where,
                next=f'Register the string "{port.module}:{port.architecture}", not the class.',
            )
        return self.passed(
            "Called twice: the model is not imported, CUDA not initialised.", job=job
        )


class FreshProcess(Check):
    """A Python process that knows nothing of portkit loads the port through its entry point.

    The commonest complaint after a port: it works in the notebook that registered it and nowhere
    else. Here vLLM starts its engine in processes of its own, and the class that serves must be
    the port's (an unknown architecture is served silently by the Transformers backend).
    """

    id = "fresh_process"
    step = "out_of_tree"
    title = "A fresh process finds the port"
    requires = ("no_cuda_on_import",)
    timeout = 420.0

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        job = self.job(
            context,
            "fresh_engine",
            environment={},
            python=plugin_environment(port).python,
            cwd=str(port.state_dir),
        )
        if not job.ok:
            return self.failed_job(
                job, next="Pass step 4 (weights) first: here vLLM loads the port by itself."
            )
        answer = job.value
        if answer["model_class"][0] != port.module:
            return self.failed(
                f"vLLM served {'.'.join(answer['model_class'])}, not {port.module}.",
                job=job,
                where=f"{port.package}/__init__.py",
                next="portkit draft out_of_tree writes register().",
                causes=(
                    "The entry point is not called, or registers another architecture's name.",
                    "VLLM_PLUGINS is set and does not name this plugin.",
                ),
            )
        if answer["portkit_imported"]:
            return self.failed(
                "The port imports portkit.",
                job=job,
                where=port.module,
                next="A port must stand alone: take the import out.",
            )
        if answer["tokens"] != answer["expected"]:
            return self.failed(
                "In a fresh process the port generates other tokens than Transformers.",
                job=job,
                where=port.module,
                next="Pass step 4 (weights) first.",
            )
        return self.passed(
            f"{port.module} was loaded through the entry point; its greedy tokens equal "
            f"Transformers' on {len(answer['tokens'])} prompts.",
            job=job,
        )


class _Served(Check):
    """Common to both ways of serving: what is asked and how the answers are judged."""

    step = "out_of_tree"
    timeout = 420.0

    def serve(
        self, context: CheckContext, command: list[str], environment: dict[str, str]
    ) -> Verdict:
        port = context.port
        job = self.job(
            context,
            "serve",
            cwd=str(port.state_dir),
            command=command,
            environment=environment,
        )
        if not job.ok:
            return self.failed_job(job)
        answers = job.value["answers"]
        table = Table(
            "What the server said",
            ("endpoint", "prompt", "text", "ends by"),
            tuple(
                (a["endpoint"], a["prompt"][-40:], a["text"], a["finish_reason"]) for a in answers
            ),
        )
        if job.value["backend"]:
            return self.failed(
                "The server runs vLLM's Transformers backend, not the port: the process that holds "
                "the model does not know the class.",
                table,
                job=job,
                where=port.module,
                causes=(
                    "the class is registered in the server's process only; vLLM spawns the one "
                    "that holds the model, which imports plugins and the main module again",
                ),
                next="Register in the plugin's register(), or at the top level of the script that "
                "is run (not behind alter_sys=True).",
                log=job.value["backend"],
            )
        if job.value["ends"]:
            return self.failed(
                job.value["ends"],
                table,
                job=job,
                where="checkpoint/generation_config.json",
                causes=("eos_token_id in generation_config.json is of another checkpoint",),
                next="Ship generation_config.json with the eos_token_id that the model was trained "
                "with: vLLM stops by it.",
            )
        for answer in answers:
            if answer["text"] != answer["expected"]:
                return self.failed(
                    f"{answer['endpoint']} answers {answer['text'][:80]!r}; Transformers says "
                    f"{answer['expected'][:80]!r}.",
                    table,
                    job=job,
                    where=port.module,
                    next="If fresh_process passes, look at the tokenizer: its files must lie "
                    "beside the weights.",
                )
            if answer["finish_reason"] != answer["expected_reason"]:
                return self.failed(
                    f"{answer['endpoint']} ends by {answer['finish_reason']!r}, Transformers by "
                    f"{answer['expected_reason']!r}.",
                    table,
                    job=job,
                    where="checkpoint/generation_config.json",
                    next="Ship generation_config.json with the eos_token_id that the model was "
                    "trained with.",
                )
        return self.passed(
            f"{len(answers)} answers over HTTP equal Transformers' text; the server was up after "
            f"{job.value['seconds_up']:.0f} s.",
            table,
            job=job,
        )


class Serves(_Served):
    """`vllm serve` answers the openai client with the text that Transformers gives."""

    id = "serves"
    title = "vllm serve, asked by the openai client"
    requires = ("fresh_process",)

    def run(self, context: CheckContext) -> Verdict:
        python = plugin_environment(context.port).python
        return self.serve(
            context, [python, "-m", "vllm.entrypoints.cli.main", "serve", "CHECKPOINT"], {}
        )


class RunpyWrapper(_Served):
    """The older guide's way still works: register by hand, then run the API server with runpy.

    Without the plugin installed: the wrapper's own call to ModelRegistry is what registers.
    """

    id = "runpy_wrapper"
    title = "The older guide's runpy wrapper"
    requires = ("installs",)

    def run(self, context: CheckContext) -> Verdict:
        port = context.port
        wrapper = [
            sys.executable,
            str(Path(SCRIPTS) / "runpy_wrapper.py"),
            f"{port.module}:{port.architecture}",
        ]
        # No plugin at all may help: only what the wrapper itself registers counts.
        environment = {"PYTHONPATH": str(port.root), "VLLM_PLUGINS": "none"}
        return self.serve(context, [*wrapper, "--model", "CHECKPOINT"], environment)


CHECKS = (Installs, NoCudaOnImport, FreshProcess, Serves, RunpyWrapper)
