"""Which words of a trace compute its answer, and which decorate: labels for any text.

    label_characters("2 + 3 = 5. So we are done.", answer="5")

The labels come from the text alone, never from how the text was made, so a sampled trace is
labelled as one of the generator's is. `equation_values` and `number_value` serve the generator too.
"""

import itertools
import re
from collections import Counter
from decimal import Decimal

from data.micro_wordings import TASKS, Wordings, read_wordings

COMPUTING, DECORATING, UNRECOGNISED = 1, 0, -1

NUMBER = r"-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
SIDE = rf"{NUMBER}(?:\s*[-+*/]\s*{NUMBER})+"  # 27 + 48
# A run-on equation, 5 + 7 = 12 - 3 = 9, counts as one: its operands are 5, 7, 12 and 3, and its
# result is 9.
EQUATION_PATTERN = rf"{SIDE}(?:\s*=\s*{SIDE})*\s*=\s*{NUMBER}"
EQUATION = re.compile(rf"(?<![\d$])(?<!\d[.,]){EQUATION_PATTERN}")
TERM = re.compile(rf"(?:^|[-+*/=])\s*({NUMBER})")
SENTENCE = re.compile(r"\S.*?(?:[.?!](?=\s)|\Z)", re.DOTALL)  # 1,200 and 2.5 end no sentence


def sentence_pattern(wordings: Wordings) -> str:
    """Matches every sentence of a trace that any template can write, with any numbers in it."""
    names, items, places = wordings.names, wordings.items, wordings.places
    slots = {slot: NUMBER for slot in "xbkd"} | {
        "eq": EQUATION_PATTERN, "name": "|".join(itertools.chain(*names.values())),
        "She": "|".join(names), "she": "|".join(names).lower(),
        "items": "|".join(items), "place": "|".join(places),
    }  # fmt: skip
    templates = [*itertools.chain(*wordings.sentences.values())]
    for domain in wordings.domains.values():
        told = domain.templates.items()
        templates += [template for kind, of in told if kind != "question" for template in of]

    def pattern_of(template: str) -> str:
        escaped = re.escape(wordings.expand(template))
        escaped = escaped.replace(r"\[", "(?:").replace(r"\]", ")").replace(r"\|", "|")
        return re.sub(r"\\{(\w+)\\}", lambda slot: f"(?:{slots[slot[1]]})", escaped)

    return "|".join(map(pattern_of, templates))


KNOWN_SENTENCE = re.compile("|".join(sentence_pattern(read_wordings(task)) for task in TASKS))


def label_characters(reasoning: str, answer: str) -> list[int]:
    """One label per character of any text: COMPUTING, DECORATING or UNRECOGNISED.

    answer: the number that the trace ended in; with any other text nothing computes.

    An equation computes if its result is the answer or an operand of a computing equation after it,
    whether or not its arithmetic is right. Only the equation itself computes, without the sentence
    around it or its full stop. Every other character decorates where a template could have written
    its sentence. Labels of white space mean nothing.
    """
    labels = [UNRECOGNISED] * len(reasoning)
    for sentence in SENTENCE.finditer(reasoning):
        if KNOWN_SENTENCE.fullmatch(sentence[0].rstrip()):
            labels[sentence.start() : sentence.end()] = [DECORATING] * len(sentence[0])
    for equation in EQUATION.finditer(reasoning):
        labels[equation.start() : equation.end()] = [DECORATING] * len(equation[0])
    for equation in computing_equations(reasoning, answer):
        labels[equation.start() : equation.end()] = [COMPUTING] * len(equation[0])
    return labels


def computing_equations(reasoning: str, answer: str) -> list[re.Match]:
    """The equations that the answer rests on, the last one first."""
    wanted, computing = {number_value(answer)}, []
    for equation in reversed(list(EQUATION.finditer(reasoning))):
        operands, result = equation_values(equation[0])
        if result in wanted:
            wanted |= operands
            computing.append(equation)
    return computing


def computes(reasoning: str, answer: str) -> bool:
    """Whether the answer that the trace ended in rests on an equation of the reasoning."""
    return bool(computing_equations(reasoning, answer))


def token_labels(reasoning: str, answer: str, spans: list[tuple[int, int]]) -> list[int]:
    """One label per token.

    spans: each token's character offsets [start, end) in `reasoning`.

    A token takes the label of most of its characters, white space apart. Of equally frequent labels
    it takes the smallest, because doubt must never count as computing. A token of white space
    alone, or of no characters (a later part of a split character), is UNRECOGNISED.
    """
    labels = label_characters(reasoning, answer)
    tokens = []
    for start, end in spans:
        votes = Counter(labels[i] for i in range(start, end) if not reasoning[i].isspace())
        tokens.append(max(sorted(votes), key=votes.get, default=UNRECOGNISED))
    return tokens


def equation_values(equation: str) -> tuple[set[Decimal | None], Decimal | None]:
    """The operands and the result of a text that EQUATION matches."""
    *operands, result = map(number_value, TERM.findall(equation))
    return set(operands), result


def number_value(text: str) -> Decimal | None:
    """The number that `text` is, or None if it is none."""
    if not re.fullmatch(NUMBER, text.strip()):
        return None
    return Decimal(text.strip().replace("$", "").replace(",", ""))
