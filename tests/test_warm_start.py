"""The supervised warm start through its command, and what make_micro.py shares with it."""

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from data import load_problems
from data.prompts import Prompting
from data.tokenizer import BASE_PROMPT, Tokenizer
from data.traces import split_trace
from lab.run.checkpoint import load_llama
from lab.study import make_micro, warm_start
from tests import tiny
from tests.commands import ROOT, done, go, refused

# data/micro writes five hashes and is to learn four.
FOUR_HASHES = (
    "--model data/micro --dataset micro --delimiter #### --limit 200 --steps 30 --batch-size 6 "
    "--lr 3e-3 --heldout 8 --max-new-tokens 100 --save-every 10 --device cpu"
).split()
GSM8K = {
    "A dog eats 3 bones. How many in 16 days?": "3*16=<<3*16=48>>48\n#### 48",
    "He owes $5 and spends $1,195.": "-5 - 1,195 = <<-5-1195=-1200>>-1,200.\n#### -1,200",
    "What is half of 7?": "Half of 7 is 7/2 = <<7/2=3.5>>3.5.\nHe rounds up.\n#### 4",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A warm start that nothing happened to, and what it said. Not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "warm"
    return out, done(warm_start.main, *FOUR_HASHES, "--out", out)


@pytest.fixture
def gsm8k(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in GSM8K.items()]
        (folder / name).write_text("".join(lines))
    return folder


def test_a_model_learns_another_delimiter(whole):
    out, said = whole
    result = json.loads((out / "warm_start.json").read_text())
    before, after = result["before"], result["after"]
    assert before["valid greedy"] == before["valid at temperature 1"] == 0
    assert after["valid greedy"] > 0.5 and after["valid at temperature 1"] > 0.3
    assert after["loss"] < before["loss"] / 2
    losses = result["losses"]
    assert len(losses) == result["steps"] == 30 and sum(losses[-5:]) < sum(losses[:5]) / 2
    assert result["settings"]["delimiter"] == "####" and result["problems"] == 200
    assert re.search(rf"valid greedy +0.0% +{after['valid greedy']:.1%}\n", said)


def test_it_leaves_an_ordinary_checkpoint_alone(whole):
    out, _ = whole
    files = {path.name for path in (ROOT / "data/micro").iterdir()} | {"warm_start.json"}
    assert {path.name for path in out.iterdir()} == files
    assert [path.name for path in out.parent.iterdir()] == ["warm"]
    assert Tokenizer.from_directory(out).vocab_size == load_llama(out).config.vocab_size
    assert next(load_llama(out).parameters()).dtype == torch.float32


def stop_at(monkeypatch, step: int, action) -> None:
    """Have action() called when fit has taken so many steps of this start."""
    fit = warm_start.fit

    def fit_and_act(*arguments):
        for number, loss in enumerate(fit(*arguments), 1):
            if number == step:
                action()
            yield loss

    monkeypatch.setattr(warm_start, "fit", fit_and_act)


def test_what_was_interrupted_ends_as_if_nothing_had_happened(whole, tmp_path, monkeypatch):
    command = [*FOUR_HASHES, "--out", tmp_path / "warm"]
    with monkeypatch.context() as patch:
        stop_at(patch, 13, lambda: signal.raise_signal(signal.SIGTERM))
        code, said = go(warm_start.main, *command)
    assert code == 143 and "stopped after step 13 of 30" in said, said
    assert not (tmp_path / "warm").exists()  # half a checkpoint would be taken for one
    said = refused(warm_start.main, *command, "--lr", "1e-3")
    assert "settings: lr (saved 0.003, now 0.001); give" in said
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        stop_at(patch, 10, lambda: 1 / 0)  # a kill in step 23, after the checkpoint of step 20
        go(warm_start.main, *command)
    said = done(warm_start.main, *command)
    assert "going on after step 20" in said
    outs = whole[0], tmp_path / "warm"
    expected, result = (json.loads((out / "warm_start.json").read_text()) for out in outs)
    for key in ("losses", "before", "after"):
        assert result[key] == expected[key]
    expected, weights = (load_file(out / "model.safetensors") for out in outs)
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_what_is_there_is_not_overwritten(whole):
    out, _ = whole
    weights = (out / "model.safetensors").read_bytes()
    said = refused(warm_start.main, *FOUR_HASHES, "--out", out)
    assert f"--out {out}: is there already" in said
    assert (out / "model.safetensors").read_bytes() == weights


def test_mmlu_is_refused(tmp_path):
    said = refused(warm_start.main, "--model", "data/micro", "--dataset", "mmlu", "--out", tmp_path)
    assert "--dataset mmlu: has no solutions" in said


# ------------------------------------------------------------------------------------ the problems


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("delimiter", ["#####", "####", "<answer>"])
def test_a_completion_is_a_trace_that_training_takes_for_right(gsm8k, delimiter, chat):
    tokenizer = Tokenizer.from_directory(ROOT / "data/micro")
    if not chat:
        tokenizer.chat_template = None
    prompting = Prompting.load("gsm8k", 1, None, delimiter, gsm8k)
    problems = load_problems("gsm8k", "train", gsm8k)
    rows = warm_start.rows_of(problems, prompting, tokenizer)
    for problem, (prompt, completion, weights) in zip(problems, rows, strict=True):
        trace = split_trace(completion, tokenizer, delimiter)
        assert trace.valid and trace.correct(problem.answer) and trace.delimiter_count == 1
        assert trace.reasoning_text.strip() == problem.solution and "<<" not in trace.text
        assert completion[-1] in tokenizer.eos_ids and weights == [1.0] * len(completion)
        assert prompt == prompting.prompt(tokenizer, problem)
    assert [problem.answer for problem in problems] == ["48", "-1200", "4"]
    assert trace.text.strip() == f"Half of 7 is 7/2 = 3.5.\nHe rounds up.\n{delimiter} 4"
    # What stands after a question is what a worked example has there.
    if not chat:
        example = BASE_PROMPT["assistant"].format(trace.text.strip())
        assert trace.text == example.rstrip()
        assert any(example in tokenizer.decode(prompt) for prompt, *_ in rows)


def test_each_epoch_has_every_problem_once_in_an_order_of_its_own():
    rows = [([0] * n, [1], [1.0]) for n in range(2, 39)]
    settings = warm_start.Settings(model="", out="", batch_size=8, micro_tokens=64)
    batches = warm_start.batches_of(rows, settings)
    epochs = [[next(batches) for _ in range(5)] for _ in range(2)]
    orders = [[row for batch in epoch for part in batch for row in part] for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == rows and orders[0] != orders[1]
    for batch in [*epochs[0], *epochs[1]]:
        assert sum(map(len, batch)) in (8, 5)
        for part in batch:
            assert max(map(warm_start.length, part)) * len(part) <= 64
        assert len(batch) <= 1 + 8 * 39 // 32


# ------------------------------------------------------------------- training, make_micro.py's too


def weighted_rows() -> list[warm_start.Row]:
    parts = zip(tiny.ids(1, 5, 3, 7), tiny.ids(2, 4, 6, 2), strict=True)
    return [(p, c, [1.0 + n % 3 for n in range(len(c))]) for p, c in parts]


def test_the_loss_is_of_the_completions_tokens_alone():
    model, by_hand = tiny.llama(gain=2.0), 0.0
    for prompt, completion, weights in weighted_rows():
        for n, (token, weight) in enumerate(zip(completion, weights, strict=True)):
            logits = tiny.next_logits(model, prompt + completion[:n])
            by_hand -= weight * logits.log_softmax(-1)[token].item()
    loss = warm_start.summed_loss(model, weighted_rows())
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_micro_batches_change_nothing_and_the_rate_is_that_of_the_step():
    rows, ends, losses = weighted_rows(), [], []
    for parts in ([rows], [rows[:1], rows[1:]]):
        model = tiny.llama(dtype=torch.float64)
        start = [weight.detach().clone() for weight in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        batches = enumerate([parts, parts], 6)
        fitted = warm_start.fit(model, [optimizer], batches, {6: 0.25, 7: 0.0}.get)
        losses.append([loss.item() for loss in fitted])
        moved = [w.detach() - s for w, s in zip(model.parameters(), start, strict=True)]
        ends.append(torch.cat([move.flatten() for move in moved]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.allclose(ends[0], ends[1], atol=1e-7)
    assert ends[0].norm().item() == pytest.approx(0.5 * 0.25, rel=1e-5)  # gradients clipped to 1
    assert losses[0][1] < losses[0][0]


def test_the_rate_rises_stays_and_falls():
    rates = [warm_start.warm_up_and_decay(step, 20, 4, 0.5) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[10:12] == [1.0, 0.9]
    assert rates[-1] == pytest.approx(0.1)


def test_make_micro_weighs_answers():
    tokenizer = Tokenizer.from_directory(ROOT / "data/micro")
    settings = make_micro.Settings(batch_size=2, steps=20, answer_weight=3.0, decoys=0.0, long=0.0)
    batches = make_micro.Batches(settings, tokenizer)[0]
    assert [len(batch) for batch in batches] == [2] * 16
    for prompt, completion, weights in (row for batch in batches for row in batch):
        trace = split_trace(completion, tokenizer)
        assert trace.valid and trace.delimiter_count == 1
        answer = len(trace.answer)  # the EOS included
        assert weights == [1.0] * (len(completion) - answer) + [3.0] * answer
        assert trace.text.endswith(f"\n#####\n{trace.number}")
        assert len(prompt) < 120 and completion[-1] == tokenizer.eos_ids[-1]
