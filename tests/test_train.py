"""End to end on the shipped checkpoint: train.py and eval.py as a user types them.

That the same seed, and several processes, give the same run is in test_resume.py.
"""

import dataclasses
import json
import math
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from typing import get_args

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

import eval as evaluation
import grpo
import train
from atman import MaskConfig
from data import load_problems
from data.tokenizer import Tokenizer
from data.traces import split_trace
from lab.run import flags, sampling, session, suffix
from lab.run.checkpoint import load_llama
from lab.run.ranks import Ranks, pick_device
from lab.show import explain
from lab.study import make_micro, selection, warm_start
from tests.commands import ROOT, TORCHRUN, done, read_lines, refused, run
from train import Config, draw_questions, paid_saliency, parse_args

SMALL = (
    "--steps 2 --questions 2 --rollouts 4 --micro-batch 2 --mask-steps 2 --eval-problems 4 "
    "--eval-samples 2 --eval-every 1 --eval-every-problems 2 --max-new-tokens 96 --device cpu"
).split()


def part_of_a_run(config):
    """As much of a Run as sampling and masks need of one."""
    ranks, phase = Ranks(0, 1, torch.device("cpu")), nullcontext(lambda done: None)
    return SimpleNamespace(config=config, ranks=ranks, phase=lambda *_, **__: phase)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    return out, done(train.main, *SMALL, "--out", out)


def test_a_run_leaves_metrics_samples_a_checkpoint_and_the_table(one_process):
    out, printed = one_process
    assert "before" in printed and "after" in printed and "tokens per trace" in printed
    lines = read_lines(out / "metrics.jsonl")
    updates = [line for line in lines if "outcome" in line]
    assert [line["step"] for line in updates] == [1, 2]
    assert [line["step"] for line in lines if "eval" in line] == [0, 1, 2]
    for line in updates:
        assert line["reward"] == pytest.approx(line["outcome"] + line["saliency"], abs=1e-6)
        assert line["loss"] == pytest.approx(0, abs=1e-5)  # on-policy: advantages sum to 0
    samples = read_lines(out / "samples.jsonl")
    assert len(samples) == 2 * 2 * 4
    assert {sample["outcome"] for sample in samples} <= {0.0, -1.0}
    for group in (samples[n : n + 4] for n in range(0, len(samples), 4)):
        assert len({sample["id"] for sample in group}) == 1
        assert sum(sample["advantage"] for sample in group) == pytest.approx(0, abs=1e-5)
    assert json.loads((out / "config.json").read_text())["mask_steps"] == 2
    assert (out / "curves.png").stat().st_size > 1000
    after, start = (
        load_file(d / "model.safetensors") for d in (out / "checkpoint", ROOT / "data/micro")
    )
    assert any(not torch.equal(after[key], start[key]) for key in start)


def test_the_checkpoint_of_a_run_is_evaluated_like_any_other(one_process):
    out, _ = one_process
    flags = ["--limit", "3", "--samples", "2", "--faithfulness", "off", "--out", out / "eval"]
    arms = ["--model", out / "checkpoint", "--compare", "data/micro", "--device", "cpu"]
    printed = done(evaluation.main, *arms, *flags)
    assert "accuracy (pass@1)" in printed and "blank English" in printed
    results = json.loads((out / "eval/results.json").read_text())["models"]
    assert all(len(entry["records"]) == 6 for entry in results.values()) and len(results) == 2


def test_sampling_and_masks_start_from_one_reading_of_the_prompts():
    config = parse_args(["--questions", "2", "--mask-steps", "1", "--max-new-tokens", "80"])
    tokenizer, model = Tokenizer.from_directory(config.model), load_llama(config.model)
    questions, part = load_problems("micro", "train", limit=2), part_of_a_run(config)
    read = []  # a forward pass of more than one column reads prompts
    model.register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape)))
    rollouts, prefill = train.sample_groups(model, tokenizer, questions, 0, part)
    train.learn_saliency(model, tokenizer, rollouts, prefill, part)
    assert len(rollouts) == 16 and any(math.isfinite(rollout.saliency) for rollout in rollouts)
    longest = max(len(rollout.prompt) for rollout in rollouts)
    assert [shape for shape in read if shape[1] > 1] == [(2, longest)]


