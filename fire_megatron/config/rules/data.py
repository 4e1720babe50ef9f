"""Rules on files, labels and chat templates."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fire_megatron.config.checkpoints import holds_model, looked_in
from fire_megatron.config.data import DataConfig
from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.kinds import BENCHMARK_NAME
from fire_megatron.config.messages import nearest
from fire_megatron.config.rules.facts import Facts, Vocabulary


def labels(facts: Facts) -> Iterator[RecipeProblem]:
    """A label belongs to one teacher, and every label that the recipe gives has one."""
    owners: dict[str, str] = {}
    for name, teacher in facts.recipe.teachers.items():
        for label in teacher.labels or (name,):
            if label in owners:
                both = "twice by it" if owners[label] == name else f"by teachers.{owners[label]} as well"
                yield RecipeProblem(
                    f"teachers.{name}.labels", f"{label!r} is claimed {both}; a label belongs to one teacher, once"
                )
            owners.setdefault(label, name)
    for key, source in facts.sources.items():
        if source.label is not None and source.label not in owners:
            close = nearest(source.label, owners)
            advice = f"did you mean {close}?" if close else f"the labels with a teacher are {', '.join(sorted(owners))}"
            yield RecipeProblem(f"{key}.label", f"no teacher takes {source.label!r}; {advice}")


def mixtures(facts: Facts) -> Iterator[RecipeProblem]:
    loss = facts.recipe.loss
    if not loss.is_default("mixture") and facts.mixed is not None and not facts.mixed:
        yield RecipeProblem("loss.mixture", "has no effect, since no row names several teachers; leave it out")
    if facts.recipe.loss.estimator == "topk" and facts.mixed:
        yield RecipeProblem(
            "loss.estimator",
            f"topk takes one teacher a row, but {len(facts.mixed)} rows name several, whose top-k tokens are not the "
            f"same (the first: {facts.mixed[0]}); use full, or give these rows one label",
        )


def file_problem(path: Path) -> str | None:
    """Why a file of prompts or problems cannot be read; None when it can."""
    if not path.exists():
        return f"{path} does not exist{looked_in(path)}; correct the path"
    if not path.is_file():
        return f"{path} is a folder; give a file (JSON Lines, a JSON list, CSV or Parquet)"
    return None if os.access(path, os.R_OK) else f"{path} may not be read; change its permissions"


def files(facts: Facts) -> Iterator[RecipeProblem]:
    for key, source in () if facts.elsewhere else (facts.sources | facts.benchmarks).items():
        text = file_problem(Path(source.path))
        if text:
            yield RecipeProblem(f"{key}.path", text)


def benchmark_name(path: str | Path) -> str:
    """The name of a benchmark that is given none: its file's without the ending."""
    return re.sub(r"\.(?:jsonl|json|csv|tsv|parquet|pq)$", "", Path(path).name.removesuffix(".gz"))


def benchmark_code(name: str) -> int:
    """23 bits of a benchmark's name, which its samples go by."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:3]) >> 1


def benchmark_names(names: Iterable[tuple[str, str]], fix: str) -> Iterator[RecipeProblem]:
    """Args: names: where each benchmark is given, and its name; fix: what gives one another name."""
    taken: dict[int, str] = {}
    for key, name in names:
        code = benchmark_code(name)
        if code in taken:
            yield RecipeProblem(
                key, f"its name {name!r} is taken by {taken[code]}; results and samples go by name, so {fix}"
            )
        taken[code] = key


def benchmarks(facts: Facts) -> Iterator[RecipeProblem]:
    names = {f"{key}.name": file.name or benchmark_name(file.path) for key, file in facts.benchmarks.items()}
    yield from benchmark_names(names.items(), "give another")
    for key, name in names.items():
        if not BENCHMARK_NAME.accepts(name):
            yield RecipeProblem(key, f"{name!r} is not of {BENCHMARK_NAME}; give another name")
        elif name in facts.recipe.teachers:
            yield RecipeProblem(key, f"{name!r} is a teacher's; give another name")


def template(data: DataConfig, tokenizer: Vocabulary | None, at: Callable[[str], str]) -> Iterator[RecipeProblem]:
    """Args: at: from a key of the ``data`` section to what the user has written it as."""
    absent = tokenizer is not None and not tokenizer.has_chat_template
    if data.chat_template == "on" and absent:
        yield RecipeProblem(at("chat_template"), "on, but the tokenizer has no chat template; use off")
    if data.system_prompt and data.chat_template == "off":
        yield RecipeProblem(
            at("system_prompt"), f"needs a chat template and {at('chat_template')} is off; use auto or on"
        )
    elif data.system_prompt and data.chat_template == "auto" and absent:
        yield RecipeProblem(
            at("system_prompt"),
            "needs a chat template, and the tokenizer has none; leave it out, or use a model whose tokenizer has one",
        )


def chat_template(facts: Facts) -> Iterator[RecipeProblem]:
    yield from template(facts.recipe.data, facts.tokenizer, "data.{}".format)


def inside_model(path: Path) -> str | None:
    """What is wrong with a folder to write in that is a model's, or within one; None where it is not."""
    whole = path.resolve()
    model = next((folder for folder in (whole, *whole.parents) if holds_model(folder)), None)
    return model and f"is inside {model}, which holds a model; choose another folder"


def writable(facts: Facts) -> Iterator[RecipeProblem]:
    for key, name in (("run.dir", facts.recipe.run.dir), ("checkpoint.dir", facts.recipe.checkpoint.dir)):
        if name is None or facts.elsewhere:
            continue
        inside = inside_model(Path(name))
        if inside:
            yield RecipeProblem(key, f"{name} {inside}")
        folder = Path(name).absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            yield RecipeProblem(key, f"{name} cannot be made because {folder} is a file; choose another folder")
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield RecipeProblem(
                key, f"{name} cannot be written because {folder} is not writable; choose another folder"
            )


def home(facts: Facts) -> Iterator[RecipeProblem]:
    """``~`` is the shell's, which does not see into a recipe; taken literally it would make a folder of that name."""
    paths = {role.at("checkpoint"): role.config.checkpoint for role in facts.roles.values()}
    paths |= {f"{key}.path": source.path for key, source in (facts.sources | facts.benchmarks).items()}
    paths |= {"run.dir": facts.recipe.run.dir, "checkpoint.dir": facts.recipe.checkpoint.dir or ""}
    for key, path in paths.items():
        if path.startswith("~"):
            yield RecipeProblem(key, f"{path}: ~ is not replaced here; write {os.path.expanduser(path)}")
