"""95% intervals: a percentile bootstrap over questions.

    interval({"q1": (3, 4), "q2": (1, 4)})          # a pooled share: 4 of 8
    difference(before, after)                       # paired: a question counts in both arms, or not

Samples of one question are not independent, questions are: so questions are what is drawn again,
with all their samples. Every quantity here is a ratio of two sums over questions. A mean has 1 in
each denominator, a pooled share the number of tokens, a macro average its subject's weight. Where
all questions agree the interval has no width: with few questions that is too sure.
"""

import math
from functools import lru_cache

import numpy as np

DRAWS = 2000

# A quantity: question -> (numerator, denominator). A question that is not there was not measured.
Ratios = dict[str, tuple[float, float]]


def interval(ratios: Ratios, draws: int = DRAWS, seed: int = 0) -> dict:
    """The ratio of sums with its interval: value, low, high (None where unknown), questions.

    One question alone has a value and no interval.
    """
    return _describe([_arrays(ratios, sorted(ratios))], draws, seed)


def difference(before: Ratios, after: Ratios, draws: int = DRAWS, seed: int = 0) -> dict:
    """after - before over the questions measured in both, drawn together: interval's keys."""
    common = sorted(before.keys() & after.keys())
    return _describe([_arrays(after, common), _arrays(before, common)], draws, seed)


@lru_cache(maxsize=2)  # a table asks for the same one again and again; each is large
def _resamples(questions: int, draws: int, seed: int) -> np.ndarray:
    """How often each question comes when Q are drawn with replacement: (draws, Q)."""
    chances = np.full(questions, 1 / questions)
    counts = np.random.default_rng(seed).multinomial(questions, chances, size=draws)
    return counts.astype(float)


def _arrays(ratios: Ratios, questions: list[str]) -> np.ndarray:
    """(2, Q): numerators and denominators."""
    return np.array([ratios[name] for name in questions], dtype=float).reshape(-1, 2).T


def _describe(arms: list[np.ndarray], draws: int, seed: int) -> dict:
    """The first arm's ratio, less the second's if there is one."""
    questions = arms[0].shape[1]

    def combine(weights):
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0: nothing of it was drawn
            ratios = [(weights @ above) / (weights @ below) for above, below in arms]
        return ratios[0] - ratios[1] if len(ratios) == 2 else ratios[0]

    value = float(combine(np.ones(questions)))
    result = {"value": None, "low": None, "high": None, "questions": questions}
    if not math.isfinite(value):
        return result
    result["value"] = value
    if questions > 1:
        found = combine(_resamples(questions, draws, seed))
        found = found[np.isfinite(found)]
        if len(found):
            low, high = np.percentile(found, (2.5, 97.5))
            result |= {"low": float(low), "high": float(high)}
    return result