def test_the_plain_loop_trains_to_the_same_saliencies(monkeypatch):
    """atman.py alone, without lab/run/suffix.py, through train.py's own code."""
    flags = "--saliency attribution --questions 2 --mask-steps 2 --max-new-tokens 80"
    config = parse_args(flags.split())
    tokenizer, model = Tokenizer.from_directory(config.model), load_llama(config.model)
    questions, part = load_problems("micro", "train", limit=2), part_of_a_run(config)
    rollouts, prefill = train.sample_groups(model, tokenizer, questions, 0, part)
    train.learn_saliency(model, tokenizer, rollouts, prefill, part)
    fast = [rollout.saliency for rollout in rollouts]
    monkeypatch.setattr(suffix, "Suffix", lambda *_: SimpleNamespace(logits=None))
    train.learn_saliency(model, tokenizer, rollouts, None, part)
    plain = [rollout.saliency for rollout in rollouts]
    assert plain != fast and plain == pytest.approx(fast, abs=1e-4, nan_ok=True)


def test_missing_saliency_is_never_a_prize():
    config = parse_args(["--rollouts", "4", "--questions", "4", "--no-gate-saliency"])
    nan = float("nan")
    saliency = torch.tensor([[0.5, nan, 0.2, 0.9], [nan] * 4, [1, 2, 3, 4], [-1, nan, 0.5, 2]])
    outcome = torch.tensor([[0, -1, -1, 0], [-1] * 4, [0] * 4, [0, -1, 0, -1]]).float()
    filled = paid_saliency(saliency.flatten(), outcome.flatten(), config, 0).view(4, 4)
    by_hand = [[0.5, 0.2, 0.2, 0.9], [0] * 4, [1, 2, 3, 4], [-1, -1, 0.5, 2]]
    assert torch.equal(filled, torch.tensor(by_hand))
    gated = dataclasses.replace(config, gate_saliency=True)
    filled = paid_saliency(saliency.flatten(), outcome.flatten(), gated, 0).view(4, 4)
    by_hand = [[0.5, 0, 0, 0.9], [0] * 4, [1, 2, 3, 4], [-1, -1, 0.5, -1]]
    assert torch.equal(filled, torch.tensor(by_hand))


def test_shuffling_keeps_each_groups_rewards_and_who_earned_them_not():
    config = parse_args(["--rollouts", "4", "--micro-batch", "2", "--shuffle-saliency"])
    saliency, right = torch.arange(40.0), torch.zeros(40)
    shuffled = paid_saliency(saliency, right, config, step=3)
    assert torch.equal(shuffled.view(10, 4).sort(1).values, saliency.view(10, 4))
    assert (shuffled == saliency).sum() < 25  # a quarter stays, by chance
    assert torch.equal(shuffled, paid_saliency(saliency, right, config, step=3))
    assert not torch.equal(shuffled, paid_saliency(saliency, right, config, step=4))


def test_a_length_penalty_is_paid_by_every_rollout_beside_any_saliency(tmp_path):
    for saliency in ("none", "mediation"):
        flags = ["--steps", "1", "--eval-problems", "1", "--saliency", saliency]
        flags += ["--length-penalty", "0.5", "--saliency-weight", "3", "--out", tmp_path / saliency]
        done(train.main, *SMALL, *flags)
        rows = read_lines(tmp_path / saliency / "samples.jsonl")
        for group in (rows[:4], rows[4:]):
            paid = [r["outcome"] + 3 * r["saliency"] - 0.5 * r["length"] / 100 for r in group]
            advantages = [reward - sum(paid) / 4 for reward in paid]
            assert [row["advantage"] for row in group] == pytest.approx(advantages, abs=1e-5)
            assert len({row["length"] for row in group}) > 1


