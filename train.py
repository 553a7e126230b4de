"""Train a Llama so that its reasoning is both right and used (AtManRL).

    torchrun train.py                                              # data/micro, minutes on a CPU
    torchrun --nproc-per-node=8 train.py --preset paper            # the paper's setting, 8 GPUs
    torchrun train.py --saliency none                              # the outcome-only baseline
    python train.py --preset paper --dry-run                       # what it would take (plan.py)

One update, in the paper's order: sample a group of rollouts per question, score the outcome
(Eq. 4), learn each rollout's attention mask and read its saliency (Eq. 2, 3), turn total rewards
into advantages, and step on the clipped loss (Eq. 5). A run's folder receives config.json,
metrics.jsonl (a line per update and per evaluation), samples.jsonl, curves.png and checkpoint/.

Departures from section 3.4, beyond those in atman.py and grpo.py:
1. paper silent: AdamW without weight decay and without gradient clipping updates the policy.
2. Rollouts are dealt over the ranks in equal blocks, which need not be whole questions, so that
   any number of ranks works.
"""

import dataclasses
import json
import math
import os
import re
import resource
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import plan
from atman import rollout_saliency
from cache import Prefill
from checkpoint import writing
from config import Config, parse_command
from data import Problem, instruction, load_problems
from data.prompts import Tokenizer
from data.traces import Trace, split_trace
from eval import evaluate
from faithfulness import optimize_traces
from grpo import generate, group_advantages, outcome_reward, update_policy
from hub import checkpoint_directory
from model import Llama
from optimizer import make_optimizer
from ranks import Interrupted, Progress, Ranks, Stop, pick_device, together
from report import curves
from runs import RunFolder
from table1 import load_spacy, summarize, table

MOST_SKIPPED = 10  # updates in a row with numbers that are not finite, before the run ends


@dataclass
class Rollout:
    """One sampled completion on its way through an update."""

    problem: Problem
    prompt: list[int]
    completion: list[int]
    trace: Trace
    outcome: float  # Eq. 4
    saliency: float = math.nan  # Eq. 3; nan where no mask can be learned
    mask_losses: list[float] | None = None  # Eq. 2, in nats: at c, at the end, and with no mask


