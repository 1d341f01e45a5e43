"""Random edits of a Python file, as a tired reader makes them; the same for the same seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

Edit = Callable[[random.Random, list[str]], str]
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+|[^\w\s]")
STRAY = ("(", ")", "]", ":", ",", '"', '"""', "\\", "\t", "\x00", "é", "self", "lambda", "*", "@")


def edited(text: str, seed: int) -> tuple[str, str]:
    """Return the name of an edit and the text after it; no edit leaves the text as it was."""
    chance = random.Random(seed)
    for _ in range(20):
        edit = chance.choice(EDITS)
        new = edit(chance, text.splitlines(keepends=True))
        if new != text:
            return f"{edit.__name__} (seed {seed})", new
    raise AssertionError(f"seed {seed}: no edit changes the text")


def delete_lines(chance: random.Random, lines: list[str]) -> str:
    start = chance.randrange(len(lines))
    return "".join(lines[:start] + lines[start + chance.choice((1, 1, 2, 5, 40)) :])


def repeat_lines(chance: random.Random, lines: list[str]) -> str:
    start = chance.randrange(len(lines))
    end = start + chance.choice((1, 3, 20))
    return "".join(lines[:end] + lines[start:end] + lines[end:])


def swap_lines(chance: random.Random, lines: list[str]) -> str:
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return "".join(lines)


def delete_token(chance: random.Random, lines: list[str]) -> str:
    text = "".join(lines)
    found = chance.choice(list(TOKEN.finditer(text)))
    return text[: found.start()] + text[found.end() :]


def swap_tokens(chance: random.Random, lines: list[str]) -> str:
    text = "".join(lines)
    one, other = sorted(chance.sample(list(TOKEN.finditer(text)), 2), key=lambda m: m.start())
    return (
        f"{text[: one.start()]}{other[0]}{text[one.end() : other.start()]}"
        f"{one[0]}{text[other.end() :]}"
    )


def rename_everywhere(chance: random.Random, lines: list[str]) -> str:
    text = "".join(lines)
    name = chance.choice(sorted(set(re.findall(r"\b[a-z_]\w{2,}\b", text))))
    return re.sub(rf"\b{name}\b", chance.choice(("x", "forward", "config", "self")), text)


def insert_stray(chance: random.Random, lines: list[str]) -> str:
    text = "".join(lines)
    at = chance.randrange(len(text))
    return text[:at] + chance.choice(STRAY) + text[at:]


def indent_line(chance: random.Random, lines: list[str]) -> str:
    at = chance.randrange(len(lines))
    lines[at] = chance.choice(("    ", " ", "")) + lines[at].removeprefix("    ")
    return "".join(lines)


def cut_short(chance: random.Random, lines: list[str]) -> str:
    text = "".join(lines)
    return text[: chance.randrange(len(text))]


def empty_a_body(chance: random.Random, lines: list[str]) -> str:
    """Replace the body of a function or class by `pass`."""
    starts = [n for n, line in enumerate(lines) if re.match(r"\s*(def|class) .*:\n", line)]
    if not starts:
        return "".join(lines)
    start = chance.choice(starts)
    depth = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines) and (
        not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > depth
    ):
        end += 1
    return "".join([*lines[: start + 1], " " * (depth + 4) + "pass\n", *lines[end:]])


EDITS: tuple[Edit, ...] = (
    delete_lines,
    repeat_lines,
    swap_lines,
    delete_token,
    swap_tokens,
    rename_everywhere,
    insert_stray,
    indent_line,
    cut_short,
    empty_a_body,
)