@pytest.mark.parametrize("kind", ["necessity", "sufficiency", "mediation", "cir"])
def test_the_fixed_masks_train_from_end_to_end(kind, tmp_path):
    flags = ["--steps", "1", "--eval-problems", "1", "--saliency", kind, "--no-gate-saliency"]
    done(train.main, *SMALL, *flags, "--out", tmp_path)
    rows = read_lines(tmp_path / "samples.jsonl")
    paid = [row["saliency"] for row in rows]
    assert len(set(paid)) > 4 and all(-1e-6 < saliency <= 1 for saliency in paid)
    for row in rows:
        assert row["mask_losses"] is None and (row["reliance"] is None or kind != "cir")
        if row["reliance"]:
            full, hidden, alone = row["reliance"]
            necessity = max(0, full - hidden)
            by_hand = {"necessity": necessity, "sufficiency": alone, "mediation": necessity * alone}
            assert row["saliency"] == pytest.approx(by_hand[kind], abs=1e-6)
    assert kind == "cir" or any(row["reliance"] for row in rows)
    (update,) = (line for line in read_lines(tmp_path / "metrics.jsonl") if "outcome" in line)
    assert 0 < update["seconds_masks"]


def test_the_fixed_masks_batches_change_no_saliency():
    config = parse_args(["--questions", "2", "--saliency", "mediation", "--max-new-tokens", "80"])
    tokenizer, model = Tokenizer.from_directory(config.model), load_llama(config.model)
    questions, part = load_problems("micro", "train", limit=2), part_of_a_run(config)
    rollouts, prefill = train.sample_groups(model, tokenizer, questions, 0, part)
    train.learn_saliency(model, tokenizer, rollouts, prefill, part)
    together = [rollout.saliency for rollout in rollouts]
    small = part_of_a_run(dataclasses.replace(config, mask_batch=1))  # four at a time
    train.learn_saliency(model, tokenizer, rollouts, prefill, small)
    assert [rollout.saliency for rollout in rollouts] == pytest.approx(
        together, abs=1e-5, nan_ok=True
    )
    assert any(saliency > 1e-3 for saliency in together)


def test_a_blind_update_hides_the_prompt_from_answers(tmp_path, monkeypatch):
    """Old and new log-probabilities alike; without the flag every row sees the prompt."""
    seen, score = [], grpo.score_tokens

    def recording(model, prompts, completions, temperature, chunk, recompute, blind):
        seen.append((completions, blind))
        return score(model, prompts, completions, temperature, chunk, recompute, blind)

    monkeypatch.setattr(grpo, "score_tokens", recording)
    tokenizer = Tokenizer.from_directory("data/micro")
    for flag in ("--blind-answers", "--no-blind-answers"):
        seen.clear()
        # With a saliency reward, because rollouts with the mean reward of their group are not read.
        flags = ["--steps", "1", "--eval-problems", "1", "--saliency", "mediation", flag]
        done(train.main, *SMALL, *flags, "--out", tmp_path / flag)
        assert len(seen) == 2 * 4  # two passes over 8 rollouts, two at a time
        for completions, blind in seen:
            traces = [split_trace(completion, tokenizer) for completion in completions]
            begins = [len(trace.reasoning) for trace in traces]
            assert blind == (begins if flag == "--blind-answers" else None)


def test_an_epoch_asks_each_question_once_and_the_next_in_another_order():
    config = parse_args(["--questions", "3", "--micro-batch", "8"])
    problems = list(range(10))  # one of ten is left over in each epoch
    first, second = (
        [draw_questions(problems, config, step) for step in steps]
        for steps in ((0, 1, 2), (3, 4, 5))
    )
    for epoch in (first, second):
        asked = [question for update in epoch for question in update]
        assert len(set(asked)) == 9
    assert first != second
    assert first == [draw_questions(problems, config, step) for step in (0, 1, 2)]
    assert first != [
        draw_questions(problems, dataclasses.replace(config, seed=1), step) for step in (0, 1, 2)
    ]


def test_the_paper_preset_is_section_3_4():
    config = parse_args(["--preset", "paper"])
    assert config.mask() == MaskConfig(
        init=-0.4,
        scale=10.0,
        steps=200,
        lr=1e-3,
        betas=(0.6, 0.9999),
        weight_decay=0.05,
        sparsity=0,
    )
    assert (config.saliency, config.saliency_weight) == ("mask", 1.0)
    assert not (config.length_penalty or config.blind_answers or config.shuffle_saliency)
    assert (config.questions, config.rollouts, config.passes, config.micro_batch) == (8, 8, 2, 2)
    assert (config.lr, config.clip_eps, config.ratio) == (8e-7, 0.2, "sequence")
    assert (config.epochs, config.steps, config.max_new_tokens) == (5, None, 1024)
    assert parse_args(["--epochs", "2"]).steps is None
    assert (config.temperature, config.eval_problems, config.eval_samples) == (1.0, 500, 4)
    assert parse_args(["--preset", "paper", "--steps", "3"]).epochs is None


