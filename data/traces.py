"""A rollout's tokens split into reasoning, delimiter and answer, and the answer's value.

The delimiter is the first run of exactly five hashes in the decoded text. It is not one token:
Llama 3 writes it '#####', ' #####', '#####\\n', '.\\n' + '#####', and a sampled text may spell it
'##' + '###'. So it is looked for in the bytes of the text (a hash is one byte, and no part of a
longer UTF-8 character) and mapped back to tokens. The sampled ids are kept and never re-encoded:
encode(decode(ids)) != ids in general, and log-probabilities belong to the ids that were sampled.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate

from data.prompts import Tokenizer

DELIMITER = "#####"
LETTERS = ("A", "B", "C", "D")  # gold answers of multiple choice; every other one is a number
MAX_DIGITS = 40  # a longer string of digits is a loop of the model's, not a number

# A minus counts where it does not join two words ("step-5"), before or after a currency mark.
# Commas count where they set off thousands: "1,200" is 1200, "5,10" is 5. "2...5" holds no ".5".
_NUMBER = re.compile(
    r"(?P<sign>(?<!\w)[-\u2212][$€£¥]?)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
)

# "A", "(B)", "**C**", "\boxed{D}", "The answer is A.": a capital that ends there. "A good one"
# begins with an article, "A is right" does not; "A's" goes on. *+ never tries the words again
# another way: for a trace that loops there are exponentially many.
_LETTER = re.compile(
    r"(?:[\W_]*(?:\\[a-zA-Z]+|(?i:the|correct|final|answer|option|choice|letter|is)\b))*+[\W_]*"
    r"(?P<letter>[A-D])(?![^\W_]|['\u2019][^\W_])"
    r"(?!(?<=A)[ \t]+(?!(?:is|was|because|since|as|or|and|by|for)\b(?!-))[a-z])"
)


@dataclass(frozen=True)
class Trace:
    """A completion in three parts; reasoning + delimiter + answer are its ids, in order.

    reasoning: ids before the delimiter; all ids where there is none.
    delimiter: from the first token that overlaps the hashes (with whatever else that token holds,
        as in ' #####') through the token with the last hash, and the pure white-space tokens after
        it ('#####' + ' '). [] where there is none.
    answer: the rest, the EOS included.
    number: the first number after the hashes in `parse_number`'s form, or None.
    letter: the choice after the hashes, read by `parse_letter`, or None.
    text, reasoning_text: the decoded completion, and its reasoning.
    delimiter_count: runs of exactly five hashes in the text.
    truncated: the last token is not an EOS, so the completion was cut at its limit.
    """

    reasoning: list[int]
    delimiter: list[int]
    answer: list[int]
    number: str | None
    letter: str | None
    text: str
    reasoning_text: str
    delimiter_count: int
    truncated: bool

    @property
    def valid(self) -> bool:
        """Whether this is a finished completion with a delimiter and reasoning before it.

        White space alone is no reasoning: a blank trace must not pass for a very short one.
        """
        return bool(self.delimiter) and bool(self.reasoning_text.strip()) and not self.truncated

    def parsed(self, gold: str) -> str | None:
        """The answer in the gold one's kind: the letter where that is A to D, else the number."""
        return self.letter if gold in LETTERS else self.number

    def correct(self, gold: str) -> bool:
        """Eq. 4's question: valid, and the number or letter is the gold one.

        paper silent: without reasoning, or cut at the limit, even the right answer counts as wrong.
        """
        answer = self.parsed(gold)
        return self.valid and (answer == gold if gold in LETTERS else same_number(answer, gold))


def split_trace(
    completion_ids: Sequence[int], tokenizer: Tokenizer, eos_ids: Sequence[int] | None = None
) -> Trace:
    """Splits one sampled completion: no padding, EOS kept. eos_ids: default the tokenizer's."""
    ids = list(completion_ids)
    eos_ids = tokenizer.eos_ids if eos_ids is None else eos_ids
    truncated = not ids or ids[-1] not in eos_ids
    pieces = [tokenizer.token_bytes(i) for i in ids]
    raw = b"".join(pieces)
    runs = _delimiter_runs(raw)
    if not runs:
        stop = len(ids)
        while stop > 0 and ids[stop - 1] in eos_ids:
            stop -= 1
        first, answer_text = stop, ""
    else:
        hash_start, hash_end = runs[0]
        ends = list(accumulate(map(len, pieces)))  # (C,) byte offset where each token ends
        first = bisect_right(ends, hash_start)  # first token that ends after the hashes begin
        stop = bisect_left(ends, hash_end) + 1  # just after the token with the last hash
        # After '#####$' the white space no longer follows the hashes, so it is left in the answer.
        if not raw[hash_end : ends[stop - 1]].strip():
            while stop < len(ids) and pieces[stop].isspace():
                stop += 1
        answer_text = raw[hash_end:].decode("utf-8", errors="replace")
    return Trace(
        reasoning=ids[:first],
        delimiter=ids[first:stop],
        answer=ids[stop:],
        number=parse_number(answer_text),
        letter=parse_letter(answer_text),
        text=raw.decode("utf-8", errors="replace"),
        reasoning_text=b"".join(pieces[:first]).decode("utf-8", errors="replace"),
        delimiter_count=len(runs),
        truncated=truncated,
    )


