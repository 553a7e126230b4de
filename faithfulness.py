"""Faithfulness, measured apart from what is trained: does the answer rest on the reasoning?

Two claims that must not be confused. How far the model *relies* on its reasoning:

    truncation()    cut the reasoning short, append the delimiter: is the answer still the same?
    knockout()      hide the reasoning (or the prompt) from the answer: how far does it move?
    corruption()    change one intermediate number, let the model go on: does the answer follow?

and, given a map of which tokens mattered, whether that *map is right*:

    rankings()      tokens by mask, attribution, gradient, leave-one-out, and by no map at all
    erasure()       hide the first tokens of a ranking, or all others: what is left of the answer?
    label_areas()   micro: does the ranking tell computing tokens from decoration?

Sources: truncation and corruption after Lanham et al. 2023 (who cut by sentences and let a model
write the mistake; here by tokens, and a number is drawn); comprehensiveness, sufficiency and AOPC
after DeYoung et al. 2020 (ERASER). Hiding is Eq. 1 with an additive mask so low that nothing comes
through, in all layers and heads.

Shapes: B rollouts; P prompt, T reasoning, D delimiter, A answer tokens; S = P + T + D + A - 1;
own rows R = T + D + A - 1; V vocabulary.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from atman import answer_loss, frozen, optimize_masks, pack, token_saliency
from cache import Prefill
from data import micro_task
from data.prompts import Tokenizer
from data.traces import Trace, gold_tail, parse_number, reasoning_spans, split_trace
from grpo import generate
from model import Llama, right_pad
from suffix import Suffix

HIDDEN = -1e4  # on a score: its attention weight is exactly 0, in float32 and bfloat16
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the reasoning that truncation leaves
TOP_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # of the reasoning tokens that erasure takes
ANSWER_TOKENS = 24  # room for an answer after the delimiter
VARIANTS = 64  # of traces with hidden tokens, run together

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
LABEL = re.compile(r"^[ \t]*(\d+)[.)](?!\d)", re.MULTILINE)  # of a list: "1." or "2)"
RESULT = re.compile(r"=[ \t]*[-\u2212]?\\?[$€£¥]?[ \t]*\Z")  # what stands before a result


@dataclass(frozen=True)
class Case:
    """One sampled trace as the measures take it; the trace is valid (Trace.valid)."""

    prompt: list[int]
    question: str
    trace: Trace
    gold: str
    seed: tuple[int, ...]  # of what is drawn about this trace


# ----------------------------------------------------------------------- reliance of the model


def truncation(model: Llama, tokenizer: Tokenizer, cases: list[Case]) -> list[list[bool] | None]:
    """For each of FRACTIONS of the reasoning: is the greedy answer the same as with all of it?

    None for a trace whose greedy answer with all of its reasoning cannot be read.
    """
    contexts, golds = [], []
    for case in cases:
        for fraction in FRACTIONS:
            kept = case.trace.reasoning[: round(fraction * len(case.trace.reasoning))]
            contexts.append(case.prompt + kept + case.trace.delimiter)
            golds.append(case)
    said = generate(model, contexts, ANSWER_TOKENS, 0, tokenizer.eos_ids)
    answers = [
        split_trace(case.trace.delimiter + tokens, tokenizer).parsed(case.gold)
        for case, tokens in zip(golds, said, strict=True)
    ]
    curves = []
    for start in range(0, len(answers), len(FRACTIONS)):
        *_, whole = curve = answers[start : start + len(FRACTIONS)]
        curves.append(None if whole is None else [answer == whole for answer in curve])
    return curves


def area_over_curve(same: list[float]) -> float:
    """1 - the area under the curve over FRACTIONS (trapezoids): 0 where no cut changes the answer.

    At most 0.9: with all of its reasoning an answer is its own.
    """
    return 1.0 - float(np.trapezoid(np.asarray(same, dtype=float), FRACTIONS))


@torch.no_grad()
def knockout(model: Llama, tokenizer: Tokenizer, cases: list[Case]) -> list[dict | None]:
    """How far the answer moves, in nats (0 to ln 2), when the delimiter and answer rows are blind.

    necessity: to the reasoning; direct: to the prompt, but for the BOS, which many heads use as
    their resting place. Jensen-Shannon divergence of the next-token distributions, mean over the
    tokens of the model's own answer, teacher forced, without the EOS. What the reasoning's own rows
    gathered from the prompt stays visible under `direct`. None for an empty answer.
    """
    answers = [[t for t in case.trace.answer if t not in tokenizer.eos_ids] for case in cases]
    some = [n for n, answer in enumerate(answers) if answer]
    result: list[dict | None] = [None] * len(cases)
    if not some:
        return result
    device = model.embed_tokens.weight.device
    rows = [
        cases[n].prompt + cases[n].trace.reasoning + cases[n].trace.delimiter + answers[n][:-1]
        for n in some
    ]
    tokens, lengths = right_pad(rows, device)  # (B, S)
    _, counts = right_pad([answers[n] for n in some], device)
    step = torch.arange(int(counts.max()), device=device)
    used = step < counts[:, None]  # (B, A)
    head_rows = ((lengths - counts)[:, None] + step).where(used, 0)

    place = torch.arange(tokens.shape[1], device=device)
    prompt_end = torch.tensor([len(cases[n].prompt) for n in some], device=device)[:, None]
    blind = torch.tensor([len(cases[n].trace.reasoning) for n in some], device=device)[:, None]
    blind = place >= prompt_end + blind  # (B, S) delimiter and answer rows
    columns = {
        "necessity": (place >= prompt_end) & ~blind,
        "direct": (place > 0) & (place < prompt_end),
    }
    whole = model(tokens, head_rows=head_rows)  # (B, A, V)
    for name, hidden in columns.items():
        mask = HIDDEN * (blind[:, None, :, None] & hidden[:, None, None, :]).float()
        moved = jensen_shannon(whole, model(tokens, mask=mask, head_rows=head_rows))
        moved = (moved * used).sum(1) / counts  # (B,)
        for n, value in zip(some, moved.tolist(), strict=True):
            result[n] = (result[n] or {}) | {name: value}
    return result


def jensen_shannon(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence over the last dimension, in nats: 0 for equals, at most ln 2."""
    logp, logq = logits.double().log_softmax(-1), others.double().log_softmax(-1)
    middle = torch.logaddexp(logp, logq) - math.log(2)

    def kl(log):  # to the middle; what has no probability adds nothing
        return (log.exp() * (log - middle)).where(log > -torch.inf, 0.0).sum(-1)

    return ((kl(logp) + kl(logq)) / 2).clamp(min=0)


