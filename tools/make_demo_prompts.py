#!/usr/bin/env python3
"""Write the prompt files of the quickstart: word problems and small Python tasks from templates of our own.

    python tools/make_demo_prompts.py --out recipes/data

Deterministic. The templates take turns, so that all kinds are in training; no held-out prompt is in training too.
"""

import argparse
import json
import random
from pathlib import Path

TRAIN, HELD_OUT, MIXED = 200, 16, 40
# Numbers: d is small, c is a multiple of d, e is less than c, a and b are of middle size.
MATH = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "{name} shares {c} {things} equally among {d} friends. How many {things} does each friend get?",
    "What is {a} times {d}? Show the steps.",
    "A {vehicle} travels {b} km every hour. How far does it travel in {d} hours?",
    "A rectangular {place} is {a} metres long and {d} metres wide. What is its area in square metres?",
    "{name} reads {d} pages a day. How many days does {name} need for a book of {c} pages?",
    "One box holds {d} {things}. How many {things} are in {a} boxes?",
    "{name} had {c} {things} and gave {e} of them to {other}. How many {things} are left?",
    "The sum of two numbers is {c} and one of them is {e}. What is the other number?",
    "A coat costs {c} dollars and is sold for {e} dollars less. What is the sale price?",
    "{name} saves {a} dollars a week. How much has {name} saved after {d} weeks?",
    "{name} is {a} years old and {other} is {d} years older. How old is {other}?",
    "Tickets cost {d} dollars each. How many tickets can {name} buy with {c} dollars?",
    "A {place} has {d} rows with {a} chairs in each row. How many chairs are there?",
    "{name} walks {a} minutes to school and {b} minutes back. How many minutes is that in total?",
    "Find the perimeter of a rectangle with sides of {a} cm and {b} cm.",
    "Solve for x: x + {e} = {c}.",
    "Solve for x: {d} * x = {c}.",
    "A {vehicle} leaves with {b} passengers and {d} more get on at each of 3 stops. How many passengers is that?",
    "{name} and {other} pick {a} and {b} {things}. How many more does the one with more have?",
)
CODE = (
    "Write a Python function that returns the {nth} largest number of a list of {kind}.",
    "Write a Python function that counts how often the letter {letter} occurs in a string.",
    "Write a Python function that repeats a string {d} times, joined by {joiner}.",
    "Write a Python loop that prints the multiples of {d} up to {c}.",
    "Write a Python function that checks whether a number is divisible by both {d} and {a}.",
    "Write a Python function that adds up the first {a} {kind} of a list.",
    "Write a Python function that splits a list of {things} into parts of {d} items.",
    "Write a Python function that returns the words of a sentence that have more than {d} letters.",
    "Write a Python dictionary that maps {name} to {a} and {other} to {b}, then print it.",
    "Write a Python function that rotates a list of {kind} to the right by {d} places.",
    "Write a Python function that removes every {nth} item from a list of {things}.",
    "Write a Python class for a {vehicle} with a speed of {b} and a method that raises the speed by {d}.",
    "In Python, how do I read a file of {things} line by line and skip the first {d} lines?",
    "Write a Python list comprehension with the squares of the numbers from {d} to {a}.",
    "Write a Python function that converts {a} minutes into hours and minutes.",
    "Write a Python function that replaces {joiner} by underscores in a name such as '{name}'.",
    "Write a Python function that sorts a list of {things} by length and returns the {nth} one.",
    "Write a Python generator that yields {kind} starting at {d}, each {a} more than the one before.",
    "Write a Python test for a function that doubles {kind}, with the inputs {d} and {a}.",
    "Write a Python function that finds the first of the {kind} in a list that is greater than {a}.",
)
WORDS = {
    "name": ("Aisha", "Ben", "Carla", "Dmitri", "Elena"),
    "other": ("Farid", "Grace", "Hiro", "Ines", "Jonas"),
    "things": ("apples", "marbles", "stickers", "books", "coins", "pencils", "shells", "stamps"),
    "vehicle": ("bus", "train", "ferry", "tram"),
    "place": ("hall", "garden", "cinema", "classroom"),
    "nth": ("second", "third", "fourth", "fifth", "sixth"),
    "joiner": ("commas", "dashes", "spaces", "slashes"),
    "kind": ("integers", "floats", "even numbers", "odd numbers", "prices"),
    "letter": tuple("abcdefghijklmnoprstuvw"),
}


def _fill(template: str, rng: random.Random) -> str:
    d = rng.randint(2, 12)
    c = d * rng.randint(6, 40)
    numbers = {"d": d, "c": c, "e": rng.randint(2, c - 1), "a": rng.randint(13, 60), "b": rng.randint(61, 120)}
    return template.format(**numbers, **{key: rng.choice(words) for key, words in WORDS.items()})


def distinct_prompts(templates: tuple[str, ...], count: int, seed: int) -> list[str]:
    """``count`` different prompts, the templates taking turns in an order shuffled each round; the same for a seed."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        for template in rng.sample(templates, len(templates)):
            prompts[_fill(template, rng)] = None
    return list(prompts)[:count]


def _write(path: Path, prompts: list[str], label: str | dict[str, float]) -> None:
    lines = (json.dumps({"problem": text, "label": label}) + "\n" for text in prompts)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {path}: {len(prompts)} prompts")


def main() -> None:
    """Write the five files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, (label, templates) in enumerate((("math", MATH), ("code", CODE))):
        prompts = distinct_prompts(templates, TRAIN + HELD_OUT, seed)
        _write(args.out / f"{label}.jsonl", prompts[:TRAIN], label)
        _write(args.out / f"heldout_{label}.jsonl", prompts[TRAIN:], label)
    problems = distinct_prompts(MATH, MIXED, seed=2)
    both = {"math": 0.5, "code": 0.5}
    _write(
        args.out / "mixed.jsonl", [f"Write a Python program that prints the answer. {text}" for text in problems], both
    )


if __name__ == "__main__":
    main()
