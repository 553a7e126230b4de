"""Sampling against whole forward passes: the caches give their logits, generate their samples."""

import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atman import lay_out, reliance
from data import Problem
from data.prompts import Prompting
from lab.run import sampling
from lab.run.sampling import Prefill, RolloutCache, choose, generate, sample
from lab.run.suffix import Tails
from tests import tiny
from tests.recorded import Recorded
from tests.tiny import next_logits

PROMPTS = tiny.ids(1, 3, 6, 1, 4)


def sample_slowly(model, prompt, limit, seed, temperature=1.0, eos=()):
    """One completion by the textbook: the first token whose cumulative probability exceeds u."""
    uniforms, completion = np.random.default_rng(seed).random(limit), []
    for u in uniforms:
        logits = next_logits(model, prompt + completion).numpy()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            weights = np.exp((logits - logits.max()) / temperature)
            token, below = 0, weights[0] / weights.sum()
            while u >= below:
                token += 1
                below += weights[token] / weights.sum()
        completion.append(token)
        if token in eos:
            break
    return completion


# Sampling


def test_greedy_is_the_argmax_of_full_forwards():
    model = tiny.llama()
    sampled = generate(model, PROMPTS, 12, temperature=0)
    assert sampled == [sample_slowly(model, prompt, 12, 0, temperature=0) for prompt in PROMPTS]
    assert len({tuple(row) for row in sampled}) == 4
    assert generate(model, PROMPTS, 12, temperature=0, seed=9) == sampled


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_samples_are_the_inverse_distribution_function_at_the_seeds_uniforms(temperature):
    model = tiny.llama()
    sampled = generate(model, PROMPTS, 10, temperature=temperature, seed=3)
    expected = [
        sample_slowly(model, prompt, 10, (3, row), temperature)
        for row, prompt in enumerate(PROMPTS)
    ]
    assert sampled == expected


def test_a_row_does_not_depend_on_its_batch():
    model = tiny.llama()
    seeds = [(7, 0), 11, (7, 2, 5), 13]
    together = generate(model, PROMPTS, 20, seed=seeds, eos_ids=[5, 9])
    backward = generate(model, PROMPTS[::-1], 20, seed=seeds[::-1], eos_ids=[5, 9])
    assert backward[::-1] == together
    for prompt, seed, expected in zip(PROMPTS, seeds, together, strict=True):
        assert generate(model, [prompt], 20, seed=[seed], eos_ids=[5, 9]) == [expected]
    assert generate(model, PROMPTS, 20, seed=7)[0] == generate(model, PROMPTS[:1], 20, seed=7)[0]


def test_equal_prompts_draw_different_samples():
    model = tiny.llama()
    group = generate(model, [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4, 10, seed=2)
    assert len({tuple(row) for row in group}) == 8
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    for row, (prompt, sampled) in enumerate(zip(prompts, group, strict=True)):
        assert sampled == sample_slowly(model, prompt, 10, (2, row))


@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_rows_that_end_at_very_different_times(multiple):
    # Frequent stop tokens and 16 rows: the batch shrinks more than once on the way.
    model, counts, sizes, eos = tiny.llama(), [], [], [3, 14]
    prompts = tiny.ids(20, *([2, 5, 3, 7] * 4))
    hook = model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    options = {"seed": 4, "eos_ids": eos, "progress": counts.append, "multiple": multiple}
    sampled = generate(model, prompts, 48, **options)
    hook.remove()
    expected = [sample_slowly(model, p, 48, (4, row), eos=eos) for row, p in enumerate(prompts)]
    assert sampled == expected
    assert len(counts) > 2 and sum(counts) == 16
    sizes = sizes[1:]  # the first read the prompts
    assert sizes[0] == 16 and sizes[-1] <= 4 and sizes == sorted(sizes, reverse=True)
    # Asked for at every eighth token alone: a GPU waits for each question.
    assert all(a == b for n, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)) if n % 8 != 6)