def corruption(
    model: Llama, tokenizer: Tokenizer, cases: list[Case], max_new_tokens: int
) -> list[bool | None]:
    """Change one intermediate number and let the model write on: does its answer change?

    The number is drawn from the results of the reasoning, those after an equals sign, that neither
    the question holds nor the trace answers: to follow a changed answer is to copy it, and terse
    traces have little else. A trace without any equation has its other numbers drawn from, a
    list's labels apart. The reasoning is cut after the number, once as it was and once changed
    (`altered_number`), and the model goes on greedily from both, to its answer: what came after the
    number would contradict the change. None where there is no such number, or no answer that can be
    read from either.
    """
    jobs, contexts = [], []
    for n, case in enumerate(cases):
        cuts = altered_reasoning(case, tokenizer)
        if cuts:
            jobs.append((n, cuts))
            contexts += [case.prompt + cut for cut in cuts]
    said = generate(model, contexts, max_new_tokens, 0, tokenizer.eos_ids)
    result: list[bool | None] = [None] * len(cases)
    for row, (n, cuts) in enumerate(jobs):
        as_it_was, changed = (
            split_trace(cut + said[2 * row + which], tokenizer).parsed(cases[n].gold)
            for which, cut in enumerate(cuts)
        )
        result[n] = None if None in (as_it_was, changed) else as_it_was != changed
    return result


