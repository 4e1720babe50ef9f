#!/usr/bin/env python3
"""Write the prompt files of the quickstart: word problems and small Python tasks from templates.

    python tools/make_demo_prompts.py --out recipes/data

Deterministic. Held-out prompts never repeat a training prompt.
"""

import argparse
import json
import random
from pathlib import Path

TRAIN, HELD_OUT = 200, 16
NAMES = ("Aisha", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas")
THINGS = ("apples", "marbles", "stickers", "books", "coins", "pencils", "shells", "stamps")
MATH = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "{name} shares {c} {things} equally among {d} friends. How many does each friend get?",
    "What is {a} times {d}? Show the steps.",
    "A train travels {b} km every hour. How far does it travel in {d} hours?",
    "A rectangle is {a} cm long and {d} cm wide. What is its area?",
    "{name} reads {d} pages a day. How many days are needed to read {c} pages?",
    "One box holds {d} {things}. How many {things} are in {a} boxes?",
    "{name} had {c} {things} and gave away {a}. How many are left?",
    "The sum of two numbers is {c} and one of them is {a}. What is the other?",
    "A shirt costs {c} dollars and is sold at a discount of {d} dollars. What is the price?",
)
CODE = (
    "Write a Python function that returns the {nth} largest number of a list.",
    "Write a Python function that counts the {things} in a list of strings.",
    "Write a Python function that repeats a string {d} times, joined by {joiner}.",
    "Write a Python loop that prints the multiples of {d} up to {c}.",
    "Write a Python function that checks whether a number is divisible by both {d} and {a}.",
    "Write a Python function that sums the digits of a number until fewer than {d} digits remain.",
    "Write a Python function that splits a list into parts of {d} items.",
    "Write a Python function that returns the words of a sentence that have more than {d} letters.",
    "Write a Python dictionary that maps {name} to {a} and print it.",
    "Write a Python function that rotates a list to the right by {d} places.",
)
ORDINALS = ("second", "third", "fourth", "fifth")
JOINERS = ("commas", "dashes", "spaces", "slashes")


def _prompt(templates: tuple[str, ...], rng: random.Random) -> str:
    d = rng.randint(2, 12)
    return rng.choice(templates).format(
        name=rng.choice(NAMES), things=rng.choice(THINGS), nth=rng.choice(ORDINALS), joiner=rng.choice(JOINERS),
        a=rng.randint(3, 60), b=rng.randint(20, 120), c=d * rng.randint(6, 40), d=d,
    )  # fmt: skip


def distinct_prompts(templates: tuple[str, ...], count: int, seed: int) -> list[str]:
    """``count`` different prompts, always the same for one seed."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[_prompt(templates, rng)] = None
    return list(prompts)


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, (label, templates) in enumerate((("math", MATH), ("code", CODE))):
        prompts = distinct_prompts(templates, TRAIN + HELD_OUT, seed)
        for name, part in ((label, prompts[:TRAIN]), (f"heldout_{label}", prompts[TRAIN:])):
            lines = (json.dumps({"problem": text, "label": label}) + "\n" for text in part)
            (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"wrote {args.out / name}.jsonl: {len(part)} prompts")


if __name__ == "__main__":
    main()