def train(config: Config, resume: bool = False) -> None:
    """Run config; with resume go on in config.out, if a run is there."""
    ranks = Ranks.start(config.device)
    if len({json.dumps(settings) for settings in ranks.gather([dataclasses.asdict(config)])}) > 1:
        raise ValueError(
            "the ranks have different settings: give all of them the same command line, and a "
            "run's folder (--out, --resume) that every node sees"
        )
    torch.manual_seed(config.seed)  # nothing here draws from it; should a library, then by the seed
    ranks.say(f"loading {config.model} and the problems of {config.dataset}")
    with ranks.local_first():  # a machine's others find what it has downloaded
        directory = checkpoint_directory(config.model)
        problems = load_problems(config.dataset, config.train_split, config.data_dir)
        heldout = load_problems(config.dataset, "heldout", config.data_dir, config.eval_problems)
    if len(problems) < config.questions:
        raise ValueError(f"--questions {config.questions}: there are {len(problems)} to train on")
    tokenizer = Tokenizer.from_directory(directory)
    model = Llama.from_pretrained(directory, device=ranks.device)
    tokenizer.check_fits(model.config.vocab_size)
    optimizer = make_optimizer(model, config.lr, ranks, config.zero)
    spacy_pipeline = load_spacy(config.spacy_model)
    steps = config.steps
    if config.epochs is not None:
        steps = config.epochs * (len(problems) // config.questions)
    tokenizer.encode_prompt(instruction(config.dataset, problems[0].question))  # or it says why not
    run = RunFolder.reopen(config, ranks) if resume else RunFolder.begin(config, ranks)
    done, notes = run.restore(model, optimizer, ranks)
    notes = {"skipped_in_a_row": 0, "best": None} | notes
    if notes["skipped_in_a_row"] == MOST_SKIPPED:  # as this run ended
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if any(ranks.gather([restarted])):  # torchrun does not count alike on all nodes
            raise too_many_skipped(run)
        notes["skipped_in_a_row"] = 0  # somebody resumes it and may have mended what was wrong
    if done > steps:
        raise ValueError(f"--steps {steps}: {run.path} has done {done} updates already")
    # The policy pass goes through DDP's wrapper, or its gradients would never be averaged.
    policy = model
    if ranks.world_size > 1:  # gradients live in DDP's buckets: no second copy of them
        policy = DistributedDataParallel(model, gradient_as_bucket_view=True)
    autocast = torch.bfloat16 if half_precision(config, ranks.device) else None
    # Sampling and masks use the bare model, or a copy of it in half precision.
    sampler = empty_copy(model, autocast) if autocast else model
    ranks.say(
        f"{steps} updates of {config.questions} questions x {config.rollouts} rollouts on "
        f"{ranks.world_size} x {ranks.device}, saliency {config.saliency}, writing {run.path}"
        + (f", going on after update {done}" if done else "")
    )

    stop = Stop()

    def evaluate_heldout(step: int, count: int, label: str) -> dict:
        start = time.time()
        copy_weights(sampler, model)
        records = sample_heldout(sampler, tokenizer, heldout[:count], config, ranks, stop, label)
        summary = summarize(records, spacy_pipeline)
        run.write({"step": step, "eval": summary, "seconds_evaluation": time.time() - start})
        ranks.say(evaluation_line(label, summary))
        return summary

    try:
        before = logged_evaluation(run.history, 0)
        if before is None:
            before = evaluate_heldout(0, config.eval_problems, "before")
            warn(before, config, ranks)
        for step in range(done, steps):
            between = config.eval_every and step > 0 and step % config.eval_every == 0
            if between and logged_evaluation(run.history, step) is None:
                summary = evaluate_heldout(step, config.eval_every_problems, f"after {step}")
                if notes["best"] is None or summary["pass@1"] > notes["best"]["pass@1"]:
                    notes["best"] = {"step": step, "pass@1": summary["pass@1"]}
                    run.save_best(model, notes["best"])

            began, bar = time.time(), Progress(f"update {step + 1}/{steps}", ranks.rank > 0, stop)
            questions = draw_questions(problems, config, step)
            copy_weights(sampler, model)
            rollouts, seconds = together(
                ranks, stop, collect, sampler, tokenizer, questions, config, step, ranks, bar
            )  # Eq. 2, 3, 4
            collected = time.time()
            facts = ranks.gather([describe(rollout) for rollout in rollouts])
            outcome = torch.tensor([fact["outcome"] for fact in facts])
            saliency = torch.tensor([fact["saliency"] for fact in facts])
            saliency = fill_missing(saliency, outcome, config)
            if config.shuffle_saliency:
                saliency = shuffle(saliency, config, step)
            reward = outcome + config.saliency_weight * saliency
            advantages = group_advantages(reward, config.rollouts)
            stats = None
            broken = [fact["id"] for fact in facts if fact["broken"]]
            if not broken:
                prompts, completions, mine = fill_up(rollouts, advantages, ranks)
                stats = update_policy(
                    policy,
                    optimizer,
                    prompts,
                    completions,
                    mine,
                    passes=config.passes,
                    micro_batch=config.micro_batch,
                    clip_eps=config.clip_eps,
                    ratio=config.ratio,
                    temperature=config.temperature,
                    normalizer=len(facts),
                    world_size=ranks.world_size,
                    autocast=autocast,
                    logit_chunk=config.logit_chunk,
                    recompute=config.recompute,
                    progress=bar.phase("policy", config.passes * len(rollouts), whole=True),
                )  # Eq. 5
                rows = [n for n in stats["broken_rows"] if n < len(rollouts)]  # not those filled up
                broken = ranks.gather([rollouts[n].problem.id for n in rows])
            bar.close()
            updated = time.time()

            skipped = stats is None or stats["steps"] < config.passes
            if skipped and not broken:  # a gradient does not say whose it is: all are named
                broken = [question.id for question in questions]
            notes["skipped_in_a_row"] = notes["skipped_in_a_row"] + 1 if skipped else 0
            metrics = {
                "step": step + 1,
                **reward_metrics(reward, outcome, saliency, advantages, config.rollouts),
                **rollout_metrics(facts),
                **policy_metrics(stats, len(rollouts), facts, ranks),
                "lr": config.lr,
                "passes": stats["steps"] if stats else 0,
                "skipped": int(skipped),
                "skipped_questions": sorted(set(broken)) if skipped else [],
                **cost_metrics(facts, seconds, (began, collected, updated), ranks),
            }
            run.write(metrics)
            run.append("samples.jsonl", sample_lines(step + 1, facts, saliency, advantages))
            ranks.say(update_line(metrics, steps, config.passes))
            done = step + 1
            if notes["skipped_in_a_row"] == MOST_SKIPPED:
                run.save(done, model, optimizer, ranks, notes)
                raise too_many_skipped(run)
            if done % config.save_every == 0 or done == steps:
                run.save(done, model, optimizer, ranks, notes)
        after = evaluate_heldout(steps, config.eval_problems, "after")
    except Interrupted:
        if done and run.saved != done:
            run.save(done, model, optimizer, ranks, notes)
        ranks.say(
            f"stopped by {signal.Signals(stop.signal).name} after update {done} of {steps}; go on "
            f"with --resume {run.path}"
        )
        ranks.stop()
        sys.exit(128 + stop.signal)
    if ranks.rank == 0:
        model.save_pretrained(run.path / "checkpoint")
        with writing(run.path / "curves.png"):
            curves(run.history, run.path / "curves.png")
        print(f"\n{table({'before': before, 'after': after}, spacy_pipeline)}\n")
        print(f"{run.path}: {', '.join(sorted(path.name for path in run.path.iterdir()))}")
    ranks.stop()


def half_precision(config: Config, device: torch.device) -> bool:
    return (config.precision or ("bfloat16" if device.type == "cuda" else "float32")) == "bfloat16"


def empty_copy(model: Llama, dtype: torch.dtype) -> Llama:
    """A Llama of the same shape in dtype, without gradients; its weights are yet to be copied."""
    with torch.device("meta"):
        like = Llama(model.config).to(dtype)
    return like.to_empty(device=model.embed_tokens.weight.device).requires_grad_(False)


@torch.no_grad()
def copy_weights(sampler, model) -> None:
    """Bring the half-precision copy up to date; nothing where there is none."""
    if sampler is not model:
        for weight, source in zip(sampler.parameters(), model.parameters(), strict=True):
            weight.copy_(source)


def logged_evaluation(history: list[dict], step: int) -> dict | None:
    """The evaluation after `step` updates, where the run went as far before it was resumed."""
    return next((line["eval"] for line in history if "eval" in line and line["step"] == step), None)


def too_many_skipped(run: RunFolder) -> ValueError:
    last = next(line for line in reversed(run.history) if "skipped_questions" in line)
    return ValueError(
        f"{MOST_SKIPPED} updates in a row met numbers that are not finite (the last on "
        f"questions {', '.join(last['skipped_questions'])}) and were skipped or cut short; try a "
        f"lower --lr, then --resume {run.path}"
    )


def warn(before: dict, config: Config, ranks: Ranks) -> None:
    """Say what stands in the way of learning, if the first evaluation shows it."""
    if before["pass@1"] < 0.05:
        gated = config.gate_saliency and config.saliency != "none"
        paid = ", and saliency is paid to right ones only (--no-gate-saliency: to all)" * gated
        ranks.say(
            f"note: {config.model} gets nearly all of {config.dataset} wrong, so few groups will "
            f"differ in outcome and the outcome reward has little to teach{paid}"
        )
    if before["truncated"] > 0.1:
        ranks.say(
            f"note: {before['truncated']:.0%} of the held-out samples are cut at --max-new-tokens "
            f"{config.max_new_tokens} and count as wrong; raise it if they have more to say"
        )


# -------------------------------------------------------------------------- the parts of an update


def draw_questions(problems, config: Config, step: int) -> list[Problem]:
    """The update's questions: each epoch is its own permutation, the same on every rank."""
    epoch, place = divmod(step, len(problems) // config.questions)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(problems), generator=generator)
    places = order[place * config.questions : (place + 1) * config.questions]
    return [problems[n] for n in places.tolist()]


def collect(
    model, tokenizer, questions, config: Config, step, ranks, bar
) -> tuple[list[Rollout], tuple[float, float]]:
    """This rank's rollouts with both rewards, and the seconds of sampling and of masks."""
    start = time.time()
    rollouts, prefill = sample_rollouts(model, tokenizer, questions, config, step, ranks, bar)
    sampled = time.time()
    learn_saliency(model, tokenizer, rollouts, config, bar, prefill)
    return rollouts, (sampled - start, time.time() - sampled)


def sample_rollouts(
    model, tokenizer, questions, config: Config, step, ranks, bar
) -> tuple[list[Rollout], Prefill | None]:
    """This rank's share of the update's rollouts, question-major, and their prompts as read."""
    jobs = ranks.share([(q, r) for q in range(len(questions)) for r in range(config.rollouts)])
    prompts = [
        tokenizer.encode_prompt(instruction(config.dataset, questions[q].question)) for q, _ in jobs
    ]
    prefill = Prefill(model, prompts) if prompts else None  # a rank may have no share
    completions = generate(
        model,
        prompts,
        config.max_new_tokens,
        config.temperature,
        tokenizer.eos_ids,
        [(config.seed, step, q, r) for q, r in jobs],  # the same on any number of ranks
        bar.phase("sampling", len(jobs)),
        prefill,
    )
    rollouts = []
    for (q, _), prompt, completion in zip(jobs, prompts, completions, strict=True):
        trace = split_trace(completion, tokenizer)
        outcome = outcome_reward(trace.correct(questions[q].answer))  # Eq. 4
        rollouts.append(Rollout(questions[q], prompt, completion, trace, outcome))
    return rollouts, prefill


def learn_saliency(model, tokenizer, rollouts, config: Config, bar, prefill=None) -> None:
    """Give each rollout its saliency (Eq. 3) from its mask (Eq. 2), where one can be learned."""
    valid = [rollout for rollout in rollouts if rollout.trace.valid]
    if config.saliency == "length":
        for rollout in valid:
            rollout.saliency = -len(rollout.trace.reasoning) / 100
    if not config.learns_masks:
        return
    mask_config = config.mask()
    valid.sort(key=lambda rollout: len(rollout.completion))  # neighbours in length: less padding
    progress = bar.phase("masks", len(valid) * config.mask_steps, unit="step")
    for start in range(0, len(valid), config.mask_batch):
        chosen = valid[start : start + config.mask_batch]
        result = optimize_traces(
            model,
            tokenizer,
            [rollout.prompt for rollout in chosen],
            [rollout.trace for rollout in chosen],
            [rollout.problem.answer for rollout in chosen],
            mask_config,
            progress,
            prefill,
        )
        rewards = rollout_saliency(
            result,
            mask_config,
            kind=config.saliency,
            sign=config.saliency_sign,
            reduction=config.saliency_reduction,
        )
        losses = torch.stack((result.losses[0], result.losses[-1], result.unmasked), 1)  # (B, 3)
        for rollout, reward, three in zip(chosen, rewards.tolist(), losses.tolist(), strict=True):
            rollout.saliency, rollout.mask_losses = reward, three


def fill_missing(saliency: torch.Tensor, outcome: torch.Tensor, config: Config) -> torch.Tensor:
    """Rollouts without a saliency (nan) get the lowest of their group, else 0: never a prize.

    With --gate-saliency a wrong rollout gets nothing: 0, or its group's lowest where that is less.
    """
    groups = saliency.view(-1, config.rollouts)
    lowest = groups.nan_to_num(torch.inf).amin(1, keepdim=True)
    lowest = lowest.masked_fill(lowest.isinf(), 0.0)
    filled = groups.where(~groups.isnan(), lowest)
    if config.gate_saliency:
        wrong = outcome.view(-1, config.rollouts) < 0
        filled = filled.where(~wrong, lowest.clamp(max=0.0))
    return filled.flatten()


def shuffle(saliency: torch.Tensor, config: Config, step: int) -> torch.Tensor:
    """The same rewards in every group, but no longer of the rollouts that they were read off."""
    groups = saliency.view(-1, config.rollouts).numpy()
    draw = np.random.default_rng((config.seed, step))
    return torch.from_numpy(draw.permuted(groups, axis=1)).flatten()


def describe(rollout: Rollout) -> dict:
    """What the other ranks, the metrics and samples.jsonl need of a rollout."""
    measured = all(map(math.isfinite, [rollout.saliency, *(rollout.mask_losses or [])]))
    return {
        "id": rollout.problem.id,
        "gold": rollout.problem.answer,
        "number": rollout.trace.parsed(rollout.problem.answer),
        "text": rollout.trace.text,
        "length": len(rollout.trace.reasoning),
        "tokens": len(rollout.completion),
        "truncated": rollout.trace.truncated,
        "delimiters": rollout.trace.delimiter_count,
        "no_reasoning": not rollout.trace.reasoning_text.strip(),
        "outcome": rollout.outcome,
        "measured": measured,
        "broken": rollout.mask_losses is not None and not measured,
        "saliency": rollout.saliency if measured else math.nan,
        "mask_losses": rollout.mask_losses if measured else None,
    }


def fill_up(rollouts, advantages: torch.Tensor, ranks) -> tuple[list, list, torch.Tensor]:
    """This rank's prompts, completions and advantages, filled up with rows of no weight.

    rollouts: this rank's; advantages: of all ranks. Every rank must run as many micro-batches as
    the others, or the gradient exchange hangs.
    """
    missing = ranks.share_size(len(advantages)) - len(rollouts)
    prompts = [rollout.prompt for rollout in rollouts] + [[0]] * missing
    completions = [rollout.completion for rollout in rollouts] + [[]] * missing
    mine = ranks.share(advantages.tolist()) + [0.0] * missing
    return prompts, completions, torch.tensor(mine, device=ranks.device)


def reward_metrics(reward, outcome, saliency, advantages, group_size: int) -> dict:
    """Means over the update's rollouts, of all ranks; all (B,), rows question-major."""
    return {
        "reward": reward.mean().item(),
        "outcome": outcome.mean().item(),
        "saliency": saliency.mean().item(),
        "saliency_spread": saliency.view(-1, group_size).std(1).mean().item(),
        "no_signal": mean((advantages.view(-1, group_size) == 0).all(1).tolist()),
    }


def rollout_metrics(facts: list[dict]) -> dict:
    """Means over the update's rollouts, of all ranks."""
    losses = [fact["mask_losses"] for fact in facts if fact["mask_losses"] is not None]
    at_c, at_end, unmasked = map(mean, zip(*losses, strict=True)) if losses else (None,) * 3
    return {
        "measured": mean(fact["measured"] for fact in facts),
        "length": mean(fact["length"] for fact in facts),
        "tokens": mean(fact["tokens"] for fact in facts),
        "truncated": mean(fact["truncated"] for fact in facts),
        "no_delimiter": mean(fact["delimiters"] == 0 for fact in facts),
        "several_delimiters": mean(fact["delimiters"] > 1 for fact in facts),
        "no_reasoning": mean(fact["no_reasoning"] for fact in facts),
        "mask_loss_start": at_c,
        "mask_loss_end": at_end,
        "mask_loss_unmasked": unmasked,
    }


def policy_metrics(stats: dict | None, count: int, facts: list[dict], ranks: Ranks) -> dict:
    """update_policy's numbers of all ranks as one; None where it did not run.

    count: this rank's rollouts, the first of the rows that it gave. The ratio of a whole sequence
    strays further the longer it is: the clip fractions of the shorter and of the longer half of the
    rollouts show how much.
    """
    if stats is None:
        names = ("clip_fraction", "clip_fraction_short", "clip_fraction_long", "loss", "entropy")
        return dict.fromkeys((*names, "ratio_max", "ratio_min", "gradient_norm"))
    clipped = ranks.gather(stats["clipped_rows"][:count])
    parts = ranks.gather([{k: stats[k] for k in ("loss", "entropy", "ratio_max", "ratio_min")}])
    by_length = sorted(range(len(facts)), key=lambda n: facts[n]["tokens"])
    half = len(facts) // 2
    values = {
        "clip_fraction": mean(clipped),
        "clip_fraction_short": mean(clipped[n] for n in by_length[:half]),
        "clip_fraction_long": mean(clipped[n] for n in by_length[half:]),
        "loss": sum(part["loss"] for part in parts),  # already divided by all rollouts
        "entropy": sum(part["entropy"] for part in parts) / sum(fact["tokens"] for fact in facts),
        "ratio_max": max(part["ratio_max"] for part in parts),
        "ratio_min": min(part["ratio_min"] for part in parts),
        "gradient_norm": stats["gradient_norm"],  # of the averaged gradient, equal on all ranks
    }
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def cost_metrics(facts: list[dict], seconds: tuple[float, float], times, ranks: Ranks) -> dict:
    """Seconds of the slowest rank, what that makes a second, and the largest peak of memory.

    seconds: of sampling and masks, on this rank; times: when the update began, when its rollouts
    were there, and when its policy step was taken.
    """
    began, collected, updated = times
    sampling, masks = (max(column) for column in zip(*ranks.gather([seconds]), strict=True))
    return {
        "seconds_sampling": sampling,
        "seconds_masks": masks,
        "seconds_policy": updated - collected,
        "tokens_per_second": sum(fact["tokens"] for fact in facts) / sampling,
        "rollouts_per_second": len(facts) / (updated - began),
        "peak_memory_gib": max(ranks.gather([peak_memory(ranks.device)])),
    }


def peak_memory(device: torch.device) -> float:
    """GiB so far: of the GPU's allocator, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def sample_heldout(model, tokenizer, problems, config: Config, ranks, stop, label) -> list[dict]:
    """eval.evaluate with the problems dealt over the ranks; every rank returns all records."""
    mine = ranks.share(problems)
    bar = Progress(f"held-out {label}", ranks.rank > 0, stop)
    records = together(
        ranks,
        stop,
        evaluate,
        model,
        tokenizer,
        mine,
        config.dataset,
        samples=config.eval_samples,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        batch_size=config.eval_batch,
        progress=bar.phase("sampling", len(mine) * config.eval_samples),
    )
    bar.close()
    return ranks.gather(records)


# ------------------------------------------------------------------------------------------ output


def sample_lines(step: int, facts, saliency, advantages) -> list[dict]:
    """samples.jsonl's lines of an update."""
    columns = zip(facts, saliency.tolist(), advantages.tolist(), strict=True)
    return [{"step": step, **fact, "saliency": s, "advantage": a} for fact, s, a in columns]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def update_line(m: dict, steps: int, passes: int) -> str:
    seconds = [m["seconds_sampling"], m["seconds_masks"], m["seconds_policy"]]
    clipped = "" if m["clip_fraction"] is None else f"clipped {m['clip_fraction']:4.0%}  "
    skipped = ""
    if m["skipped"]:
        taken = f" after {m['passes']} of {passes} passes" if m["passes"] else ""
        skipped = f"SKIPPED{taken}, not finite: {' '.join(m['skipped_questions'])}  "
    return (
        f"update {m['step']:>3}/{steps}  outcome {m['outcome']:+.3f}  "
        f"saliency {m['saliency']:.3f}  reward {m['reward']:+.3f}  length {m['length']:5.1f}  "
        f"{clipped}{skipped}{sum(seconds):4.1f} s "
        f"(sampling {seconds[0]:.1f}, masks {seconds[1]:.1f}, policy {seconds[2]:.1f})"
    )


def evaluation_line(label: str, summary: dict) -> str:
    passes = "  ".join(f"{key} {summary[key]:.1%}" for key in summary if key.startswith("pass"))
    return f"held-out {label}: {passes}  length {summary['tokens']:.1f} tokens"


def main() -> None:
    config, options = parse_command()
    rank = os.environ.get("RANK", "0")
    try:
        if not options.dry_run:
            train(config, options.resume)
        elif rank == "0":
            planned = plan.plan_run(config, options.world_size)
            print(plan.report(planned, plan.measured(planned, pick_device(config.device))))
    except (ValueError, OSError) as error:  # what a user gave: one sentence, no traceback
        sys.exit(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}")
    except KeyboardInterrupt:  # before the loop, which takes it as a request to stop
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        # A rank that waits for one that is gone: the other's message says why that is.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone or not re.search("peer|gloo|nccl|process group", str(error), re.IGNORECASE):
            raise
        sys.exit(f"error on rank {rank}: another rank is gone ({str(error).splitlines()[0]})")


if __name__ == "__main__":
    main()
