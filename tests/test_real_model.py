"""A real instruct model, where ATMANRL_MODEL_DIR names its folder (docs/running.md has numbers).

ATMANRL_MODEL_DIR=DIR python -m pytest tests/test_real_model.py; some two minutes of one CPU core
for a model of 135M parameters. tests/transformers_parity.py --model compares it with transformers.
"""

import os

import pytest
import torch

from atman import MaskConfig, reliance
from data import load_problems
from data.prompts import Prompting
from data.tokenizer import Tokenizer
from data.traces import DELIMITER, Rollout
from lab.run.checkpoint import load_llama
from lab.run.hub import weights_directory
from lab.run.sampling import generate, sample
from lab.run.suffix import lay_out_tails, learn_masks
from lab.study.warm_start import fit, rows_of

DIRECTORY = os.environ.get("ATMANRL_MODEL_DIR")
pytestmark = pytest.mark.skipif(
    not DIRECTORY, reason="set ATMANRL_MODEL_DIR to the folder of an instruct model"
)
PROBLEMS = load_problems("micro", "train", limit=4)


@pytest.fixture(scope="module")
def real():
    directory = weights_directory(DIRECTORY)
    return load_llama(directory, torch.float32), Tokenizer.from_directory(directory)


@torch.no_grad()
def test_greedy_text_is_that_of_whole_forward_passes(real):
    model, tokenizer = real
    prompts = [Prompting.load("micro", n).prompt(tokenizer, PROBLEMS[n]) for n in (0, 2)]
    completions = generate(model, prompts, 12, 0.0, tokenizer.eos_ids)
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion


@pytest.mark.parametrize("shots", [0, 4])
def test_prompts_show_every_text_once_and_in_order(real, shots):
    _, tokenizer = real
    prompting = Prompting.load("micro", shots, "Be brief.")
    text = tokenizer.decode(prompting.prompt(tokenizer, PROBLEMS[0]))
    shown = ["Be brief.", *(p.question for p in prompting.drawn[:shots]), PROBLEMS[0].question]
    places = [text.index(part) for part in shown]
    assert places == sorted(places) and all(text.count(part) == 1 for part in shown)
    assert text.count(DELIMITER) == shots  # the micro task asks by its question alone


def test_a_written_trace_has_a_mask_and_a_reliance(real):
    model, tokenizer = real
    prompting, rollouts = Prompting("micro"), []
    for problem in PROBLEMS[:2]:
        completion = [*tokenizer.encode(prompting.completion(problem)), tokenizer.eos_ids[-1]]
        trace = prompting.trace(tokenizer, problem, completion)
        prompt = prompting.prompt(tokenizer, problem)
        rollouts.append(Rollout(problem, prompt, completion, trace))
        assert trace.correct(problem.answer)
    parts = [rollout.masked_parts(tokenizer) for rollout in rollouts]
    masks = learn_masks(model, parts, MaskConfig.in_steps(4))
    assert (masks.losses[-1] < masks.losses[0]).all()  # the gold answer became likelier
    batch, logits = lay_out_tails(model, parts)
    slow, fast = reliance(model, batch), reliance(model, batch, logits)
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        assert ((a >= 0) & (a <= 1)).all()


def test_a_warm_start_teaches_its_problems(real):
    model, tokenizer = real
    rows = rows_of(PROBLEMS, Prompting("micro"), tokenizer)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0)
    losses = [loss.item() for loss in fit(model, [adamw], enumerate([[rows]] * 6), lambda _: 1.0)]
    assert losses[-1] < losses[0] - 0.3
    rollouts, _ = sample(model, tokenizer, PROBLEMS[:1], Prompting("micro"), 80, [0], 0.0)
    assert rollouts[0].completion
