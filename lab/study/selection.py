"""What does each reward pay for, before any training: reasoning that is used, or decoration?

    python -m lab.study.selection --questions 4 --steps 20     # a first look
    python -m lab.study.selection --device cuda --batch 256 --out docs/study/selection-micro.json

Every question is answered eight times, and every valid trace gets every candidate reward. A trace
computes where its own answer rests on one of its equations (data/micro_labels.py), else it
decorates. GRPO sees nothing of a reward but its differences within a group. So what a reward pays
for is its AUC within a question: the chance that a computing trace is paid more than a decorating
one, ties half. 0.5 is chance, and below it decoration is paid more.

P(gold) is the probability of the gold answer, teacher forced (atman.answer_probability). A cost is
a number of forward passes (f), or of forward and backward passes (b), and seconds: the run's own
CPU time, on a GPU time on the clock, less where the reasoning is read once for several (Tails).
"""

import dataclasses
import functools
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

import atman
from atman import Batch, MaskConfig, Masks, rollout_saliency
from data import micro_task, micro_wordings
from data.files import write_file
from data.prompts import Prompting
from data.tokenizer import Tokenizer
from data.traces import Rollout
from lab.measure.arms import seed_of
from lab.measure.bootstrap import Ratios, interval
from lab.measure.cir import cir
from lab.measure.faithfulness import ANSWER_TOKENS, auroc, greedy_answers
from lab.run import flags
from lab.run.checkpoint import load_llama
from lab.run.command import sentences
from lab.run.flags import flag
from lab.run.ranks import Progress, clock, pick_device
from lab.run.sampling import Prefill, sample
from lab.run.suffix import Suffix, Tails
from lab.study.measures import cell, table
from model import Llama

# Of a mask: name -> rollout_saliency's arguments.
READINGS = {"restored": {"kind": "mask"}, "literal": {"kind": "mask", "sign": "literal"}}
for name in ("even", "mean", "share", "sum"):
    READINGS[name] = {"kind": "attribution", "reduction": name}
POINTS = 16  # of the path that gradients are integrated along
FEWER = {  # passes of the rewards that need less than all three of atman.reliance
    "P(gold)": 1, "sufficiency": 1, "log sufficiency": 1, "necessity": 2, "log necessity": 2,
}  # fmt: skip
MAX_NEW_TOKENS = 320
PAPER, NEIGHBOUR = "mask, restored", "CIR"  # what costs and AUCs are compared with
RELIANCE = ("necessity", "sufficiency", "mediation")


@dataclass(frozen=True)
class Settings:
    """The command line and its help."""

    model: str | None = flag(None, "checkpoint directory (default: data/TASK)")
    task: str = flag("micro", "whose problems", micro_wordings.TASKS)
    split: str = flag("heldout", "which of them", micro_task.SPLITS)
    first: int = flag(0, "number of the first question", least=0)
    questions: int = flag(200, "how many questions", least=1, most=10**6)
    rollouts: int = flag(8, "rollouts per question", least=2, most=10**4)  # an order needs two
    steps: int = flag(200, "steps of the masks; fewer go as far", least=1, most=10**5)
    batch: int = flag(16, "rollouts that are measured together, sorted by length", least=1)
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)")
    out: str | None = flag(None, "JSON file for traces, rewards and costs", metavar="FILE")

    def check(self) -> None:
        """Nothing here depends on anything else."""

    @property
    def start(self) -> str:
        return self.model or f"data/{self.task}"


class Case:
    """B traces as the rewards read them, of (prompt, reasoning, delimiter, answer) lists."""

    def __init__(self, model: Llama, parts, tokenizer=None, rollouts=None):
        self.model, self.tokenizer, self.rollouts = model, tokenizer, rollouts
        self.batch = atman.lay_out(parts, model.embed_tokens.weight.device)
        self.prefill = Prefill(model, self.batch.prompts)
        self.logits = Suffix(model, self.prefill, self.batch).logits

    def tails(self):
        """What train.py gives to atman.reliance and cir: it reads the reasoning once for all."""
        return Tails(self.model, self.prefill, self.batch).logits

    @torch.no_grad()
    def probability(self, level: float = 0.0, blind=None) -> torch.Tensor:
        """P(gold) (B,) with `level` on the scores of every entry of H.

        blind: (B, R) bool, rows that see nothing of the prompt but its first column.
        """
        mask = level * self.batch.region.float()
        return atman.answer_probability(self.logits(mask, blind), self.batch)


