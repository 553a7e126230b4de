"""Evaluation: what a checkpoint answers, and what its reasoning is made of (Table 1).

    python eval.py --model data/micro                          # held-out problems of the micro task
    python eval.py --model runs/NAME/checkpoint --compare data/micro --limit 300
    python eval.py --model meta-llama/Llama-3.2-3B-Instruct --dataset gsm8k --limit 500

Every problem is sampled `--samples` times at temperature 1 (the paper: four). pass@k is the chance
that at least one of k samples is right, without bias from n >= k samples. A trace is what stands
before the delimiter; shares of words are of all its spaCy tokens but white space, pooled over
traces, and categories may overlap ("two" is a stop word and a number).

On the micro task, where it is known which tokens compute the answer, the saliency of each token is
scored against that truth: AUROC per trace, one correct trace a question, ties averaged.
"""

import argparse
import json
import math
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import spacy

from atman import MaskConfig, optimize_masks, token_saliency
from data import DATASETS, instruction, load_problems, micro_task
from data.prompts import Tokenizer
from data.traces import gold_tail, reasoning_spans, split_trace
from grpo import generate
from hub import checkpoint_directory
from model import Llama, LlamaConfig
from ranks import Progress, pick_device

# What counts as a symbol, beside currency marks, where blank English has no tagger.
OPERATORS = set("+-*/=<>^%×÷−±≤≥≠≈")


def evaluate(
    model,
    tokenizer,
    problems,
    dataset,
    *,
    samples=4,
    temperature=1.0,
    max_new_tokens=1024,
    seed=0,
    batch_size=256,
    progress=None,
) -> list[dict]:
    """Sample every problem; one record per sample, question-major.

    A record holds id, question, gold, sample (its number), text (reasoning as text), reasoning and
    completion (ids), number (the parsed answer, a letter where gold is one, or None), correct,
    truncated, no_delimiter, and subject where problems have one. Each sample draws from (seed,
    problem's id, sample), whatever the batch or the other problems. progress is called with the
    number of samples done.
    """
    jobs = [(place, sample) for place in range(len(problems)) for sample in range(samples)]
    prompts = [tokenizer.encode_prompt(instruction(dataset, p.question)) for p in problems]
    records = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        completions = generate(
            model,
            [prompts[place] for place, _ in batch],
            max_new_tokens,
            temperature,
            tokenizer.eos_ids,
            [(seed, zlib.crc32(problems[p].id.encode()), sample) for p, sample in batch],
            progress,
        )
        for (place, sample), completion in zip(batch, completions, strict=True):
            problem, trace = problems[place], split_trace(completion, tokenizer)
            records.append(
                {
                    "id": problem.id,
                    "question": problem.question,
                    "gold": problem.answer,
                    "sample": sample,
                    "text": trace.reasoning_text,
                    "reasoning": trace.reasoning,
                    "completion": completion,
                    "number": trace.parsed(problem.answer),
                    "correct": trace.correct(problem.answer),
                    "truncated": trace.truncated,
                    "no_delimiter": not trace.delimiter,
                    **({"subject": problem.subject} if problem.subject else {}),
                }
            )
    return records


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one.

    The unbiased estimate of Chen et al. 2021 (Codex), from `correct` right ones in `samples`.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def word_counts(texts, pipeline) -> dict[str, int]:
    """Table 1's counts over all texts: tokens (without white space), numbers, stop_words, symbols.

    With a trained tagger: pos NUM and SYM. Blank English has none, so its lexical attributes stand
    in: like_num, and currency marks or arithmetic operators.
    """
    counts = dict.fromkeys(("tokens", "numbers", "stop_words", "symbols"), 0)
    for doc in pipeline.pipe(texts):
        tagged = doc.has_annotation("POS")
        for token in doc:
            if token.is_space:
                continue
            counts["tokens"] += 1
            counts["stop_words"] += token.is_stop
            if tagged:
                counts["numbers"] += token.pos_ == "NUM"
                counts["symbols"] += token.pos_ == "SYM"
            else:
                counts["numbers"] += token.like_num
                counts["symbols"] += token.is_currency or token.text in OPERATORS
    return counts


def load_spacy(name: str | None):
    """A trained spaCy pipeline by name or path, or blank English. ValueError when it is absent."""
    if name is None:
        return spacy.blank("en")
    try:
        return spacy.load(name)
    except OSError:
        raise ValueError(
            f"--spacy-model {name}: no such pipeline; get it with `python -m spacy download {name}`"
            " or leave the flag out for blank English"
        ) from None