@pytest.mark.parametrize("multiple", [16, 64])
@pytest.mark.parametrize("groups", [list(range(16)), [0, 2, 3, 1] * 4, [1, 0, 0, 2, 1, 0] * 2])
def test_a_step_that_is_replayed_without_its_python_samples_the_same(monkeypatch, multiple, groups):
    """Ragged prompts, shared in several ways, whose rows end and leave the batch."""
    graphs = []

    def graph(body, device):
        graphs.append(Recorded(body))
        return graphs[-1]

    monkeypatch.setattr(sampling, "Graph", graph)
    model, counts, distinct = tiny.llama(dtype=torch.float64), [], tiny.ids(20, *([2, 5, 3, 7] * 4))
    prompts = [distinct[n] for n in groups]
    options = {"seed": 4, "eos_ids": [3, 14], "multiple": multiple, "progress": counts.append}
    prefill = Prefill(model, prompts, keep=True)
    sampled = generate(model, prompts, 40, **options, prefill=prefill)
    assert sampled == [
        sample_slowly(model, p, 40, (4, n), eos=[3, 14]) for n, p in enumerate(prompts)
    ]
    assert len(counts) > 2 and len([it for it in graphs if it.calls]) > 1  # some were dropped
    kept = Prefill(model, prompts, keep=True)
    generate(model, prompts, 40, **options | {"multiple": 1}, prefill=kept)
    for ours, theirs in zip(prefill.own_keys, kept.own_keys, strict=True):
        torch.testing.assert_close(ours[:, :, :40], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 16, 17, 30])
def test_stop_token_is_kept_and_last_and_the_limit_cuts(limit):
    size = 25  # after token i always i + 1, and 24 stops
    chain = [[50.0 if j == i + 1 else 0.0 for j in range(size)] for i in range(size)]
    starts = [23, 20, 16, 15, 14, 8, 0, 0]
    sampled = generate(tiny.bigram(chain), [[s] for s in starts], limit, eos_ids=[24, 99])
    assert sampled == [list(range(s + 1, 25))[:limit] for s in starts]
    without = generate(tiny.bigram(chain), [[20]], 4, eos_ids=[])
    assert without == [[21, 22, 23, 24]]


def test_progress_counts_every_row_once():
    counts = []
    chain = [[50.0 if j == i + 1 else 0.0 for j in range(25)] for i in range(25)]
    prompts = [[23], [20], [15], [3], [0]]
    generate(tiny.bigram(chain), prompts, 30, eos_ids=[24], progress=counts.append)
    assert sum(counts) == 5 and len(counts) > 1


def through_the_fifth_small_one(row: int, ids: list[int]) -> int | None:
    places = [n for n, token in enumerate(ids) if token < 16]
    return places[4] + 1 if len(places) > 4 else None


@pytest.mark.parametrize(("temperature", "multiple"), [(1.0, 1), (2.0, 16), (0.0, 64)])
def test_a_complete_row_stops_where_it_would_have_been_cut_afterwards(temperature, multiple):
    model, sizes, stop = tiny.llama(), [], through_the_fifth_small_one
    options = {"temperature": temperature, "eos_ids": [5], "seed": 4}
    prompts = tiny.ids(20, *([2, 5, 3, 7] * 4))
    model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    unstopped, rows = generate(model, prompts, 61, **options), sum(sizes)
    sampled, stopped_rows = (
        generate(model, prompts, 61, **options, complete=stop, multiple=multiple),
        sum(sizes) - rows,
    )
    assert sampled == [row[: stop(0, row)] for row in unstopped]
    shorter = [a for a, b in zip(sampled, unstopped, strict=True) if len(a) < len(b)]
    assert len({len(row) for row in shorter}) > 5 and stopped_rows < 0.9 * rows


def test_a_stop_is_asked_of_running_rows_alone_and_seldom():
    chain = [[50.0 if j == i + 1 else 0.0 for j in range(40)] for i in range(40)]
    asked = []

    def complete(row, ids):
        asked.append((row, len(ids)))
        return 3 if row == 1 and len(ids) >= 3 else None

    sampled = generate(tiny.bigram(chain), [[30], [0], [10]], 30, eos_ids=[39], complete=complete)
    assert sampled == [list(range(31, 40)), [1, 2, 3], list(range(11, 40))]
    # At the eighth token of all; then of those that run. In the end once of each whole row.
    assert asked == [
        (0, 8), (1, 8), (2, 8), (2, 16), (2, 24), (0, 9), (1, 30), (2, 29),
    ]  # fmt: skip


