"""Table 1: accuracy, pass@k, and what the reasoning is made of, with and without intervals.

pass@k is the chance that at least one of k samples is right, without bias from n >= k samples. A
trace is what stands before the delimiter; shares of words are of all its spaCy tokens but white
space, pooled over traces, and categories may overlap ("two" is a stop word and a number).
"""

import math
from collections import Counter

import numpy as np
import spacy

from bootstrap import Ratios

# What counts as a symbol, beside currency marks, where blank English has no tagger.
OPERATORS = set("+-*/=<>^%×÷−±≤≥≠≈")
WORDS = ("tokens", "numbers", "stop_words", "symbols")

ROWS = {  # key: (label, is a share)
    "pass@1": ("accuracy (pass@1)", True),
    "macro pass@1": ("  mean of subjects", True),
    "pass@2": ("pass@2", True),
    "pass@3": ("pass@3", True),
    "pass@4": ("pass@4", True),
    "tokens": ("tokens per trace", False),
    "tokens_spread": ("  spread in a question", False),
    "spacy_tokens": ("spaCy tokens per trace", False),
    "numbers": ("numbers", True),
    "stop_words": ("stop words", True),
    "symbols": ("symbols", True),
    "truncated": ("cut at the limit", True),
    "no_delimiter": ("no delimiter", True),
}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one.

    The unbiased estimate of Chen et al. 2021 (Codex), from `correct` right ones in `samples`.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def load_spacy(name: str | None):
    """A trained spaCy pipeline by name or path, or blank English. ValueError when it is absent."""
    if name is None:
        return spacy.blank("en")
    try:
        return spacy.load(name)
    except ValueError as error:  # a folder that is no pipeline, or not of this spaCy
        raise ValueError(f"--spacy-model {name}: {str(error).splitlines()[0]}") from None
    except OSError:
        raise ValueError(
            f"--spacy-model {name}: no such pipeline; get it with `python -m spacy download {name}`"
            " or leave the flag out for blank English"
        ) from None


def describe_spacy(pipeline) -> str:
    """Which pipeline counted, for the head of every table."""
    if not pipeline.pipe_names:
        return "blank English's lexical attributes (no trained tagger)"
    meta = pipeline.meta
    name = f"{meta['lang']}_{meta['name']} {meta['version']}"
    if not pipeline("7 cats").has_annotation("POS"):
        return f"lexical attributes ({name} has no tagger)"
    return f"a trained tagger ({name})"


def word_counts(texts, pipeline) -> dict[str, int]:
    """Table 1's counts over all texts: tokens (without white space), numbers, stop_words, symbols.

    With a trained tagger: pos NUM and SYM. Blank English has none, so its lexical attributes stand
    in: like_num, and currency marks or arithmetic operators.
    """
    rows = counts_by_text(texts, pipeline)
    return {kind: sum(row[kind] for row in rows) for kind in WORDS}


def counts_by_text(texts, pipeline) -> list[dict[str, int]]:
    """word_counts of each text."""
    rows = []
    for doc in pipeline.pipe(texts):
        counts = dict.fromkeys(WORDS, 0)
        tagged = doc.has_annotation("POS")
        for token in doc:
            if token.is_space:
                continue
            counts["tokens"] += 1
            counts["stop_words"] += token.is_stop
            if tagged:
                counts["numbers"] += token.pos_ == "NUM"
                counts["symbols"] += token.pos_ == "SYM"
            else:
                counts["numbers"] += token.like_num
                counts["symbols"] += is_symbol(token)
        rows.append(counts)
    return rows


WORD_KINDS = ("number", "symbol", "stop word", "punctuation", "other")


def word_spans(texts, pipeline) -> list[list[list]]:
    """The words of each text: [start, end, one of WORD_KINDS, the pipeline's name for it].

    [start, end) in characters; white space is no word. A word that counts twice in Table 1, as
    "two" does, has the first of its kinds. The name is the part of speech, "" without a tagger.
    """
    rows = []
    for doc in pipeline.pipe(texts):
        tagged = doc.has_annotation("POS")
        rows.append([])
        for token in doc:
            if token.is_space:
                continue
            number = token.pos_ == "NUM" if tagged else token.like_num
            symbol = token.pos_ == "SYM" if tagged else is_symbol(token)
            is_kind = (number, symbol, token.is_stop, token.is_punct, True)
            kind = WORD_KINDS[is_kind.index(True)]
            rows[-1].append([token.idx, token.idx + len(token), kind, token.pos_])
    return rows