def altered_reasoning(case: Case, tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The reasoning's ids up to an intermediate number, as it was and with that number changed."""
    text, spans = reasoning_spans(case.trace.reasoning, tokenizer)
    numbers = list(NUMBER.finditer(text))
    lines = [text[text.rfind("\n", 0, m.start()) + 1 : m.start()] for m in numbers]
    results = [m for m, line in zip(numbers, lines, strict=True) if RESULT.search(line)]
    labels = {match.start(1) for match in LABEL.finditer(text)}
    known = {parse_number(match[0]) for match in NUMBER.finditer(case.question)}
    known |= {None, (case.trace.number or "").lstrip("-")}  # None: a loop of digits is no number
    chosen = [
        match
        for match in results or numbers
        if parse_number(match[0]) not in known and match.start() not in labels
    ]
    if not chosen:
        return None
    rng = np.random.default_rng(case.seed)
    match = chosen[rng.integers(len(chosen))]
    touched = [i for i, (a, b) in enumerate(spans) if a < match.end() and b > match.start()]
    first, last = touched[0], touched[-1]
    before, after = text[spans[first][0] : match.start()], text[match.end() : spans[last][1]]
    changed = tokenizer.encode(before + altered_number(match[0], rng) + after)
    ids = case.trace.reasoning
    return ids[: last + 1], ids[:first] + changed


def altered_number(number: str, rng: np.random.Generator) -> str:
    """Another number as long, at most 9 away: a slip, not nonsense. Decimals stay as they are."""
    whole, dot, decimals = number.partition(".")
    least = 10 ** (len(whole.replace(",", "")) - 1)  # so many digits, and no leading zero
    value = max(int(whole.replace(",", "")), least)
    near = [n for n in range(max(value - 9, least), min(value + 10, 10 * least)) if n != value]
    other = near[rng.integers(len(near))]
    return (f"{other:,}" if "," in whole else str(other)) + dot + decimals


# ----------------------------------------------------------------------- rightness of the map


def optimize_traces(model, tokenizer, prompts, traces, golds, config, progress=None, prefill=None):
    """The masks of sampled traces that have a delimiter: a MaskResult.

    The gold answer stands in place of the sampled one, for wrong traces too (Eq. 2).
    """
    tails = [gold_tail(trace, gold, tokenizer) for trace, gold in zip(traces, golds, strict=True)]
    return optimize_masks(
        model,
        prompts,
        [trace.reasoning for trace in traces],
        [delimiter for delimiter, _ in tails],
        [answer for _, answer in tails],
        config,
        progress,
        prefill,
    )


class Erased:
    """Traces from which reasoning tokens can be hidden: log p(answer) of each such variant.

    Hidden means hidden from all later rows: reasoning, delimiter and answer.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, cases: list[Case]):
        self.model, self.prefill = model, Prefill(model, [case.prompt for case in cases])
        self.parts = []  # prompt, reasoning, delimiter, answer of each trace
        for case in cases:
            tail = gold_tail(case.trace, case.gold, tokenizer)
            self.parts.append((case.prompt, case.trace.reasoning, *tail))

    def batch(self, numbers):
        """(Batch, Suffix) of the traces with these numbers, repeated ones too."""
        prompts, *others = zip(*(self.parts[n] for n in numbers), strict=True)
        batch = pack(prompts, *others, self.model.embed_tokens.weight.device)
        return batch, Suffix(self.model, self.prefill, prompts, batch.tokens, batch.answer_rows)

    @torch.no_grad()
    def logprobs(self, variants: list[tuple[int, np.ndarray]]) -> np.ndarray:
        """log p(answer), summed over its tokens, of each (trace's number, hidden (T,) bool)."""
        result = np.zeros(len(variants))
        order = sorted(range(len(variants)), key=lambda n: len(variants[n][1]))  # less padding
        for start in range(0, len(order), VARIANTS):
            chosen = order[start : start + VARIANTS]
            batch, suffix = self.batch([variants[n][0] for n in chosen])
            hidden, _ = right_pad([variants[n][1].astype(int) for n in chosen], batch.tokens.device)
            additive = HIDDEN * (hidden[:, None, :] * batch.region)  # (B, R, T)
            loss = answer_loss(suffix.logits(additive.to(suffix.bias.dtype)), batch)
            lengths = (batch.answer_weights > 0).sum(1)  # the loss is a mean over A tokens
            result[chosen] = -(loss * lengths).cpu().numpy()
        return result

    def gradients(self) -> list[np.ndarray]:
        """Minus the gradient of the loss by the mask, at no mask, summed over rows: (T,) each."""
        result = []
        for number, (_, reasoning, *_) in enumerate(self.parts):
            with frozen(self.model), torch.enable_grad():
                batch, suffix = self.batch([number])
                mask = torch.zeros_like(batch.region, dtype=suffix.bias.dtype).requires_grad_()
                loss = answer_loss(suffix.logits(mask), batch).sum()
                (gradient,) = torch.autograd.grad(loss, mask)
            tokens = -(gradient * batch.region).sum(1)[0]
            result.append(tokens.double().cpu().numpy()[: len(reasoning)])
        return result


def rankings(
    model, tokenizer, cases: list[Case], configs, erased: Erased, progress=None
) -> list[dict[str, np.ndarray]]:
    """Scores of the reasoning tokens, name -> (T,), more is more important, for each trace.

    configs: name -> (MaskConfig, kind of token_saliency); equal configs share an optimisation.
    gradient: how fast the loss falls as attention to the token is raised, at the unmasked model.
    leave-one-out: log p(answer) lost when the token alone is hidden. recency: later is more.
    is-number: whether the token holds a digit. random: drawn.
    """
    scores: list[dict[str, np.ndarray]] = [{} for _ in cases]
    masks: dict = {}
    for name, (config, kind) in configs.items():
        if config not in masks:
            masks[config] = optimize_traces(
                model,
                tokenizer,
                [case.prompt for case in cases],
                [case.trace for case in cases],
                [case.gold for case in cases],
                config,
                progress,
                erased.prefill,
            )
        for row, tokens in zip(scores, token_saliency(masks[config], config, kind), strict=True):
            row[name] = tokens.double().cpu().numpy()
    alone = [
        (n, np.arange(len(case.trace.reasoning)) == place)
        for n, case in enumerate(cases)
        for place in range(-1, len(case.trace.reasoning))  # -1: nothing hidden
    ]
    logprobs = iter(erased.logprobs(alone))
    for row, case, gradient in zip(scores, cases, erased.gradients(), strict=True):
        length = len(case.trace.reasoning)
        whole, *without = (next(logprobs) for _ in range(length + 1))
        text, spans = reasoning_spans(case.trace.reasoning, tokenizer)
        row["gradient"] = gradient
        row["leave-one-out"] = whole - np.array(without)
        row["recency"] = np.arange(length, dtype=float)
        row["is-number"] = np.array([float(bool(re.search(r"\d", text[a:b]))) for a, b in spans])
        row["random"] = np.random.default_rng((*case.seed, 1)).random(length)
    return scores


def top_tokens(scores: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The highest-ranked tokens as (T,) bool, for each of TOP_SHARES: at least one, ties drawn.

    Each set holds those before it.
    """
    order = np.lexsort((rng.random(len(scores)), -scores))
    tops = []
    for share in TOP_SHARES:
        count = math.ceil(share * len(scores) - 1e-9)  # 10% of 30 is 3, whatever 0.1 * 30 rounds to
        top = np.zeros(len(scores), dtype=bool)
        top[order[: max(1, count)]] = True
        tops.append(top)
    return tops


def erasure(erased: Erased, cases: list[Case], scores: list[dict[str, np.ndarray]]) -> list[dict]:
    """What the answer's probability p loses when tokens are hidden, hard, for each trace.

    A row holds probability (p with all reasoning) and, by ranking, comprehensiveness (p - p without
    the top share) and sufficiency (p - p with the top share alone), each a list over TOP_SHARES. A
    right map has high comprehensiveness and low sufficiency. AOPC is the mean over TOP_SHARES.
    """
    variants: dict[tuple[int, bytes], int] = {}  # each once, whatever rankings agree on it

    def number_of(case: int, hidden: np.ndarray) -> int:
        return variants.setdefault((case, hidden.tobytes()), len(variants))

    plan = []
    for n, (case, row) in enumerate(zip(cases, scores, strict=True)):
        whole = number_of(n, np.zeros(len(case.trace.reasoning), dtype=bool))
        chosen = {}
        for name, tokens in row.items():
            rng = np.random.default_rng((*case.seed, 2))  # ties fall alike for every ranking
            tops = top_tokens(tokens, rng)
            chosen[name] = [(number_of(n, top), number_of(n, ~top)) for top in tops]
        plan.append((whole, chosen))
    hidden = [(case, np.frombuffer(flags, dtype=bool)) for case, flags in variants]
    probability = np.exp(erased.logprobs(hidden))
    return [
        {
            "probability": float(probability[whole]),
            "comprehensiveness": {
                name: [float(probability[whole] - probability[without]) for without, _ in pairs]
                for name, pairs in chosen.items()
            },
            "sufficiency": {
                name: [float(probability[whole] - probability[alone]) for _, alone in pairs]
                for name, pairs in chosen.items()
            },
        }
        for whole, chosen in plan
    ]


def label_areas(case: Case, tokenizer: Tokenizer, scores: dict[str, np.ndarray]) -> dict:
    """Micro: AUROC of each ranking, computing against decorating tokens; None where one is absent.

    Two columns: all tokens, and no punctuation, which is decoration by definition, yet a model may
    gather its result on the full stop after an equation. unlabelled: characters that the parser
    does not know, and characters, white space apart.
    """
    text, spans = reasoning_spans(case.trace.reasoning, tokenizer)
    labels = np.array(micro_task.token_labels(text, case.trace.number, spans))
    known = labels != micro_task.UNRECOGNISED
    word = np.array([text[a:b].strip().strip(".,:;?!") != "" for a, b in spans])
    marks = micro_task.label_characters(text, case.trace.number)
    seen = [mark for char, mark in zip(text, marks, strict=True) if not char.isspace()]

    def areas(used):
        computing = labels[used] == micro_task.COMPUTING
        return {name: auroc(tokens[used], computing) for name, tokens in scores.items()}

    return {
        "all tokens": areas(known),
        "no punctuation": areas(known & word),
        "unlabelled": [seen.count(micro_task.UNRECOGNISED), len(seen)],
    }


def auroc(scores, labels) -> float | None:
    """Area under the ROC curve, ties counted half; None when only one class is there."""
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    positive, negative = scores[labels][:, None], scores[~labels]
    if not len(positive) or not len(negative):
        return None
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())
