"""Draft a port of every decoder-only architecture of Transformers, run it in vLLM, compare.

    python benchmarks/coverage.py [--only ARCH[,ARCH]] [--results FILE.jsonl] [--again failed|all]
                                  [--parts port,backend,native] [--write docs/coverage.md] [--show]

For each in-scope architecture: a tiny hardened checkpoint in several safetensors shards, the drafts
of all steps, then the port's own class and `load_weights` in vLLM's engine, float32, against
Transformers. A row *matches* if all greedy tokens and the log-probabilities of the whole
vocabulary (1e-3 on a CPU) agree for single, chunked, decoding, ragged and far prompts on one rank,
and for ragged prompts and decoding on two. Beside it, on the same checkpoint: vLLM's Transformers
backend and, where there is one, vLLM's native class.

Results are kept per line in a file: a run that is stopped goes on where it was, and only what is
asked for is done again. Rows of another device are kept beside (`--results` of both, comma
separated, with --show or --write). Exits with 1 if a row that was run does not match.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from coverage_rows import PARTS, Store, measure_architecture
from coverage_table import document, one_line

from portkit.architectures import in_scope


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, print a line for each, and write the table if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="architectures, comma separated")
    parser.add_argument("--results", default=".portkit/coverage.jsonl", help="where rows are kept")
    parser.add_argument("--again", choices=("failed", "all"), help="rows to measure once more")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
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
    bad = False
    if not args.show and not (args.write and not args.only and not args.again):
        bad = _measure(wanted, stores[0], args)
    if args.show or args.write:
        text = document(scope, [store.rows() for store in stores])
        if args.write:
            args.write.write_text(text, encoding="utf-8")
        else:
            print(text)
    return 1 if bad else 0


def _measure(wanted: list[str], store: Store, args: argparse.Namespace) -> bool:
    bad = False
    for number, name in enumerate(wanted, 1):
        for part in args.parts.split(","):
            kept = store.rows().get((name, part))
            again = bool(args.only) or args.again == "all"
            if kept and not again and not (args.again == "failed" and not kept.matches):
                continue
            with tempfile.TemporaryDirectory(prefix="portkit-coverage-") as folder:
                row = measure_architecture(name, part, Path(folder), _say)
            store.add(row)
            print(f"{number}/{len(wanted)} {one_line(row)}", flush=True)
            bad |= part == "port" and not row.matches
    return bad


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"  … {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
