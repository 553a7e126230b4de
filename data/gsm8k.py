"""GSM8K (Cobbe et al. 2021), read from --data-dir, the user's cache, or the official repository.

    problems = load("test", limit=100)

Source: https://github.com/openai/grade-school-math (MIT), one JSON object per line with the keys
question and answer; every answer ends in a line "#### N". Four hashes: this is the data's own mark,
parsed here, and not the five-hash delimiter that data.traces looks for in a rollout.
"""

import json
import re
import sys
from pathlib import Path

from data import Problem
from data.download import cache_folder, fetch, sha256_of

URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/"
    "grade_school_math/data/{split}.jsonl"
)
# split -> (bytes, sha256); train has 7473 problems, test 1319
FILES = {
    "train": (4_166_206, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "test": (749_738, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
}

_GOLD = re.compile(r"####\s*(-?[0-9][0-9,]*)\s*")
_CALCULATOR_NOTE = re.compile(r"<<.*?>>")

# Nothing but the number after the delimiter: a unit would be taught the mask as part of the answer.
_INSTRUCTION = """\
{question}

Work through the problem step by step. When you have finished, write ##### and after it the final \
number alone, with no unit and no other words."""


def instruction(question: str) -> str:
    """The user's message: the question, then how to answer it ("##### N" at the end)."""
    return _INSTRUCTION.format(question=question)


def load(split: str, data_dir: str | Path | None = None, limit: int | None = None) -> list[Problem]:
    """The split's problems in the file's order, at most `limit`.

    split: "train" or "test". data_dir: a folder with {split}.jsonl; another file than the published
    one, such as a subset, is taken with a warning. Without data_dir the file comes from
    ~/.cache/atmanrl/gsm8k ($XDG_CACHE_HOME is respected), downloaded there on first use.
    FileNotFoundError where there is no file and no network, ValueError for a bad line or argument.
    """
    if split not in FILES:
        raise ValueError(f"GSM8K has no split {split!r}: use 'train' or 'test'")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}: it must be at least 1")
    if data_dir is None:
        target = cache_folder("gsm8k") / f"{split}.jsonl"
        file = fetch(URL.format(split=split), target, *FILES[split], "GSM8K")
    else:
        file = Path(data_dir) / f"{split}.jsonl"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} not found: put {URL.format(split=split)} there, or leave out --data-dir"
            )
        if sha256_of(file) != FILES[split][1]:
            print(f"warning: {file} is not the published GSM8K {split} file", file=sys.stderr)
    return _read_problems(file, split, limit)


def gold_answer(answer_text: str) -> str:
    """The integer after "####" in the last line, without commas. ValueError where there is none."""
    lines = answer_text.strip().splitlines()
    match = _GOLD.fullmatch(lines[-1]) if lines else None
    if match is None:
        raise ValueError("the answer does not end in a line '#### N'")
    return match[1].replace(",", "")


def _read_problems(file: Path, split: str, limit: int | None) -> list[Problem]:
    problems: list[Problem] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if limit is not None and len(problems) == limit:
                break
            try:
                record = json.loads(line)
                question, answer = record["question"], record["answer"]
                gold = gold_answer(answer)
                if not question.strip():
                    raise ValueError("the question is empty")
            # KeyError, TypeError, AttributeError: JSON, but not an object of two texts
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file}, line {number}: not a GSM8K problem ({error!r}); each line needs "
                    "a question and an answer that ends in '#### N'"
                ) from error
            solution = _CALCULATOR_NOTE.sub("", answer.strip().rpartition("####")[0]).strip()
            problem_id = f"gsm8k/{split}/{len(problems)}"
            problems.append(Problem(problem_id, question.strip(), gold, solution))
    if not problems:
        raise ValueError(f"{file} holds no usable problem: fetch it again")
    return problems
