"""The fixed masks by independent arithmetic: reliance of atman.py, and lab/measure/cir.py."""

import math
from pathlib import Path

import pytest
import torch

from atman import lay_out, plain_logits, reliance, reliance_saliency
from data import load_problems
from data.prompts import Prompting
from data.tokenizer import Tokenizer
from lab.measure.cir import cir
from lab.run.checkpoint import load_llama
from lab.run.sampling import Prefill, generate, sample
from lab.run.suffix import Tails
from tests import tiny
from tests.planted import planted_rollouts, reasoner
from tests.tiny import suffix_logits
from train import parse_args, read_reliance

MICRO = Path(__file__).parent.parent / "data" / "micro"
# Three ragged rollouts: the lengths of no two parts are in the same order.
PROMPTS, REASONINGS = tiny.ids(1, 2, 4, 3), tiny.ids(2, 5, 3, 11)
DELIMITERS, ANSWERS = tiny.ids(3, 1, 2, 1), tiny.ids(4, 1, 3, 2)
ROLLOUTS = list(zip(PROMPTS, REASONINGS, DELIMITERS, ANSWERS, strict=True))


def tails_logits(model, batch):
    return Tails(model, Prefill(model, batch.prompts), batch).logits


every_way = pytest.mark.parametrize("logits_of", [plain_logits, suffix_logits, tails_logits])


def seen_by(model, sequence, visible) -> torch.Tensor:
    """Logits (S, V) where row w attends over the columns visible(w) alone, which it gathers.

    Llama's formulas row by row: no mask, no padding, every token at its own position.
    """
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    x = model.embed_tokens(torch.tensor([sequence]))
    cos, sin = model.angles(torch.arange(len(sequence))[None])
    for layer in model.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        query = attention.queries(normed, cos, sin)[0]
        key, value = (part[0] for part in attention.keys_values(normed, cos, sin))
        out = torch.zeros_like(query)
        for head in range(heads):
            group = head * kv_heads // heads
            for w in range(len(sequence)):
                columns = visible(w)
                scores = key[group, columns] @ query[head, w] / math.sqrt(query.shape[2])
                out[head, w] = scores.softmax(0) @ value[group, columns]
        x = x + attention.output(out[None])
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.head(x)[0]


def gold_probability(model, rollout, visible) -> float:
    prompt, reasoning, delimiter, answer = rollout
    logprobs = seen_by(model, prompt + reasoning + delimiter + answer, visible).log_softmax(-1)
    first = len(prompt + reasoning + delimiter) - 1
    return math.exp(sum(logprobs[first + n, token] for n, token in enumerate(answer)))


def by_hand(model, rollout):
    """full, hidden and alone of a rollout, from models that run on what is visible."""
    P, T = len(rollout[0]), len(rollout[1])

    def without_prompt(w):
        return list(range(w + 1)) if w < P + T else [0, *range(P, w + 1)]

    def without_reasoning(w):  # a reasoning row is not read; it sees what is before it
        return [*range(min(w + 1, P)), *range(P + T, w + 1)]

    whole = gold_probability(model, rollout, lambda w: list(range(w + 1)))
    hidden = gold_probability(model, rollout, without_reasoning)
    return whole, hidden, gold_probability(model, rollout, without_prompt)


@every_way
@torch.no_grad()
def test_fixed_masks_equal_a_model_that_attends_over_what_is_left(logits_of):
    model = tiny.llama(dtype=torch.float64, gain=1.5)
    batch = lay_out(ROLLOUTS, "cpu")
    read = torch.stack(reliance(model, batch, logits_of(model, batch)), 1)  # (B, 3)
    expected = torch.tensor([by_hand(model, rollout) for rollout in ROLLOUTS], dtype=torch.float64)
    torch.testing.assert_close(read, expected, rtol=1e-9, atol=0)
    assert (expected / expected[:, :1] - 1).abs()[:, 1:].min() > 0.01  # all three differ