def is_symbol(token) -> bool:
    """Without a tagger: currency marks and arithmetic operators."""
    return token.is_currency or token.text in OPERATORS


def table1_ratios(records: list[dict], words: list[dict[str, int]]) -> dict[str, Ratios]:
    """Table 1 by question: key of ROWS -> problem -> (numerator, denominator).

    records: eval.evaluate's; words: counts_by_text of their texts. pass@1 counts every problem
    alike (micro average). Where all records have a subject, macro pass@1 weighs each subject alike.
    """
    by_problem: dict[str, list[tuple[dict, dict]]] = {}
    for record, counts in zip(records, words, strict=True):
        by_problem.setdefault(record["id"], []).append((record, counts))
    samples = min(len(rows) for rows in by_problem.values())
    k = min(4, samples)
    subject_of = {record["id"]: record.get("subject") for record in records}
    sizes = Counter(subject_of.values())  # problems of each subject

    ratios: dict[str, Ratios] = {}

    def put(key, problem, numerator, denominator=1.0):
        ratios.setdefault(key, {})[problem] = (float(numerator), float(denominator))

    for problem, rows in by_problem.items():
        n, right = len(rows), sum(record["correct"] for record, _ in rows)
        lengths = [len(record["reasoning"]) for record, _ in rows]
        total = {kind: sum(counts[kind] for _, counts in rows) for kind in WORDS}
        put("pass@1", problem, right / n)
        if all(subject_of.values()):
            weight = 1 / (len(sizes) * sizes[subject_of[problem]])
            put("macro pass@1", problem, weight * right / n, weight)
        if k > 1:
            put(f"pass@{k}", problem, pass_at_k(n, right, k))
        put("tokens", problem, sum(lengths), n)
        put("tokens_spread", problem, np.std(lengths))
        put("spacy_tokens", problem, total["tokens"], n)
        for kind in WORDS[1:]:
            put(kind, problem, total[kind], total["tokens"])
        for kind in ("truncated", "no_delimiter"):
            put(kind, problem, sum(record[kind] for record, _ in rows), n)
    return ratios


def summarize(records: list[dict], pipeline) -> dict:
    """Table 1 from eval.evaluate's records, one number for each row, without intervals."""
    words = counts_by_text([record["text"] for record in records], pipeline)
    samples = Counter(record["id"] for record in records)
    summary = {"problems": len(samples), "samples": min(samples.values())}
    for key, by_problem in table1_ratios(records, words).items():
        above, below = np.array(list(by_problem.values())).sum(0)
        summary[key] = float(above / below) if below else 0.0
    return summary


def cell(value: float, share: bool, found: dict | None) -> tuple[str, str]:
    """A number of Table 1, and its interval (found: bootstrap.interval) or ""."""
    text = f"{value:.1%}" if share else f"{value:.1f}"
    if not found or found["low"] is None:
        return text, ""
    scale = 100 if share else 1
    return text, f"[{scale * found['low']:.1f}, {scale * found['high']:.1f}]"


def table(columns: dict[str, dict], pipeline, intervals: dict[str, dict] | None = None) -> str:
    """Summaries side by side as text.

    With two or more, the last column's change from the first; with intervals (column -> key ->
    bootstrap.interval) these stand behind each number instead.
    """
    first, last = next(iter(columns.values())), list(columns.values())[-1]
    width = max(25 if intervals else 12, *(len(name) + 2 for name in columns))
    changes = len(columns) > 1 and not intervals
    lines = [f"{first['problems']} problems x {first['samples']} samples; numbers, stop words and "
             f"symbols by spaCy, {describe_spacy(pipeline)}"]  # fmt: skip
    lines.append(" " * 24 + "".join(f"{name:>{width}}" for name in columns)
                 + (f"{'change':>12}" if changes else ""))  # fmt: skip
    for key, (label, share) in ROWS.items():
        if key not in first:
            continue
        line = f"{label:<24}"
        for name, summary in columns.items():
            value, ends = cell(summary[key], share, intervals and intervals[name][key])
            if ends:
                value += f" {ends:>14}"
            line += f"{value:>{width}}"
        if changes and key in last:
            difference = last[key] - first[key]
            if "pass@" in key or key in ("truncated", "no_delimiter"):
                line += f"{100 * difference:>+8.1f} pts"
            elif first[key]:
                line += f"{difference / first[key]:>+12.0%}"
        lines.append(line)
    return "\n".join(lines)
