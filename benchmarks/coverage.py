"""Draft a port of every decoder-only architecture of Transformers, run it in vLLM, compare.

    python benchmarks/coverage.py [--only ARCH[,ARCH]] [--parts port,backend,native] [--jobs N]
                                  [--results FILE.jsonl] [--again failed|changed|all]
                                  [--config JSON | --variants] [--write docs/coverage.md] [--show]

For each in-scope architecture: a tiny hardened checkpoint in several safetensors shards, the drafts
of all steps, then the port's own class and `load_weights` in vLLM's engine, float32, against
Transformers. A row *matches* if all greedy tokens and the log-probabilities of the whole
vocabulary (1e-3 on a CPU) agree for single, chunked, decoding, ragged and far prompts on one rank,
and for ragged prompts and decoding on two. Beside it, on the same checkpoint: vLLM's Transformers
backend and, where there is one, vLLM's native class.

Results are kept per line in a file: a run that is stopped goes on where it was, and only what is
asked for is done again. `--again changed` makes each draft anew and runs those that did not match,
and those whose source or checkpoint is not, byte for byte, that of the kept row. `--jobs` measures
that many architectures at a time, each in a worker of its own (about 3 GiB and a core each).
`--config` sets fields of the config to values of one's own, of the architectures of `--only`;
`--variants` measures those of coverage_variants.py. Their drafts have a table of their own.
Rows of another device are kept beside (`--results` of both, comma separated, with --show or
--write). Exits with 1 if a row that was run does not match.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from coverage_rows import PARTS, CoverageRow, Store, measure_architecture
from coverage_table import document, one_line
from coverage_variants import VARIANTS, text_of

from portkit.architectures import in_scope


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, print a line for each, and write the table if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="architectures, comma separated")
    parser.add_argument("--results", default=".portkit/coverage.jsonl", help="where rows are kept")
    parser.add_argument(
        "--again", choices=("failed", "changed", "all"), help="rows to measure once more"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--config", default="", help="fields of the config, as JSON")
    parser.add_argument("--variants", action="store_true", help="configs that switch the layout")
    parser.add_argument("--show", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--write", type=Path, help="put the table into this file")
    args = parser.parse_args(argv)
    stores = [Store(Path(path)) for path in args.results.split(",")]
    scope = in_scope()
    wanted = args.only.split(",") if args.only else list(scope)
    unknown = [name for name in wanted if name not in scope]
    if unknown:
        print(f"not in scope: {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        given = text_of(json.loads(args.config or "{}"))
    except ValueError as error:
        print(f"--config is no JSON: {error}", file=sys.stderr)
        return 2
    if given and not args.only:
        print("--config needs --only ARCH", file=sys.stderr)
        return 2
    todo = [(name, given) for name in wanted]
    if args.variants:
        todo = [(name, text_of(config)) for name, config in VARIANTS if name in wanted]
    bad = False
    if not args.show and not (
        args.write and not args.only and not args.again and not args.variants
    ):
        bad = _measure(todo, stores[0], args)
    if args.show or args.write:
        text = document(scope, [store.rows() for store in stores])
        if args.write:
            args.write.write_text(text, encoding="utf-8")
        else:
            print(text)
    return 1 if bad else 0


def _measure(wanted: list[tuple[str, str]], store: Store, args: argparse.Namespace) -> bool:
    kept = store.rows()
    everything = bool(args.only) or args.again in ("all", "changed")
    todo = {
        (name, config): [
            part
            for part in args.parts.split(",")
            if not (config and part != "port")
            and (
                everything
                or (_key(name, config), part) not in kept
                or (args.again == "failed" and not kept[_key(name, config), part].matches)
            )
        ]
        for name, config in wanted
    }
    known = kept if args.again == "changed" else {}
    count, number, bad = sum(map(len, todo.values())), 0, False
    # Spawned: a fork would take along the threads and the worker of this process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        jobs = [
            pool.submit(
                _rows,
                name,
                config,
                parts,
                {
                    part: known[_key(name, config), part]
                    for part in parts
                    if (_key(name, config), part) in known
                },
            )
            for (name, config), parts in todo.items()
            if parts
        ]
        for done in as_completed(jobs):
            for row in done.result():
                number += 1
                if row != kept.get((row.name, row.part)):
                    store.add(row)
                print(f"{number}/{count} {one_line(row)}", flush=True)
                bad |= row.part == "port" and not row.matches
    return bad


def _key(name: str, config: str) -> str:
    return f"{name} {config}".rstrip()


def _rows(
    name: str, config: str, parts: list[str], known: dict[str, CoverageRow]
) -> list[CoverageRow]:
    with tempfile.TemporaryDirectory(prefix="portkit-coverage-") as folder:
        return measure_architecture(name, parts, Path(folder), _say, known, config)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"  … {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