def test_fewer_mask_steps_go_as_far_as_the_papers():
    assert parse_args(["--mask-steps", "200"]).mask().lr == pytest.approx(1e-3)
    assert parse_args(["--mask-steps", "10"]).mask().lr == pytest.approx(0.02)


def test_memory_of_the_path_is_the_papers_whatever_the_steps():
    plain = ["--mask-memory", "steps", "--mask-steps", "10"]
    assert parse_args(plain).mask().betas == MaskConfig().betas
    path = ["--mask-memory", "path", "--mask-steps"]
    assert parse_args([*path, "200"]).mask() == MaskConfig()
    # What 20 of the paper's steps leave of a gradient, one of 10 steps leaves.
    assert parse_args([*path, "10"]).mask().betas == pytest.approx((0.6**20, 0.9999**20))


def test_the_docs_explain_every_metric(one_process):
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([^`]+)`", page))
    lines = read_lines(one_process[0] / "metrics.jsonl")
    keys = {key for line in lines for key in line} | {
        k for line in lines for k in line.get("eval", ())
    }
    assert len(keys) > 30 and keys <= explained


def test_the_gate_pays_right_rollouts_alone(tmp_path):
    # Longer problems, of which some shall be wrong.
    flags = [
        "--gate-saliency",
        "--steps",
        "1",
        "--eval-problems",
        "1",
        "--train-split",
        "long",
        "--questions",
        "4",
    ]
    done(train.main, *SMALL, *flags, "--out", tmp_path / "run")
    rows = read_lines(tmp_path / "run/samples.jsonl")
    wrong = [row["saliency"] for row in rows if row["outcome"] < 0]
    right = [row["saliency"] for row in rows if row["outcome"] == 0]
    assert set(wrong) == {0} and max(right) > 0 and all(0 <= saliency <= 1 for saliency in right)


def test_outcome_only_learns_no_mask(tmp_path):
    flags = ["--saliency", "none", "--ratio", "sequence", "--steps", "1", "--eval-problems", "1"]
    done(train.main, *SMALL, *flags, "--out", tmp_path / "run")
    (update,) = (line for line in read_lines(tmp_path / "run/metrics.jsonl") if "outcome" in line)
    assert update["saliency"] == 0 and update["reward"] == update["outcome"]


def test_an_update_without_an_advantage_takes_no_step(tmp_path, monkeypatch):
    """Not even momentum's; and it is no update that met a number which is not finite."""
    advantages = train.group_advantages
    calls = []

    def zero_in_the_second(reward, size):
        calls.append(1)
        return advantages(reward, size) * (len(calls) != 2)

    monkeypatch.setattr(train, "group_advantages", zero_in_the_second)
    monkeypatch.setattr(session, "MOST_SKIPPED", 1)
    flags = ["--steps", "3", "--save-every", "1", "--keep", "3", "--eval-problems", "1"]
    said = done(train.main, *SMALL, *flags, "--eval-every", "0", "--out", tmp_path)
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "outcome" in line]
    assert [line["passes"] for line in lines] == [2, 0, 2]
    assert [line["skipped"] for line in lines] == [0, 0, 0]
    assert lines[1]["no_signal"] == 1 and lines[1]["seconds_policy"] == 0
    assert {lines[1][key] for key in ("loss", "entropy", "gradient_norm", "ratio_max")} == {None}
    updates = [
        line for line in said.splitlines() if line.startswith("update") and "outcome" in line
    ]
    assert ["no step: in every group all rewards are equal" in u for u in updates] == [0, 1, 0]
    kept = [tmp_path / "checkpoints" / f"step-0000000{n}" for n in (1, 2, 3)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second, third = (load_file(folder / name) for folder in kept)
        assert all(torch.equal(first[key], second[key]) for key in first) and len(first) > 10
        assert not any(torch.equal(third[key], second[key]) for key in first if "norm" in key)


def test_who_writes_another_delimiter_is_told_so_and_costs_no_pass(tmp_path):
    flags = ["--delimiter", "<answer>", "--eval-every", "0", "--eval-problems", "2"]
    said = done(train.main, *SMALL, *flags, "--out", tmp_path / "run")
    reason = "have no delimiter <answer> and count as wrong: 100% wrote ##### before the answer"
    assert said.count(reason) == 1 and 'what helps: --delimiter "#####", which' in said
    assert said.count("all rewards are equal  no delimiter 100%") == 2
    assert "--max-new-tokens" not in said and "nearly all of" not in said
    paths = ROOT / "data/micro", tmp_path / "run/checkpoint"
    start, end = (load_file(path / "model.safetensors") for path in paths)
    assert all(torch.equal(start[key], end[key]) for key in start)
    flags = ["--limit", "3", "--samples", "2", "--faithfulness", "off", "--delimiter", "<answer>"]
    said = done(evaluation.main, "--model", "data/micro", *flags, "--out", tmp_path / "eval")
    assert f"note: data/micro: 100% of 6 samples {reason}" in said


def test_held_out_samples_have_a_temperature_of_their_own(tmp_path, one_process):
    """Greedy samples of a problem are all the same."""
    done(train.main, *SMALL, "--steps", "0", "--eval-temperature", "0", "--out", tmp_path / "run")
    greedy, drawn = (
        next(line["eval"] for line in read_lines(out / "metrics.jsonl") if "eval" in line)
        for out in (tmp_path / "run", one_process[0])
    )
    assert greedy["tokens_spread"] == 0 < drawn["tokens_spread"]


def test_gsm8k_files_train_too(tmp_path):
    lines = [
        {"question": f"Ann has {n} pens and buys {n}. How many?", "answer": f"Sum.\n#### {2 * n:,}"}
        for n in range(3, 903, 100)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = done(train.main, *SMALL, "--dataset", "gsm8k", "--data-dir", tmp_path, "--steps", "1",
        "--saliency", "mask", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "tokens per trace" in printed
    samples = read_lines(tmp_path / "run/samples.jsonl")
    assert {sample["id"].split("/")[0] for sample in samples} == {"gsm8k"}


def write_mmlu(folder, splits=("auxiliary_train", "dev", "test")):
    for split in splits:
        (folder / split).mkdir(parents=True, exist_ok=True)
        name = "race" if split == "auxiliary_train" else f"anatomy_{split}"
        lines = [f'"How many, {n}?",{n},{n + 1},"1,000",None,A\n' for n in range(6)]
        (folder / split / f"{name}.csv").write_text("".join(lines))
    return folder


def test_mmlu_files_train_too(tmp_path):
    printed = done(train.main, *SMALL, "--dataset", "mmlu", "--data-dir", write_mmlu(tmp_path),
        "--steps", "1", "--max-new-tokens", "16", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "mean of subjects" in printed and "1 of MMLU's 57 subjects" in printed
    ids = [line["id"] for line in read_lines(tmp_path / "run/samples.jsonl")]
    assert len(ids) == 8 and all(name.startswith("mmlu/auxiliary/race/") for name in ids)
    before = read_lines(tmp_path / "run/metrics.jsonl")[0]["eval"]
    assert before["macro pass@1"] == before["pass@1"]  # of a single subject


def test_mmlu_pays_for_the_letter_and_learns_masks(tmp_path, monkeypatch):
    """Rollouts, outcome and saliency of completions that answer as they are told to."""
    config = parse_args(
        [*SMALL, "--dataset", "mmlu", "--train-split", "dev", "--saliency", "attribution"]
    )
    problems = load_problems("mmlu", config.train_split, write_mmlu(tmp_path))
    model, tokenizer = load_llama(config.model), Tokenizer.from_directory(config.model)
    said = [
        [*tokenizer.encode(f"Count: 1 + {n}.\n##### {'AB'[n % 2]}"), tokenizer.eos_ids[0]]
        for n in range(4)
    ]
    monkeypatch.setattr(sampling, "generate", lambda m, prompts, *_: said * (len(prompts) // 4))
    part = part_of_a_run(config)
    rollouts, prefill = train.sample_groups(model, tokenizer, problems[:2], 0, part)
    train.learn_saliency(model, tokenizer, rollouts, prefill, part)
    facts = [rollout.facts() for rollout in rollouts]
    assert [fact["id"] for fact in facts] == [f"mmlu/dev/anatomy/{n}" for n in (0, 1) for _ in said]
    assert [fact["number"] for fact in facts] == ["A", "B"] * 4
    assert [fact["outcome"] for fact in facts] == [0, -1] * 4
    assert all(fact["measured"] and fact["saliency"] != 0 for fact in facts)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--no-such-flag 1", "--no-such-flag"),
        ("--model nowhere", "--model nowhere"),
        ("--dataset gsm8k --data-dir nowhere", "nowhere"),
        ("--rollouts 1", "--rollouts"),
        ("--micro-batch 3", "--micro-batch 3"),
        ("--temperature 0", "--temperature"),
        ("--questions 20000 --micro-batch 1", "--questions 20000"),
        ("--spacy-model no_such_pipeline", "--spacy-model no_such_pipeline"),
        ("--saliency loud", "--saliency"),
        ("--saliency length", "invalid choice: 'length'"),
        ("--length-penalty -1", "--length-penalty -1.0: must be at least 0"),
        ("--seed -1", "--seed -1"),
        ("--lr 0", "--lr 0"),
        ("--saliency-weight nan", "--saliency-weight nan"),
        ("--lr 3e38", "--lr 3e+38: must be a number below"),
        ("--mask-init 0", "--mask-init"),
        ("--mask-steps 0", "--mask-steps 0"),
        ("--epochs 1", "--epochs"),  # beside --steps
        ("--device cuda:99", "--device cuda:99"),
        ("--device tpu", "--device tpu"),
        ("--data-dir nowhere", "--data-dir"),
        ("--dataset mmlu --data-dir nowhere", "--data-dir nowhere"),
        ("--dataset mmlu --train-split test", "--train-split test: these are the problems held"),
        ("--dataset mmlu --train-split heldout", "--train-split heldout: these"),
        ("--dataset gsm8k --train-split test", "--train-split test: these"),
        ("--train-split heldout", "--train-split heldout: these"),
        ("--train-split val", "--train-split val: micro has train, long, heldout, hard"),
        ("--dataset mmlu --train-split hard", "--train-split hard: mmlu has train, heldout, dev"),
    ],
)
def test_bad_input_gets_a_sentence_and_leaves_nothing(
    arguments,
    named,
    tmp_path,
):
    arguments = [*SMALL, *arguments.split(), "--out", tmp_path / "run"]
    assert named in refused(train.main, *arguments)
    assert not (tmp_path / "run").exists()


COMMANDS = {
    "train": Config, "eval": evaluation.Settings, "explain": explain.Settings,
    "warm start": warm_start.Settings, "make_micro": make_micro.Settings,
    "selection": selection.Settings,
}  # fmt: skip


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "1e40", "1e-40", f"{10**12}", f"{-(10**40)}"]
)
@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS)
def test_every_number_is_bounded_by_name(kind, value, capsys):
    """10**12 is a number, if a large one, for a float."""
    required = {name: "x" for name in ("model", "out", "question") if hasattr(kind, name)}
    for entry in dataclasses.fields(kind):
        types = {*(get_args(entry.type) or [entry.type])} & {int, float}
        if not types or (types == {float} and value == f"{10**12}"):
            continue
        name = "--" + entry.name.replace("_", "-")
        given = [f"--{flag}={text}" for flag, text in required.items()]
        parser = flags.parser_of(kind, "")
        with pytest.raises(SystemExit):
            values = vars(parser.parse_args([*given, f"{name}={value}"]))
            flags.settings(parser, kind, {k: v for k, v in values.items() if v is not None})
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{name} " in said or f"argument {name}: invalid int value" in said, said


@pytest.mark.parametrize(
    ("flag", "bound"),
    [
        ("--rollouts 100000", "at most 10000"),
        ("--eval-samples 2000000", "at most 10000"),
        ("--mask-steps 1000000", "at most 100000"),
        ("--seed 2147483648", "at most 2147483647"),
        ("--steps -1", "at least 0"),
        ("--mask-lr 0.0", "above 0"),
        ("--temperature 1e-31", "0 or a number of at least 1e-30"),
        ("--dry-run --world-size 0", "at least 1"),
        ("--dry-run --world-size 3000000000", "at most 2147483647"),
    ],
)
def test_a_bound_is_said(flag, bound):
    assert f"{flag.split()[-2]} {flag.split()[-1]}: must be {bound}" in refused(
        train.main, *flag.split()
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),  # cut short
        ("config.json", "{"),
        ("config.json", '{"model_type": "llama", "vocab_size": "800"}'),
        ("tokenizer.json", "{}"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
    ],
)
def test_a_damaged_checkpoint_is_named(name, content, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(ROOT / "data/micro", checkpoint)
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[:-1000] if content is None else content.encode())
    arguments = [*SMALL, "--model", checkpoint, "--out", tmp_path / "run"]
    assert str(checkpoint) in refused(train.main, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "eval", "compare"])