class Pieces:
    """The tiny models' 64 ids as pieces of traces, so that random samples are full of answers."""

    texts = ("It", " is", " #####", "\n", " 18", ".", "B", " ", "##", "###", " A", "x", ",") * 5
    eos_ids = (63,)

    def token_bytes(self, token: int) -> bytes:
        return b"" if token in self.eos_ids else self.texts[token].encode()

    def bytes_of(self, ids) -> bytes:
        return b"".join(map(self.token_bytes, ids))

    def encode_prompt(self, text, earlier=()) -> list[int]:
        return [len(text) % 64, 1, 2]


@pytest.mark.parametrize(("temperature", "keep"), [(1.0, False), (1.0, True), (0.0, False)])
def test_rollouts_end_with_their_first_answer(temperature, keep):
    """As the unstopped samples do when they are cut behind that line, which regexes find here."""
    model, tokenizer = tiny.llama(), Pieces()
    problems = [Problem(str(n), "?" * (n + 1), "18") for n in range(12) for _ in range(3)]
    seeds = [(5, n) for n in range(len(problems))]

    def answered(text: str) -> bool:
        if not (first := re.search(r"(?<!#)#####(?!#)", text)):
            return False
        *lines, _ = re.split(r"\n|(?<!#)#####(?=[^#])", text[first.end() :])
        return "18" in "".join(lines) or len([line for line in lines if line.strip()]) > 2

    prompting = Prompting("micro")
    rollouts, prefill = sample(
        model, tokenizer, problems, prompting, 60, seeds, temperature, keep=keep
    )
    prompts = [prompting.prompt(tokenizer, problem) for problem in problems]
    unstopped = generate(model, prompts, 60, temperature, (63,), seeds)
    ends = []
    for rollout, ids in zip(rollouts, unstopped, strict=True):
        texts = [tokenizer.bytes_of(ids[:n]).decode() for n in range(len(ids) + 1)]
        end = next((n for n, text in enumerate(texts) if answered(text)), None)
        ends.append(end)
        assert rollout.completion == ids[:end]
        assert rollout.trace.truncated == (end is None and ids[-1] != 63)
    assert len({end for end in ends if end}) > (8 if temperature else 0)
    assert None in ends or not temperature
    if keep:  # what was computed for the shorter rollouts reads as another pass does
        valid = [rollout for rollout in rollouts if rollout.trace.valid and rollout.trace.number]
        parts = [
            (it.prompt, it.trace.reasoning, it.trace.delimiter, it.trace.answer) for it in valid
        ]
        batch = lay_out(parts, "cpu")
        kept = torch.stack(reliance(model, batch, Tails(model, prefill, batch).logits))
        assert len(valid) > 2
        torch.testing.assert_close(kept, torch.stack(reliance(model, batch)), rtol=1e-4, atol=1e-7)


def test_no_prompts_no_tokens_and_wrong_seeds():
    model = tiny.llama()
    assert generate(model, [], 5) == []
    assert generate(model, PROMPTS, 0) == [[], [], [], []]
    for seeds in ([1, 2, 3], [], [1] * 5):
        with pytest.raises(ValueError, match=f"{len(seeds)} seeds for 4 prompts"):
            generate(model, PROMPTS, 5, seed=seeds)


def test_sampling_leaves_the_model_alone():
    model = tiny.llama()
    generate(model, PROMPTS, 5)
    assert tiny.same_weights(model, tiny.llama())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_a_token_of_probability_zero_is_never_chosen(uniform):
    # 1.0 is what a draw within 2**-25 of one becomes in float32.
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf, 0.2, -torch.inf]])
    assert choose(logits, torch.tensor([uniform]), 1.0).item() in (1, 2, 4)


# The caches

RAGGED = tiny.ids(1, 4, 7, 1)
GROUPS = [1, 0, 1, 2, 1, 0]  # which prompt each rollout starts from: uneven, and in no order


@torch.no_grad()
def test_each_distinct_prompt_is_read_once():
    model, read = tiny.llama(), []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape))
    prefill = Prefill(model, [RAGGED[n] for n in GROUPS])
    assert read == [(3, 7)]
    rows = prefill.index_of([RAGGED[n] for n in GROUPS])
    assert [prefill.lengths[row].item() for row in rows] == [len(RAGGED[n]) for n in GROUPS]
    for number, row in zip(GROUPS, rows, strict=True):
        expected = next_logits(model, RAGGED[number])
        torch.testing.assert_close(prefill.logits[row].double(), expected, atol=1e-5, rtol=0)