def computations(steps: int):
    """Yields (passes, their kind f or b, a function from a Case to {reward: (B,)}) of each."""
    configure = functools.partial(MaskConfig.in_steps, steps, path_memory=True)
    masks = {"mask": configure()}  # the paper's, where there are 200 steps
    for init in (-1.0, -2.0):  # the paper's rate too goes half of the way back from c in all steps
        masks[f"mask from c = {init:g}"] = configure(init=init, lr=-init / 2 / steps)
    masks["mask, sparsity 1e-3"] = configure(sparsity=1e-3)
    for name, config in masks.items():
        yield steps + 1, "b", functools.partial(by_mask, name=name, config=config)
    for start in (-4.0, -12.0):
        yield POINTS, "b", functools.partial(by_gradients, start=start)
    for level in (-4.0, -8.0, -12.0):
        yield 2, "f", functools.partial(by_level, level=level)
    yield 3, "f", by_reliance
    yield 11, "f", lambda case: {NEIGHBOUR: cir(case.batch, case.tails())}
    yield 2, "f", sr
    yield 1, "f", soft_sr
    yield 0, "f", lambda case: {"minus the length": -case.batch.lengths}


def by_mask(case: Case, name: str, config: MaskConfig) -> dict[str, torch.Tensor]:
    """What is read off a learned mask: all of it for the paper's, the main readings for others."""
    masks = atman.optimize_masks(case.model, case.batch, config, case.logits)
    readings = READINGS if name == "mask" else ("restored", "even", "sum")
    found = {f"{name}, {it}": rollout_saliency(masks, config, **READINGS[it]) for it in readings}
    if name == "mask":
        first, last = (-masks.losses[[0, -1]] * case.batch.answer_lengths).exp()
        found["mask, P(gold) recovered"] = last - first
    return found


def by_gradients(case: Case, start: float) -> dict[str, torch.Tensor]:
    """Integrated gradients from H at `start` to no mask, in three ways made one number."""
    with atman.frozen(case.model), torch.enable_grad():
        gained = integrated_gradients(case.batch, case.logits, start)
    masks, name = Masks(None, case.batch.region, gained, None, None), f"gradients from {start:g}"
    found = {it: rollout_saliency(masks, None, **READINGS[it]) for it in ("sum", "even")}
    found["positive sum"] = gained.sum(1).clamp(min=0).sum(1)
    return {f"{name}, {it}": values for it, values in found.items()}


def integrated_gradients(batch: Batch, logits, start: float, points: int = POINTS) -> torch.Tensor:
    """What each entry of H earns of log P(gold), in nats, on the straight way from `start` to 0.

    Sundararajan et al. 2017, by the midpoint rule: (B, R, T), which sums to log P(gold) at no mask
    less log P(gold) at `start`, but for the rule's error. start: as added to the scores.
    """
    used = batch.region.float()
    gained = torch.zeros_like(used)
    for point in range(points):
        mask = (start * (1 - (point + 0.5) / points) * used).requires_grad_()
        loss = (atman.answer_loss(logits(mask), batch) * batch.answer_lengths).sum()
        gained += torch.autograd.grad(loss, mask)[0] * start / points
    return gained * used


def by_level(case: Case, level: float) -> dict[str, torch.Tensor]:
    """What P(gold) loses when all reasoning is suppressed by so much, as c = -0.4 does by -4."""
    return {f"P(gold) - P(gold, H at {level:g})": case.probability() - case.probability(level)}


def by_reliance(case: Case) -> dict[str, torch.Tensor]:
    """Necessity, sufficiency, and ways to join the two (atman.reliance).

    A knockout from delimiter and answer rows alone is no other reward than necessity: reasoning
    reaches the answer through those rows only, so that hiding it from its own rows changes nothing.
    """
    full, hidden, alone = atman.reliance(case.model, case.batch, case.tails())
    found = {kind: atman.reliance_saliency(full, hidden, alone, kind) for kind in RELIANCE}
    log_full, log_hidden, log_alone = (p.clamp(min=1e-30).log() for p in (full, hidden, alone))
    both = torch.stack((found["necessity"], found["sufficiency"]))
    return found | {
        "geometric mean of the two": both.prod(0).sqrt(),
        "smaller of the two": both.amin(0),
        "mean of the two": both.mean(0),
        "log necessity": log_full - log_hidden,
        "log sufficiency": log_alone,
        "mean of the two logs": (log_full - log_hidden + log_alone) / 2,
        "P(gold)": full,
    }