def gold_tail(trace: Trace, gold_answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(delimiter_ids, answer_ids): the delimiter as sampled, then the gold answer in Eq. 2's place.

    The delimiter is kept through the last hash and the pure white-space tokens after it. White
    space that a token joins to more (' $', ' B') goes before a number to the delimiter, because no
    number's token begins with white space; before a letter it goes to the answer, because ' B' is
    one token, the one that a model writes after a space, and ' ' + 'B' a spelling it hardly knows.
    Hashes that a token joins to more ('#####$') are encoded anew without it. Where no white space
    follows the hashes none is added. A number is written without commas, and no EOS follows.
    Neither list is empty. ValueError for a trace without a delimiter or an answer without text.
    """
    gold = gold_answer.replace(",", "").strip()
    if not trace.delimiter or not gold:
        raise ValueError("gold_tail needs a trace with a delimiter and a gold answer with text")
    pieces = [tokenizer.token_bytes(i) for i in trace.reasoning + trace.delimiter + trace.answer]
    raw = b"".join(pieces)
    hash_end = _delimiter_runs(raw)[0][1]
    rest = raw[hash_end:]

    delimiter, hashes, beside = list(trace.delimiter), "", b""
    stop = len(trace.reasoning) + len(delimiter)
    excess = sum(map(len, pieces[:stop])) - hash_end  # bytes of the delimiter's tokens after it
    if rest[:excess].strip():  # '#####$'
        piece = tokenizer.token_bytes(delimiter.pop())
        # the token may begin inside a character, whose last bytes cannot be encoded by themselves
        hashes, beside = piece[:-excess].decode("utf-8", errors="ignore"), rest
    elif trace.answer:  # ' $', ' The'
        beside = pieces[stop]
    white_space = beside[: len(beside) - len(beside.lstrip())].decode("utf-8")
    if gold in LETTERS:
        return delimiter + tokenizer.encode(hashes), tokenizer.encode(white_space + gold)
    return delimiter + tokenizer.encode(hashes + white_space), tokenizer.encode(gold)


def parse_number(text: str) -> str | None:
    """The first number in the text, canonical, or None.

    "$1,200." -> "1200", "18.0" -> "18", ".5" -> "0.5", "-$5" and "$-5" -> "-5", "-0" -> "0". Never
    an exponent. None for a number of more than MAX_DIGITS characters.
    """
    match = _NUMBER.search(text)
    if match is None or len(match["digits"]) > MAX_DIGITS:
        return None
    digits = format(Decimal(match["digits"].replace(",", "")), "f")  # exact, unlike normalize()
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"-{digits}" if match["sign"] and digits != "0" else digits


def parse_letter(text: str) -> str | None:
    """The choice that the text begins with, a capital A to D, or None.

    Marks may stand before it, and words such as "The answer is" or "Option"; anything may follow
    that does not go on with the word: "B", "(B)", "**B**", "B) 12", "\\boxed{B}", "B because". "A"
    before a word in lower case is the article: "A good answer" is None.
    """
    match = _LETTER.match(text)
    return match and match["letter"]


def same_number(a: str | None, b: str | None) -> bool:
    """Whether both texts hold a number and it is the same one: "18.0" and "18" are."""
    number = None if a is None or b is None else parse_number(a)
    return number is not None and number == parse_number(b)


def reasoning_spans(
    trace_ids: Sequence[int], tokenizer: Tokenizer
) -> tuple[str, list[tuple[int, int]]]:
    """(text, spans): the decoded ids and each token's [start, end) in characters of the text.

    The spans tile the text in order. A character split over several tokens belongs to the one with
    its first byte; the others get an empty span, as special tokens do. Invalid bytes are U+FFFD.
    """
    pieces = [tokenizer.token_bytes(i) for i in trace_ids]
    text, starts = _decode_with_offsets(b"".join(pieces))
    bounds = [bisect_left(starts, end) for end in accumulate(map(len, pieces), initial=0)]
    return text, list(zip(bounds[:-1], bounds[1:], strict=True))


def _delimiter_runs(raw: bytes) -> list[tuple[int, int]]:
    """[start, end) in bytes of each run of exactly five hashes."""
    runs = re.finditer(rb"#+", raw)
    return [run.span() for run in runs if len(run[0]) == len(DELIMITER)]


def _decode_with_offsets(raw: bytes) -> tuple[str, list[int]]:
    """raw.decode(errors="replace"), and the byte offset at which each character begins."""
    text, starts, position = [], [], 0
    while position < len(raw):
        try:
            piece, bad = raw[position:].decode("utf-8"), 0
        except UnicodeDecodeError as error:
            piece = raw[position : position + error.start].decode("utf-8")
            bad = error.end - error.start
        for character in piece:
            starts.append(position)
            position += len(character.encode("utf-8"))
        if bad:  # one U+FFFD stands for the whole invalid stretch
            piece += "\ufffd"
            starts.append(position)
            position += bad
        text.append(piece)
    return "".join(text), starts
