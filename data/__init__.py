"""Problems in, prompts out, answers parsed.

    Problem         this file: a question with its gold answer
    micro_task.py   the embedded task: a generator of word problems, a parser that labels traces
    make_micro.py   the one command that makes the checkpoint in data/micro/ from nothing
    gsm8k.py        the real task: found in --data-dir, or downloaded and checked
    prompts.py      the tokenizer, and the chat format stored beside the weights
    traces.py       a rollout's tokens split into reasoning, delimiter and answer

Nothing here knows the model, the mask or the policy update.
"""

import importlib
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer.

    id: unique within dataset and split, e.g. "gsm8k/test/17". answer: the gold number as text,
    without commas or unit, e.g. "18" or "-3". solution: reference reasoning, or "".
    """

    id: str
    question: str
    answer: str
    solution: str = ""


@dataclass(frozen=True)
class Dataset:
    """Where a dataset's module is, what it calls its splits, and how long completions may get."""

    module: str
    splits: dict[str, str]  # train, heldout and, where there is one, hard -> the module's name
    max_new_tokens: dict[str, int]  # of each split: enough for all but a few reference traces


DATASETS = {
    "micro": Dataset(
        "data.micro_task",
        {"train": "train", "heldout": "heldout", "hard": "hard"},
        {"train": 200, "heldout": 200, "hard": 320},
    ),
    "gsm8k": Dataset(
        "data.gsm8k", {"train": "train", "heldout": "test"}, {"train": 1024, "heldout": 1024}
    ),
}


def load_problems(dataset, split, data_dir=None, limit=None, seed=0) -> list[Problem]:
    """Problems of a split, at most `limit`: drawn with `seed`, or micro's first ones.

    dataset: a key of DATASETS. split: train, heldout or hard. data_dir: a folder with the files,
    for datasets that have files. Raises ValueError or FileNotFoundError naming the flag or file.
    """
    if dataset not in DATASETS:
        raise ValueError(f"--dataset {dataset}: choose from {', '.join(DATASETS)}")
    entry = DATASETS[dataset]
    if split not in entry.splits:
        raise ValueError(f"--dataset {dataset} has no split {split!r}: {', '.join(entry.splits)}")
    load = importlib.import_module(entry.module).load
    if dataset == "micro":  # written by a generator, in random order already
        if data_dir is not None:
            raise ValueError("--data-dir: the micro task has no files; did you mean --dataset?")
        return load(entry.splits[split], limit)
    problems = load(entry.splits[split], data_dir)
    if limit is None or limit >= len(problems):
        return problems
    return random.Random(seed).sample(problems, limit)


def instruction(dataset: str, question: str) -> str:
    """The user's message that asks for reasoning, the delimiter, and the answer."""
    return importlib.import_module(DATASETS[dataset].module).instruction(question)
