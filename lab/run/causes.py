"""Why samples have no answer, and what helps: sentences for whoever trains, evaluates or explains.

    for sentence in causes(records, settings, settings.max_new_tokens): ...

A sample without a delimiter counts as wrong whatever it says, and so does one that was cut. Advice
is given only where it fits: a model that goes in circles needs no higher limit, and one that marks
its answer in another way no other seed.
"""

import re
import zlib
from collections import Counter

from data import DATASETS

# An answer behind hashes ends its line, which a heading does not: '#### 72', '### $1,200 dollars'.
# It comes last, or the text begins anew after it, where a heading has its section: '## 2 Apples'.
HASHES = re.compile(
    r"(?<!#)(#{2,})\s*[*(]*(?:-?[$€£]?-?\d[\d,]*(?:\.\d+)?(?:[ %]\w{0,12}){0,2}|[A-D])[*).]*\s*?"
    r"(?=\n*\Z|\n+(?:Question:|.*#{2}))",
)
MARKS = {  # what else models write before an answer
    r"\boxed{": re.compile(r"\\boxed\{"),
    '"the answer is"': re.compile(r"\b[Aa]nswer(?: is|:)[^\w\n]*(?:\d|[A-D]\b)"),
}
UNFINISHED = "ran into --max-new-tokens"


def causes(samples: list[dict], settings, limit: int) -> list[str]:
    """Sentences on why half of the samples or more, or a tenth by being cut, count as wrong.

    samples: data.traces.Rollout.record's, or others with text, no_delimiter and truncated.
    settings: with dataset, shots and delimiter, as every command has. limit: --max-new-tokens.
    """
    lacking = [sample for sample in samples if sample["no_delimiter"]]
    if lacking and 2 * len(lacking) >= len(samples):
        what, helps = no_delimiter(samples, settings, limit)
        share = f"{len(lacking) / len(samples):.0%} of {len(samples)} samples"
        reason = f"{share} have no delimiter {settings.delimiter} and count as wrong: {what}"
        examples = [sample["text"].strip()[-60:] for sample in lacking[:1] + lacking[1:][-1:]]
        return [reason, f"they end like {' and '.join(map(ascii, examples))}", helps]
    cut = [sample for sample in samples if sample["truncated"]]
    if 10 * len(cut) <= len(samples):
        return []
    share = f"{len(cut) / len(samples):.0%} of {len(samples)} samples"
    circling = sum(map(in_circles, cut))
    reason = f"{share} are cut at --max-new-tokens {limit} and count as wrong"
    if 2 * circling > len(cut):
        return [f"{reason}; most of these go in circles, which a higher limit would not end"]
    if 2 * len(cut) <= sum(s["truncated"] or s["no_delimiter"] for s in samples):
        return []
    if 2 * sum(not sample["no_delimiter"] for sample in cut) > len(cut):
        return [f"{reason}; most of these have the delimiter, and no answer that ends"]
    if limit < DATASETS[settings.dataset].max_new_tokens["heldout"]:
        return [f"{reason}; raise it"]
    return [f"{reason}; the solutions of {settings.dataset} are shorter"]


def no_delimiter(samples: list[dict], settings, limit: int) -> tuple[str, str]:
    """What those of the samples without a delimiter wrote in its place, and what helps."""
    lacking = [sample for sample in samples if sample["no_delimiter"]]
    kinds = Counter(map(kind_of, lacking)).most_common()
    shares = [f"{count / len(lacking):.0%} {kind}" for (kind, _), count in kinds]
    what = ", ".join(shares) if len(samples) > 1 else f"it {kinds[0][0][0]}"
    (_, mark), most = kinds[0]
    helps, enough = [], DATASETS[settings.dataset].max_new_tokens["heldout"]
    if 2 * dict(kinds).get((UNFINISHED, ""), 0) > len(lacking) and limit < enough:
        helps.append(f"a higher --max-new-tokens than {limit}, where they lead to an answer")
    if mark and most > len(samples) - len(lacking):
        helps.append(f'--delimiter "{mark}", which takes what it writes')
    if settings.shots < 4:
        helps.append("--shots 4, which shows the form")
    if settings.dataset != "mmlu":  # which has no solutions
        helps.append("a warm start (python -m lab.study.warm_start), which trains it")
    return what, "what helps: " + ("; ".join(helps) or "a model that follows instructions")


def kind_of(sample: dict) -> tuple[str, str]:
    """What a sample did that has no delimiter; and the hashes that it wrote in its place, or ""."""
    text = sample["text"]
    if runs := HASHES.findall(text):
        return f"wrote {runs[-1]} before the answer", runs[-1]
    for mark, pattern in MARKS.items():
        if pattern.search(text):
            return f"wrote {mark}", ""
    if not sample["truncated"]:
        return "ended without marking an answer", ""
    return ("went in circles until cut" if in_circles(sample) else UNFINISHED), ""


def in_circles(sample: dict) -> bool:
    """Whether the end of the text repeats itself, numbers aside: zlib makes little of it.

    Of GSM8K's solutions the most repetitive keeps 0.26 of its size, "Step 1: ..., Step 2: ..." with
    the same words 0.08.
    """
    end = re.sub(r"\d+", "0", sample["text"])[-600:].encode()
    return len(zlib.compress(end)) < 0.2 * len(end)