def test_what_was_not_read_or_is_empty_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        Prefill(tiny.llama(), [[1], []])
    with pytest.raises(KeyError):
        Prefill(tiny.llama(), [[1]]).index_of([[2]])


@pytest.mark.parametrize("prompts", [RAGGED, tiny.ids(2, 5, 5, 5)], ids=["ragged", "even"])
@pytest.mark.parametrize("groups", [GROUPS, [0, 0, 1, 1, 2, 2], [0, 1, 2]])
@pytest.mark.parametrize(("layers", "multiple"), [(1, 1), (3, 1), (3, 4), (1, 16)])
@torch.no_grad()
def test_decoding_equals_the_whole_sequence(prompts, groups, layers, multiple):
    model = tiny.llama(num_hidden_layers=layers)
    rows = [
        prompts[n] + own for n, own in zip(groups, tiny.ids(3, *[9] * len(groups)), strict=True)
    ]
    starts = torch.tensor([len(prompts[n]) for n in groups])
    starting = [prompts[n] for n in groups]
    cache = RolloutCache(Prefill(model, starting), starting, 9, multiple)
    left = torch.arange(len(groups))
    for step in range(9):
        if step == 3:  # some end: what is left goes on, in another order
            keep = torch.tensor([2, 0, 1][: len(groups) - 1])
            cache.select(keep)
            left = left[keep]
        token = torch.tensor([[rows[n][starts[n] + step]] for n in left])
        logits = model(token, cache=cache, positions=starts[left, None] + step)
        cache.step()
        assert logits.shape == (len(left), 1, 64)
        for n, row_logits in zip(left.tolist(), logits[:, 0], strict=True):
            expected = next_logits(model, rows[n][: starts[n] + step + 1])
            torch.testing.assert_close(row_logits.double(), expected, atol=1e-5, rtol=0)
    assert cache.length == cache.column == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_softmax_of_a_half_precision_model_is_float32(dtype):
    model, entered = tiny.llama(dtype=dtype), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._softmax.default:
                entered.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    prefill = Prefill(model, [RAGGED[1]] * 2)
    cache = RolloutCache(prefill, [RAGGED[1]] * 2, room=2)
    with Record():
        logits = model(torch.tensor([[1], [2]]), cache=cache, positions=torch.tensor([[7], [7]]))
    assert logits.dtype == dtype
    assert entered == [torch.float32] * 2  # one a layer


def test_a_group_shares_its_prompts_memory():
    model = tiny.llama()
    prompts = [RAGGED[1]] * 8
    prefill = Prefill(model, prompts)
    assert [key.shape for key in prefill.keys] == [(1, 2, 7, 8)] * 2
    cache = RolloutCache(prefill, prompts, room=3)
    assert [key.shape for key in cache.keys] == [(1, 2, 8, 3, 8)] * 2
    assert all(a is b for a, b in zip(cache.prompt_keys, prefill.keys, strict=True))


def test_prompts_without_rollouts_left_are_let_go():
    starting = [RAGGED[n] for n in GROUPS]  # of 7, 4, 7, 1, 7 and 4 tokens
    cache = RolloutCache(Prefill(tiny.llama(), starting), starting, room=3)
    assert cache.keys[0].shape[:3] == (3, 2, 3) and cache.padding_bias.shape == (3, 7)
    cache.select(torch.tensor([0, 4, 3]))  # two of 7 tokens, one of 1
    assert cache.keys[0].shape[:3] == cache.values[1].shape[:3] == (2, 2, 2)
    assert cache.prompt_keys[1].shape[0] == cache.prompt_values[0].shape[0] == 2
    assert cache.padding_bias.isinf().sum(1).tolist() == [0, 6]


def test_prompts_rounded_up_to_even_shapes_change_no_sample(monkeypatch):
    """As on a GPU: the columns beyond the longest prompt are hidden."""
    model, prompts = tiny.llama(dtype=torch.float64), tiny.ids(20, *([2, 5, 3, 7] * 2))
    expected = generate(model, prompts, 30, seed=4)
    monkeypatch.setattr(sampling, "even_shapes", lambda device: 16)
    prefill = Prefill(model, prompts)
    assert prefill.keys[0].shape[2] == 16 and prefill.padding_bias[:, 7:].isinf().all()
    for multiple in (1, 16):
        assert generate(model, prompts, 30, seed=4, prefill=prefill, multiple=multiple) == expected