def summarize(records: list[dict], pipeline) -> dict:
    """Table 1 from evaluate's records: pass@1, pass@k, mean lengths in tokens, word shares.

    pass@1 counts every problem alike (micro average). Where all records have a subject, macro
    pass@1 is the mean over subjects of pass@1 in each, so that a large one counts no more.
    """
    by_problem: dict[str, list[bool]] = {}
    lengths: dict[str, list[int]] = {}
    subject_of = {record["id"]: record.get("subject") for record in records}
    for record in records:
        by_problem.setdefault(record["id"], []).append(record["correct"])
        lengths.setdefault(record["id"], []).append(len(record["reasoning"]))
    samples = min(len(row) for row in by_problem.values())
    k = min(4, samples)
    words = word_counts([record["text"] for record in records], pipeline)

    def mean(values):
        return float(np.mean(list(values)))

    summary = {"problems": len(by_problem), "samples": samples}
    summary["pass@1"] = mean(mean(row) for row in by_problem.values())
    if all(subject_of.values()):
        by_subject: dict[str, list[float]] = {}
        for problem, row in by_problem.items():
            by_subject.setdefault(subject_of[problem], []).append(mean(row))
        summary["macro pass@1"] = mean(mean(shares) for shares in by_subject.values())
    summary[f"pass@{k}"] = mean(pass_at_k(len(r), sum(r), k) for r in by_problem.values())
    summary["tokens"] = mean(len(record["reasoning"]) for record in records)
    summary["tokens_spread"] = mean(np.std(row) for row in lengths.values())
    summary["spacy_tokens"] = words["tokens"] / len(records)
    for kind in ("numbers", "stop_words", "symbols"):
        summary[kind] = words[kind] / max(words["tokens"], 1)
    summary["truncated"] = mean(record["truncated"] for record in records)
    summary["no_delimiter"] = mean(record["no_delimiter"] for record in records)
    return summary


ROWS = {  # key: (label, is a share)
    "pass@1": ("accuracy (pass@1)", True),
    "macro pass@1": ("  mean of subjects", True),
    "pass@2": ("pass@2", True),
    "pass@3": ("pass@3", True),
    "pass@4": ("pass@4", True),
    "tokens": ("tokens per trace", False),
    "tokens_spread": ("  spread in a question", False),
    "spacy_tokens": ("spaCy tokens per trace", False),
    "numbers": ("numbers", True),
    "stop_words": ("stop words", True),
    "symbols": ("symbols", True),
    "truncated": ("cut at the limit", True),
    "no_delimiter": ("no delimiter", True),
}


def table(columns: dict[str, dict], pipeline) -> str:
    """Summaries side by side as text; with two or more, the last column's change from the first."""
    first, last = next(iter(columns.values())), list(columns.values())[-1]
    tagged = "a trained tagger" if pipeline.pipe_names else "blank English's lexical attributes"
    width = max(12, *(len(name) + 2 for name in columns))
    lines = [f"{first['problems']} problems x {first['samples']} samples; numbers, stop words and "
             f"symbols by spaCy, {tagged}"]  # fmt: skip
    lines.append(" " * 24 + "".join(f"{name:>{width}}" for name in columns)
                 + (f"{'change':>12}" if len(columns) > 1 else ""))  # fmt: skip
    for key, (label, share) in ROWS.items():
        if key not in first:
            continue
        line = f"{label:<24}"
        for summary in columns.values():
            line += f"{summary[key]:>{width}.1%}" if share else f"{summary[key]:>{width}.1f}"
        if len(columns) > 1 and key in last:
            difference = last[key] - first[key]
            if "pass@" in key or key in ("truncated", "no_delimiter"):
                line += f"{100 * difference:>+8.1f} pts"
            elif first[key]:
                line += f"{difference / first[key]:>+12.0%}"
        lines.append(line)
    return "\n".join(lines)