def sr(case: Case) -> dict[str, torch.Tensor]:
    """SR (arXiv 2604.22074): 1 where the trace gives the same answer with and without the question.

    There gpt-4o-mini answers, after it has cut the answer and the question out of the trace. Here
    the model itself does, greedily, from the trace as it is and an empty question.
    """
    bare = case.tokenizer.encode_prompt("")
    traces = [(rollout.prompt, rollout.trace) for rollout in case.rollouts]
    starts = [[(p + it.reasoning, it.delimiter) for p in (prompt, bare)] for prompt, it in traces]
    answers = greedy_answers(case.model, case.tokenizer, case.rollouts, starts, ANSWER_TOKENS)
    same = [with_it is not None and with_it == without for with_it, without in answers]
    return {"SR": torch.tensor(same, dtype=torch.float32)}


def soft_sr(case: Case) -> dict[str, torch.Tensor]:
    """SR as a probability (ours): P(gold) where no row sees the prompt, the reasoning's included.

    Sufficiency differs in this alone, that the reasoning's rows may carry the prompt along.
    """
    blind = torch.ones_like(case.batch.tokens, dtype=torch.bool)
    return {"SR, P(gold)": case.probability(blind=blind)}


def sample_traces(model, tokenizer, args: Settings, bar: Progress) -> list[tuple[int, Rollout]]:
    """(number among its question's samples, rollout) of each valid trace, the shortest first."""
    problems = micro_task.load(args.split, args.first + args.questions, args.task)[args.first :]
    jobs, traces = list(itertools.product(problems, range(args.rollouts))), []
    count, prompting = bar.phase("sampling", len(jobs)), Prompting(args.task)
    for chosen in (jobs[start : start + 256] for start in range(0, len(jobs), 256)):
        asked, seeds = zip(*((it, seed_of(0, it.id, n)) for it, n in chosen), strict=True)
        rollouts, _ = sample(model, tokenizer, asked, prompting, MAX_NEW_TOKENS, seeds, 1.0, count)
        traces += [(n, it) for (_, n), it in zip(chosen, rollouts, strict=True) if it.trace.valid]
    return sorted(traces, key=lambda trace: len(trace[1].completion))


def measure(model, tokenizer, traces, steps: int, batch_size: int, bar: Progress) -> dict:
    """What is kept of numbered rollouts: `traces`, `rewards` and `costs`.

    traces: id, sample, computing, right and length, a list of each; rewards: name -> a list;
    costs: name -> passes, their kind, and seconds a trace.
    """
    facts = {
        "id": [rollout.problem.id for _, rollout in traces],
        "sample": [n for n, _ in traces],
        "computing": [rollout.computing for _, rollout in traces],
        "right": [rollout.outcome == 0 for _, rollout in traces],
        "length": [len(rollout.trace.reasoning) for _, rollout in traces],
    }
    rewards, costs, work = defaultdict(list), {}, list(computations(steps))
    count = bar.phase("rewards", len(work) * len(traces), unit="reading")
    for start in range(0, len(traces), batch_size):
        rollouts = [rollout for _, rollout in traces[start : start + batch_size]]
        parts = [rollout.masked_parts(tokenizer) for rollout in rollouts]
        case = Case(model, parts, tokenizer, rollouts)
        for passes, kind, compute in work:
            begun = clock(case.batch.tokens.device)
            found = compute(case)
            seconds = (clock(case.batch.tokens.device) - begun) / len(traces)
            for name, values in found.items():
                rewards[name] += [float(f"{value:.6g}") for value in values.tolist()]
                own = FEWER.get(name, passes)
                cost = costs.setdefault(name, {"passes": own, "kind": kind, "seconds": 0.0})
                cost["seconds"] += seconds * own / max(passes, 1)
            count(len(rollouts))
    return {"traces": facts, "rewards": rewards, "costs": costs}


def within(kept: dict, reward: str, fact: str, measure=auroc, right_only=False) -> Ratios:
    """question -> (measure of the reward and the fact over its traces, or its right ones, 1).

    Left out are questions where the measure is None, as auroc is with one class alone.
    """
    traces, groups = kept["traces"], defaultdict(list)
    columns = traces["id"], traces["right"], kept["rewards"][reward], traces[fact]
    for question, right, *pair in zip(*columns, strict=True):
        if right or not right_only:
            groups[question].append(pair)
    found = {name: measure(*zip(*pairs, strict=True)) for name, pairs in groups.items()}
    return {name: (value, 1.0) for name, value in found.items() if value is not None}