@torch.no_grad()
def test_hidden_reasoning_is_a_forward_pass_without_it():
    model = tiny.llama(dtype=torch.float64)
    prompt, reasoning, delimiter, _ = ROLLOUTS[1]
    P, T, D = map(len, (prompt, reasoning, delimiter))
    mask = torch.zeros(P + T + D, P + T + D, dtype=torch.float64)
    mask[P:, P : P + T] = -1e4
    hidden = model(torch.tensor([prompt + reasoning + delimiter]), mask=mask)[0, -1]
    places = torch.tensor([[*range(P), *range(P + T, P + T + D)]])
    without = model(torch.tensor([prompt + delimiter]), positions=places)[0, -1]
    torch.testing.assert_close(hidden, without, atol=1e-12, rtol=0)
    moved = model(torch.tensor([prompt + delimiter]))[0, -1]
    assert (moved - without).abs().max() > 0.01  # at other positions it is another text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_ragged_batch_equals_each_alone_and_plain_equals_suffix(dtype):
    model = tiny.llama(dtype=dtype, gain=1.5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    batch = lay_out(ROLLOUTS, "cpu")
    read = torch.stack(reliance(model, batch))  # the whole model is the default
    for logits_of in (suffix_logits, tails_logits):
        fast = torch.stack(reliance(model, batch, logits_of(model, batch)))
        torch.testing.assert_close(fast, read, rtol=tolerance, atol=0)
    for n, rollout in enumerate(ROLLOUTS):
        alone = torch.cat(reliance(model, lay_out([rollout], "cpu")))
        torch.testing.assert_close(alone, read[:, n], rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_sampling_keeps_serves_as_another_reading_does(dtype):
    """Ragged prompts, groups out of order, and completions that leave the batch at many lengths."""
    model = tiny.llama(dtype=dtype)
    prompts = [PROMPTS[n] for n in (0, 1, 0, 2, 1, 0, 2, 2, 0, 1, 1, 2)]
    prefill = Prefill(model, prompts, keep=True)
    sampled = generate(model, prompts, 120, eos_ids=[7, 9], seed=3, prefill=prefill)
    rollouts, lengths = [], {len(completion) for completion in sampled}
    assert min(lengths) < 8 and max(lengths) > 32  # the batch was halved, and more than once
    for n, (prompt, completion) in enumerate(zip(prompts, sampled, strict=True)):
        if len(completion) > 2:
            rollouts.append((prompt, completion[:-2], completion[-2:-1], ANSWERS[n % 3]))
            prefill.rows[tuple(prompt), tuple(completion[:-2])] = n
    rollouts.sort(key=lambda rollout: len(rollout[1]))
    batch = lay_out(rollouts, "cpu")
    expected = torch.stack(reliance(model, batch))
    rows = []  # that each pass through the layers has
    model.layers[0].mlp.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
    read = torch.stack(reliance(model, batch, Tails(model, prefill, batch).logits))
    assert rows == [1 + 3 - 1] * 3  # no reasoning: delimiter and answer, once a mask
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(read, expected, rtol=tolerance, atol=0)


def test_train_reads_the_same_with_and_without_what_sampling_kept():
    tokenizer, model = Tokenizer.from_directory(MICRO), load_llama(MICRO)
    problems = [problem for problem in load_problems("micro", "train", limit=2) for _ in range(3)]
    seeds, config = list(range(6)), parse_args(["--saliency", "mediation"])
    given = problems, Prompting("micro"), 120, seeds
    rollouts, prefill = sample(model, tokenizer, *given, keep=True)
    rollouts = [rollout for rollout in rollouts if rollout.trace.valid]
    parts, read = [rollout.masked_parts(tokenizer) for rollout in rollouts], []
    assert prefill.rows and len(rollouts) > 1
    for before in (prefill, None):
        read_reliance(model, rollouts, parts, before, config, lambda count: None)
        read.append([[rollout.saliency, *rollout.reliance] for rollout in rollouts])
    torch.testing.assert_close(*map(torch.tensor, read), rtol=1e-4, atol=1e-6)


@every_way
def test_nothing_is_learned(logits_of):
    model = tiny.llama()
    for name, weight in model.named_parameters():
        weight.requires_grad_("mlp" in name)
    batch = lay_out(ROLLOUTS, "cpu")
    logits = logits_of(model, batch)
    read = [*reliance(model, batch, logits), cir(batch, logits)]
    assert not any(numbers.requires_grad for numbers in read)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("mlp" in name) and weight.grad is None


def test_a_gradient_goes_through_the_blind_rows_mask():
    """The seam serves learned masks too: blind rows, and a mask that needs a gradient."""
    gradients = []
    for logits_of in (plain_logits, suffix_logits):
        model = tiny.llama(dtype=torch.float64).requires_grad_(False)
        batch = lay_out(ROLLOUTS, "cpu")
        blind = torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
        mask = (-2.0 * batch.region.double()).requires_grad_()
        loss = logits_of(model, batch)(mask, blind)[:, 0].logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, mask)[0] * batch.region)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind, expected", [("copier", 1.0), ("bypass", 0.0)])