def curves(history: list[dict], path: Path) -> None:
    """Learning curves as a PNG: accuracy and pass@4, reasoning length, and the three rewards.

    history: metrics.jsonl's lines; `eval` entries hold a summary, others a step's rewards.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evals = [line for line in history if "eval" in line]
    steps = [line for line in history if "outcome" in line]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for key in ("pass@1", "pass@4"):
        points = [(line["step"], line["eval"][key]) for line in evals if key in line["eval"]]
        left.plot(*zip(*points, strict=True), marker="o", label=key)
    left.set(title="held-out accuracy", xlabel="update", ylim=(0, 1.02))
    middle.plot([e["step"] for e in evals], [e["eval"]["tokens"] for e in evals], marker="o",
                label="held-out")  # fmt: skip
    middle.plot(
        [s["step"] for s in steps], [s["length"] for s in steps], alpha=0.6, label="rollouts"
    )
    middle.set(title="mean reasoning length (tokens)", xlabel="update")
    middle.set_ylim(bottom=0)
    for key in ("outcome", "saliency", "reward"):
        right.plot([s["step"] for s in steps], [s[key] for s in steps], label=key)
    right.set(title="mean reward of the rollouts", xlabel="update")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def auroc(scores, labels) -> float | None:
    """Area under the ROC curve, ties counted half; None when only one class is there."""
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    positive, negative = scores[labels][:, None], scores[~labels]
    if not len(positive) or not len(negative):
        return None
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


def mean_and_half_width(values: list[float]) -> tuple[float, float, int]:
    """Mean, half the width of its 95% interval (normal approximation), and how many."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan, len(values)
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half), len(values)


def map_auroc(model, tokenizer, records, dataset, saliencies, progress=None) -> dict:
    """How well token saliency tells computing from decorating tokens on micro traces.

    records: of `evaluate`; one correct trace a question is used. saliencies: name ->
    (MaskConfig, kind). Returns "unrecognised" -> the share of characters without a label, and
    name -> {"all tokens" and "no punctuation" -> (mean AUROC, its 95% interval's half width,
    traces)}. Punctuation is told apart because it is decoration by definition, yet a model may
    gather its result on the full stop after an equation, and in terse traces nothing else
    decorates. progress is called with the mask steps done.
    """
    chosen = {}
    for record in records:
        if record["correct"] and record["reasoning"]:
            chosen.setdefault(record["id"], record)
    # Neighbours in length share a batch: less padding.
    chosen = sorted(chosen.values(), key=lambda record: len(record["completion"]))
    labels, is_word, text_of_all, marks = [], [], "", []
    for record in chosen:
        text, spans = reasoning_spans(record["reasoning"], tokenizer)
        labels.append(np.array(micro_task.token_labels(text, record["number"], spans)))
        is_word.append(np.array([text[a:b].strip().strip(".,:;?!") != "" for a, b in spans]))
        marks += micro_task.label_characters(text, record["number"])
        text_of_all += text
    results = {"unrecognised": micro_task.unrecognised_share(text_of_all, marks)}
    masks: dict = {}  # mask and attribution are read off the same optimisation
    for name, (config, kind) in saliencies.items():
        areas = {"all tokens": [], "no punctuation": []}
        for start in range(0, len(chosen), 16):
            batch = slice(start, start + 16)
            if (config, start) not in masks:
                rows = chosen[batch]
                masks[config, start] = optimize_traces(
                    model,
                    tokenizer,
                    [tokenizer.encode_prompt(instruction(dataset, r["question"])) for r in rows],
                    [split_trace(r["completion"], tokenizer) for r in rows],
                    [r["gold"] for r in rows],
                    config,
                    progress,
                )
            tokens = token_saliency(masks[config, start], config, kind)
            for scores, label, word in zip(tokens, labels[batch], is_word[batch], strict=True):
                known = label != micro_task.UNRECOGNISED
                for which, used in (("all tokens", known), ("no punctuation", known & word)):
                    area = auroc(scores.cpu().numpy()[used], label[used] == micro_task.COMPUTING)
                    areas[which] += [] if area is None else [area]
        results[name] = {which: mean_and_half_width(found) for which, found in areas.items()}
    return results


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Accuracy, pass@k and the composition of the reasoning of one or more "
        "checkpoints on the same problems.",
    )
    limits = "; ".join(f"{name}: {entry.max_new_tokens}" for name, entry in DATASETS.items())
    options = {  # name: (type, default, at least, help)
        "limit": (int, 300, 1, "number of problems"),
        "samples": (int, 4, 1, "samples per problem"),
        "temperature": (float, 1.0, 0, "0 is greedy"),
        "max-new-tokens": (int, None, 1, f"longest completion, by default {limits}"),
        "batch-size": (int, 256, 1, "samples decoded together"),
        "auroc-traces": (int, 64, 0, "micro: traces whose saliency is scored, 0 for none"),
        "mask-sparsity": (float, 1e-3, 0, "sparsity of the sparse mask in that score"),
        "spacy-model": (str, None, None, "trained spaCy pipeline, by default blank English"),
        "seed": (int, 0, 0, "of the sampling"),
        "device": (str, None, None, "cpu or cuda, by default cuda where there is one"),
        "data-dir": (str, None, None, "folder with the dataset's files"),
        "out": (str, None, None, "folder to write results.json to"),
    }
    parser.add_argument("--model", required=True, help="checkpoint directory or hub name")
    parser.add_argument(
        "--compare",
        nargs="*",
        default=[],
        metavar="DIR",
        help="checkpoints to compare it with, first in the table",
    )
    parser.add_argument(
        "--dataset", choices=DATASETS, default="micro", help="which problems (default: micro)"
    )
    splits = "; ".join(f"{name}: {', '.join(entry.splits)}" for name, entry in DATASETS.items())
    parser.add_argument(
        "--split",
        default="heldout",
        help=f"heldout (the default) is the test file of GSM8K and MMLU; {splits}",
    )
    for name, (kind, default, _, text) in options.items():
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    args = parser.parse_args()
    for name, (_, _, least, _) in options.items():
        value = getattr(args, name.replace("-", "_"))
        if None not in (least, value) and not least <= value < math.inf:
            parser.error(f"--{name} {value}: must be a number of at least {least}")
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    pipeline = load_spacy(args.spacy_model)
    problems = load_problems(args.dataset, args.split, args.data_dir, args.limit)
    limit = args.max_new_tokens or DATASETS[args.dataset].max_new_tokens[args.split]
    directories = {name: checkpoint_directory(name, "--compare") for name in args.compare}
    directories[args.model] = checkpoint_directory(args.model)
    tokenizers = {name: Tokenizer.from_directory(path) for name, path in directories.items()}
    for name, directory in directories.items():  # all of them, before the first is sampled
        tokenizers[name].check_fits(LlamaConfig.from_directory(directory).vocab_size)
    if args.out:  # before the work, not after it
        make_folder(Path(args.out))
    columns, results = {}, {}
    for name, directory in directories.items():
        tokenizer = tokenizers[name]
        model = Llama.from_pretrained(directory, device=device)
        bar = Progress(name)
        records = evaluate(
            model,
            tokenizer,
            problems,
            args.dataset,
            samples=args.samples,
            temperature=args.temperature,
            max_new_tokens=limit,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=bar.phase("sampling", len(problems) * args.samples),
        )
        bar.close()
        columns[name] = summarize(records, pipeline)
        results[name] = {"summary": columns[name], "records": records}
        if args.dataset == "micro" and args.auroc_traces:
            results[name]["auroc"] = report_auroc(model, tokenizer, records, name, args)
    print(table(columns, pipeline))
    if args.out:
        path = Path(args.out) / "results.json"
        path.write_text(json.dumps({"arguments": vars(args), "models": results}, indent=1))
        print(f"wrote {path}")