def spearman(x, y) -> float | None:
    """Pearson's correlation of the ranks, ties sharing one; None where either side is constant."""
    ranks = []
    for values in (x, y):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - counts / 2)[places])
    return float(np.corrcoef(ranks)[0, 1]) if all(map(np.ptp, ranks)) else None


COLUMNS = {  # heading -> arguments of `within`
    "AUC, all rollouts": {"fact": "computing"},
    "AUC, right ones": {"fact": "computing", "right_only": True},
    "AUC of right over wrong": {"fact": "right"},
    "rank correlation with length": {"fact": "length", "measure": spearman},
}
AUCS = tuple(COLUMNS)[:2]  # of reasoning that is used


def estimates(kept: dict, rewards, heads, base: str | None = None) -> dict[str, dict[str, dict]]:
    """reward -> heading of COLUMNS -> the mean over questions with its interval (bootstrap.py).

    With base, it less the base's, paired by question.
    """
    found: dict[str, dict[str, dict]] = {reward: {} for reward in rewards}
    for reward, head in itertools.product(rewards, heads):
        names = [reward] if base is None else [reward, base]
        found[reward][head] = interval(*(within(kept, name, **COLUMNS[head]) for name in names))
    return found


def markdown(kept: dict) -> str:
    """What was measured, the rewards' table with their costs, and how far RELIANCE is from CIR."""
    costs, traces, kinds = kept["costs"], kept["traces"], {"computing": [], "decorating": []}
    for computing, right in zip(traces["computing"], traces["right"], strict=True):
        kinds["computing" if computing else "decorating"].append(right)
    said = [f"{len(of)} {kind} ({np.mean(of or [0]):.1%} right)" for kind, of in kinds.items()]
    found = estimates(kept, kept["rewards"], COLUMNS)
    counts = {head: max(of[head]["questions"] for of in found.values()) for head in COLUMNS}
    all_rollouts, right_ones = (counts[head] for head in AUCS)
    paper, questions = costs[PAPER]["seconds"], len(set(traces["id"]))
    text = (
        f"{len(traces['id'])} valid traces of {questions} questions: {', '.join(said)}. The AUCs "
        f"rest on the questions that hold both kinds: {all_rollouts}, and {right_ones} among right "
        f"traces alone. A trace costs {paper:.3g} s by {PAPER}."
    )
    rows = []
    for name, of in found.items():
        passes = f"{costs[name]['passes']} {costs[name]['kind']}"
        share = f"{costs[name]['seconds'] / paper:.2%}"
        rows.append([name, *map(cell, of.values()), passes, share])
    heads = [f"{head} ({count})" for head, count in counts.items()]
    rewards = table(["reward", *heads, "passes", f"seconds, of {PAPER}'s"], rows)
    less = estimates(kept, RELIANCE, AUCS, NEIGHBOUR).items()
    rows = [[name, *(cell(of[head], signed=True) for head in AUCS)] for name, of in less]
    return "\n\n".join((text, rewards, table([f"less {NEIGHBOUR}", *heads[: len(AUCS)]], rows)))


def open_start(args: Settings) -> tuple[Llama, Tokenizer, dict]:
    """The start's model, with one thread, its tokenizer, and the settings as they are kept."""
    torch.set_num_threads(1)
    device = pick_device(args.device)
    settings = dataclasses.asdict(args) | {"device": device.type, "torch": torch.__version__}
    tokenizer = Tokenizer.from_directory(args.start)
    return load_llama(args.start, device=device), tokenizer, settings


def run(args: Settings) -> None:
    model, tokenizer, settings = open_start(args)
    bar = Progress("selection")
    traces = sample_traces(model, tokenizer, args, bar)
    kept = measure(model, tokenizer, traces, args.steps, args.batch, bar)
    bar.close()
    if args.out:
        write_file(args.out, json.dumps({"settings": settings} | kept))
    print(markdown(kept))


def main() -> None:
    settings = flags.parse(Settings, __doc__.split("\n")[0])
    with sentences():
        run(settings)


if __name__ == "__main__":
    main()