def test_a_planted_reasoner_is_seen_through(kind, expected):
    necessity, sufficiency, mediation = planted(kind)
    for saliency in (necessity, sufficiency):  # by hand, its weights make it sure to 0.98
        assert (saliency - expected).abs().max() < 0.02
    torch.testing.assert_close(mediation, necessity * sufficiency)


def test_a_mixed_reasoner_is_in_between():
    for saliency in planted("random"):
        assert 0.05 < saliency.mean() < 0.95


def planted(kind):
    """necessity, sufficiency and mediation of the planted traces, (16,) each."""
    tokenizer = Tokenizer.from_directory(MICRO)
    model = reasoner(kind, tokenizer)
    rollouts = [rollout.masked_parts(tokenizer) for rollout in planted_rollouts(model, tokenizer)]
    read = reliance(model, lay_out(rollouts, "cpu"))
    kinds = ("necessity", "sufficiency", "mediation")
    return [reliance_saliency(*read, kind) for kind in kinds]


def test_saliencies_by_hand():
    full, hidden, alone = torch.tensor([[0.9, 0.25], [0.1, 0.75], [0.5, 1.0]], dtype=torch.float64)
    for kind, expected in {
        "necessity": [0.8, 0.0],  # less than nothing is lost: nothing
        "sufficiency": [0.5, 1.0],
        "mediation": [0.4, 0.0],
    }.items():
        read = reliance_saliency(full, hidden, alone, kind).tolist()
        assert read == pytest.approx(expected)
    with pytest.raises(ValueError, match="'even': choose necessity, sufficiency, mediation"):
        reliance_saliency(full, hidden, alone, "even")


# CIR


@every_way
@torch.no_grad()
def test_cir_by_hand(logits_of):
    model = tiny.llama(dtype=torch.float64, gain=1.5)
    texts = zip(PROMPTS, REASONINGS, DELIMITERS, strict=True)
    rollouts = [
        (*parts, [tiny.next_logits(model, sum(parts, [])).argmax().item()]) for parts in texts
    ]
    batch = lay_out(rollouts, "cpu")
    read = cir(batch, logits_of(model, batch))
    for n, rollout in enumerate(rollouts):
        P, T = len(rollout[0]), len(rollout[1])
        whole, total = gold_probability(model, rollout, lambda w: list(range(w + 1))), 0
        for tenth in range(10):
            hidden = range(P + round(T * tenth / 10), P + T)
            # The hidden tokens see what is before them, and nothing sees the hidden tokens.
            p = gold_probability(
                model, rollout, lambda w, h=hidden: [v for v in range(w + 1) if v not in h]
            )
            for a, b in ((p, whole), (1 - p, 1 - whole)):
                middle = (a + b) / 2
                total += (a * math.log2(a / middle) + b * math.log2(b / middle)) / 2
        assert read[n].item() == pytest.approx(total / 10, rel=1e-8)
    assert read.min() > 0.01


def test_cir_of_certain_answers_is_the_share_of_cuts_that_hide_what_counts():
    """P(gold) is 1 where token 7 is visible, else 0: the last of 10 tokens, then the fourth."""
    place = torch.tensor([9, 3])
    batch = lay_out([([1], [5] * 10, [2], [3])] * 2, "cpu")

    def logits(mask):
        seen = mask[torch.arange(2), -1, place] == 0  # by the answer's row
        sure = torch.full((2, 1, 64), -torch.inf)
        sure[torch.arange(2), 0, torch.where(seen, 3, 4)] = 0.0
        return sure

    assert cir(batch, logits).tolist() == pytest.approx([1.0, 0.4])