def test_a_tokenizer_with_more_ids_than_the_model_is_refused(command, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(ROOT / "data/micro", checkpoint)
    backend = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    backend.add_special_tokens(["<|unresized|>"])
    backend.save(str(checkpoint / "tokenizer.json"))
    arguments = ["--model", checkpoint, "--device", "cpu", "--out", tmp_path / "run"]
    if command == "compare":  # the second is looked at before the first is sampled
        arguments += ["--compare", ROOT / "data/micro"]
    monkeypatch.setattr(evaluation, "sample_problems", lambda *_, **__: pytest.fail("sampled"))
    main = train.main if command == "train" else evaluation.main
    printed = refused(main, *arguments)
    assert f"{checkpoint / 'tokenizer.json'} has" in printed and "config.json" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "not json\n", '{"question": "Why?"}\n'])
def test_a_data_file_without_problems_is_named(content, tmp_path, monkeypatch, capsys):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(content)
    arguments = ["--dataset", "gsm8k", "--data-dir", tmp_path, "--out", tmp_path / "run"]
    printed = refused(train.main, *SMALL, *arguments)
    assert str(tmp_path / "train.jsonl") in printed
    assert not (tmp_path / "run").exists()


def test_out_must_be_a_folder_without_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt", tmp_path / "mine.txt/below"):
        assert f"--out {out}" in refused(train.main, *SMALL, "--out", out)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_torchrun_shows_the_sentence_too(tmp_path):
    command = [*TORCHRUN, "--nproc-per-node=1", "train.py"]
    printed = run(*command, "--model", "nowhere", "--out", tmp_path / "run", ok=False)
    assert "error: --model nowhere" in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--model nowhere", "--model nowhere"),
        ("--model data/micro --compare nowhere", "--compare nowhere"),
        ("--model data/micro --limit 0", "--limit"),
        ("--model data/micro --temperature nan", "--temperature"),
        ("--model data/micro --device cuda:99", "--device cuda:99"),
        ("--model data/micro --out README.md", "--out README.md"),
        ("--model data/micro --dataset mmlu --split hard", "no split 'hard': train, heldout, dev"),
        ("--model data/micro --dataset mmlu --data-dir nowhere", "--data-dir nowhere"),
        ("--model data/micro --split val", "no split 'val': train, long, heldout, hard"),
    ],
)
def test_bad_input_to_eval_gets_a_sentence(arguments, named, monkeypatch, capsys):
    assert named in refused(evaluation.main, *arguments.split())


def test_a_gpu_comes_with_its_index(monkeypatch):
    """torch.cuda.set_device takes no device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, index in ((None, 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)):
        assert pick_device(name) == torch.device("cuda", index)
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:2", "cuda:", "cuda:-1", "gpu", "cpu:0"):
        with pytest.raises(ValueError, match=f"--device {name}"):
            pick_device(name)


def test_a_refusal_is_a_sentence_and_no_traceback():
    printed = run("eval.py", "--model", "nowhere", ok=False)
    assert "error: --model nowhere" in printed and "Traceback" not in printed


def test_a_folder_with_a_run_is_not_overwritten(one_process):
    out, _ = one_process
    before = (out / "metrics.jsonl").read_bytes()
    printed = refused(train.main, *SMALL, "--out", out)
    assert f"--out {out}" in printed and (out / "metrics.jsonl").read_bytes() == before