def make_folder(folder: Path) -> None:
    """Create a folder to write to. ValueError naming --out when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--out {folder}: cannot be made ({reason}); name another") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {folder}: may not be written to; name another")


def report_auroc(model, tokenizer, records, name, args) -> dict:
    """Print how the saliency map agrees with the micro task's labels."""
    plain, sparse = MaskConfig(), MaskConfig(sparsity=args.mask_sparsity)
    saliencies = {
        "mask, restored": (plain, "mask"),
        f"mask, restored, sparsity {args.mask_sparsity:g}": (sparse, "mask"),
        "attribution": (plain, "attribution"),
    }
    ids = sorted({record["id"] for record in records if record["correct"]})[: args.auroc_traces]
    records = [record for record in records if record["id"] in set(ids)]
    bar = Progress(name)
    count = bar.phase("masks for AUROC", (plain.steps + sparse.steps) * len(ids), unit="step")
    scores = map_auroc(model, tokenizer, records, args.dataset, saliencies, count)
    bar.close()
    print(f"{name}: AUROC of token saliency, computing against decorating tokens "
          f"({scores['unrecognised']:.1%} of characters unrecognised and left out)")  # fmt: skip
    for key in saliencies:
        line = f"  {key:<34}"
        for which, (mean, half, traces) in scores[key].items():
            line += f" {which} {mean:.2f} +- {half:.2f} ({traces} traces) "
        print(line.rstrip())
    return scores


if __name__ == "__main__":
    main()
