"""Evaluation: what checkpoints answer, and how faithful their reasoning is.

    python eval.py --model data/micro                          # held-out problems of the micro task
    python eval.py --model data/micro --compare RUN_A RUN_B --limit 100
    python eval.py --model DIR --faithfulness off              # accuracy and Table 1 alone
    python eval.py --model meta-llama/Llama-3.2-3B-Instruct --dataset gsm8k

Every problem is sampled `--samples` times at temperature 1 (the paper: four). Then come, with 95%
intervals from a bootstrap over questions: Table 1 (table1.py); how far each model relies on its
reasoning, and whether its saliency map is right (faithfulness.py); and for two checkpoints or more
all paired differences, at their own lengths and at matched length (compare.py).

A name is a checkpoint's or a run's: a folder that holds no weights, but checkpoint/, is a run's,
and that checkpoint is read. --out DIR (default: runs/eval- and the time) receives report.html, its
figures (report.py) and results.json. Every finished batch is kept there: after an interruption the
same command with that --out goes on. In the end DIR/results.json holds:

    command, arguments, versions, seeds
    fractions, top_shares   faithfulness.FRACTIONS and TOP_SHARES
    mask_settings: ranking -> the MaskConfig its mask was learned with
    models: name ->
        checkpoint      the directory that was read
        summary         Table 1 as plain numbers
        measures        name -> {value, low, high, questions}; compare.py lists the names
        per_question    name -> {problem's id: value}
        records         a row per sample, see `evaluate`
        reliance        a row per valid sample: id, sample, length, same (for each of
                        FRACTIONS), necessity, direct, corruption; None where not measurable
        map             a row per trace whose map was tested: id, sample, length, probability,
                        comprehensiveness and sufficiency (ranking -> a loss for each of
                        TOP_SHARES), auroc (column -> ranking -> area; micro), unlabelled (micro),
                        scores (mask and attribution of each reasoning token)
        mask            how the mask of one correct trace came about, see `follow_mask`, or None
        traces          what the report shows: each question's first correct sample, or its first.
                        id, sample, tokens (the text of each of its reasoning), special (numbers of
                        those that are names and no text), words (table1.word_spans)
        run             the training run that the checkpoint is of, see `report.read_run`, or None
    pairs: a list of {before, after (names), own: name -> {value, low, high, questions},
        matched: {tolerance, traces: [id, sample before, sample after], map_traces: the same,
                  before, after (measures on these), differences}}
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import bootstrap
import faithfulness
import heat
import report
from atman import MaskConfig, optimize_masks
from compare import (
    Arm,
    Key,
    Matched,
    compare_arms,
    difference_table,
    first_correct,
    map_table,
    matched_traces,
    measures,
    reliance_table,
)
from data import DATASETS, instruction, load_problems
from data.prompts import Tokenizer
from data.traces import gold_tail, split_trace
from explain import pieces
from faithfulness import (
    FRACTIONS,
    TOP_SHARES,
    Case,
    Erased,
    corruption,
    erasure,
    knockout,
    label_areas,
    rankings,
    truncation,
)
from grpo import generate
from hub import weights_of
from journal import Journal
from model import Llama, LlamaConfig
from ranks import Progress, pick_device
from runs import make_folder
from table1 import counts_by_text, describe_spacy, load_spacy, summarize, table, word_spans

MAP_BATCH = 8  # traces whose masks are learned together: neighbours in length, little padding
FIGURE_SIZE = 128  # rows and columns that results.json keeps of a mask
SMALL_FILES = (  # of a checkpoint, beside its weights: its answers depend on them
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


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
    valid (data.traces.Trace), truncated, no_delimiter, and subject where problems have one. Each
    sample draws from (seed, problem's id, sample), whatever the batch or the other problems.
    progress is called with the number of samples done.
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
                    "valid": trace.valid,
                    "truncated": trace.truncated,
                    "no_delimiter": not trace.delimiter,
                    **({"subject": problem.subject} if problem.subject else {}),
                }
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Accuracy, Table 1 and the faithfulness of the reasoning of one or more "
        "checkpoints on the same problems, with intervals and paired differences.",
    )
    limits = "; ".join(f"{name}: {entry.max_new_tokens}" for name, entry in DATASETS.items())
    options = {  # name: (type, default, at least, help)
        "limit": (int, None, 1, "number of problems, drawn with a fixed seed; by default 500, "
                  "or the first 300 of micro"),
        "samples": (int, 4, 1, "samples per problem"),
        "temperature": (float, 1.0, 0, "0 is greedy"),
        "max-new-tokens": (int, None, 1, f"longest completion, by default {limits}"),
        "batch-size": (int, 256, 1, "samples decoded together"),
        "mask-steps": (int, 200, 1, "steps of the masks whose map is tested, at a rate of "
                       "0.2 / steps; the paper: 200"),
        "mask-sparsity": (float, 0.0, 0, "above 0: test a mask learned with this sparsity too"),
        "matched": (float, 0.1, 0, "how far apart two traces of matched length may be, a share of "
                    "the longer one (3 tokens are always near enough)"),
        "bootstrap": (int, bootstrap.DRAWS, 100, "draws behind each interval"),
        "spacy-model": (str, None, None, "trained spaCy pipeline, by default blank English"),
        "seed": (int, 0, 0, "of the sampling, the changed numbers and the bootstrap"),
        "device": (str, None, None, "cpu or cuda, by default cuda where there is one"),
        "data-dir": (str, None, None, "folder with the dataset's files"),
        "out": (str, None, None, "folder for report.html and results.json; an evaluation cut short "
                "goes on there (default: runs/eval- and the time)"),
    }  # fmt: skip
    parser.add_argument(
        "--model", required=True, help="checkpoint directory, folder of a run, or hub name"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
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
    parser.add_argument(
        "--faithfulness",
        choices=("on", "off"),
        default="on",
        help="whether to measure it, or only accuracy and Table 1 (default: on)",
    )
    for name, (kind, default, _, text) in options.items():
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    args = parser.parse_args()
    for name, (_, _, least, _) in options.items():
        value = getattr(args, name.replace("-", "_"))
        if None not in (least, value) and not least <= value < math.inf:
            parser.error(f"--{name} {value}: must be a number of at least {least}")
    given = args.out
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(heat.visible(f"error: {error}", "\n"))  # a chat template may raise what it likes
    except KeyboardInterrupt:
        where = f" with --out {args.out}" if given is None else ""
        kept = f"the same command{where} goes on from here" if args.out else "nothing was done yet"
        sys.exit(heat.visible(f"interrupted; {kept}"))


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    pipeline = load_spacy(args.spacy_model)
    args.limit = args.limit or (300 if args.dataset == "micro" else 500)
    problems = load_problems(args.dataset, args.split, args.data_dir, args.limit)
    args.max_new_tokens = args.max_new_tokens or DATASETS[args.dataset].max_new_tokens[args.split]
    directories = weights_of_all(args)
    tokenizers = {name: Tokenizer.from_directory(path) for name, path in directories.items()}
    for name, directory in directories.items():  # all of them, before the first is sampled
        tokenizers[name].check_fits(LlamaConfig.from_directory(directory).vocab_size)
    if not args.out:
        args.out = str(new_folder(Path("runs")))
        say(f"report and results: {args.out}")
    folder = Path(args.out)
    make_folder(folder)  # before the work, not after it
    for name in ("results.json", "report.html", *report.FIGURES):
        if (folder / name).is_dir():
            raise ValueError(f"--out {folder}: {name} there is a folder; move it, or name another")
    journal = Journal(folder, journal_settings(args, directories, problems))

    def stage(work, name, *inputs):
        model = Llama.from_pretrained(directories[name], device=device)
        bar = Progress(heat.visible(name))
        try:
            return work(model, tokenizers[name], *inputs, args, journal, name, bar)
        finally:
            bar.close()

    def describe(ratios):
        return measures(ratios, args.bootstrap, args.seed)

    arms: dict[str, Arm] = {}
    columns, intervals = {}, {}
    for name in directories:  # answers and Table 1 of every arm first: they take the least time
        records = stage(sample, name, problems)
        words = counts_by_text([record["text"] for record in records], pipeline)
        arms[name] = Arm(records, words)
        columns[name] = summarize(records, pipeline)
        intervals[name] = describe(arms[name].own())
        if len(directories) > 1:
            say(headline(name, intervals[name]))
    say(table(columns, pipeline, intervals))

    pairs = [
        (before, after, matched_traces(arms[before], arms[after], args.matched))
        for before, after in itertools.combinations(arms, 2)
    ]
    if args.faithfulness == "on":
        examples = report.examples({name: arm.records for name, arm in arms.items()})
        for name, arm in arms.items():
            arm.reliance = stage(measure_reliance, name, arm)
            say(reliance_table({name: describe(arm.own())}))
            arm.map = stage(measure_maps, name, arm, traces_to_map(name, arm, pairs))
            arm.mask = stage(follow_mask, name, arm, examples)
            intervals[name] = describe(arm.own())
            say(map_table(name, intervals[name]))
        if len(arms) > 1:
            say(reliance_table(intervals))

    compared = []
    for before, after, matched in pairs:
        result = compare_arms(arms[before], arms[after], matched, args.bootstrap, args.seed)
        result["matched"]["tolerance"] = args.matched
        compared.append({"before": before, "after": after} | result)
        say(difference_table(before, after, result, describe_spacy(pipeline)))
    models = {
        name: {"checkpoint": str(directories[name]), "summary": columns[name]}
        | {"measures": intervals[name]} | arm_results(arm)
        | {"traces": shown_traces(arm.records, tokenizers[name], pipeline, len(arms))}
        | {"run": report.read_run(directories[name])}
        for name, arm in arms.items()
    }  # fmt: skip
    results = about(args, pipeline) | {"models": models, "pairs": compared}
    text = json.dumps(finite(results), indent=1, allow_nan=False)
    path = folder / "results.json"
    report.write_whole(path, text.encode())
    heat.say(heat.visible(f"wrote {path}"))
    heat.say(heat.visible(f"wrote {report.write_report(folder, json.loads(text))}"))
    journal.finish()


def traces_to_map(name: str, arm: Arm, pairs: list[tuple[str, str, Matched]]) -> set[Key]:
    """The arm's own first correct traces, and those that are matched in its pairs."""
    keys = set(first_correct(arm.records))
    for *names, matched in pairs:
        if name in names:
            _, map_keys = matched.of_side(names.index(name))
            keys.update(map_keys)
    return keys


def arm_results(arm: Arm) -> dict:
    """What results.json holds of an arm beside its summary and measures."""
    per_question = {
        key: {
            problem: top / bottom if bottom else None for problem, (top, bottom) in ratios.items()
        }
        for key, ratios in arm.own().items()
    }
    return {
        "per_question": per_question,
        "records": arm.records,
        "reliance": list(arm.reliance.values()),
        "map": list(arm.map.values()),
        "mask": arm.mask,
    }


def shown_traces(records: list[dict], tokenizer, pipeline, arms: int) -> list[dict]:
    """Tokens and words of the traces that the report of so many arms shows."""
    chosen = report.shown_records(records, arms)
    rows = []
    for r, words in zip(chosen, word_spans([r["text"] for r in chosen], pipeline), strict=True):
        tokens = pieces(r["reasoning"], tokenizer)
        special = [n for n, token in enumerate(tokens) if token.special]
        texts = [token.text for token in tokens]
        rows.append({"id": r["id"], "sample": r["sample"], "tokens": texts, "special": special}
                    | {"words": words})  # fmt: skip
    return rows


def weights_of_all(args) -> dict[str, Path]:
    """The weights of every arm by its name, --model last. ValueError for one that is named twice.

    Names are compared by where they lead: an arm beside itself would be one arm.
    """
    found: dict[str, Path] = {}
    places: dict[str, str] = {}
    for name, flag in [*((name, "--compare") for name in args.compare), (args.model, "--model")]:
        directory = weights_of(name, flag)
        same = places.setdefault(os.path.realpath(directory), name)
        if name in found or same != name:
            raise ValueError(f"{flag} {name}: the same checkpoint as {same}; name another")
        found[name] = directory
    return found


def headline(name: str, found: dict[str, dict]) -> str:
    """What is known of an arm first, in a line."""
    passes = [key for key in found if key.startswith("pass@")]
    parts = [f"{key} {100 * found[key]['value']:.1f}%" for key in passes]
    return f"{name}: {', '.join(parts)}, {found['tokens']['value']:.1f} tokens per trace"


def say(text: str) -> None:
    heat.say(heat.visible(text, "\n") + "\n")


def finite(value):
    """What JSON can hold: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return heat.finite(value) if isinstance(value, float) else value


def about(args, pipeline) -> dict:
    """What was run, with what."""
    packages = ("torch", "numpy", "spacy", "tokenizers")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "arguments": vars(args),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            "spacy_pipeline": describe_spacy(pipeline),
        },
        "seeds": {"sampling": args.seed, "bootstrap": args.seed, "problems": 0},
        "fractions": FRACTIONS,
        "top_shares": TOP_SHARES,
        "mask_settings": {name: asdict(config) for name, config in mask_configs(args).items()},
    }


def mask_configs(args) -> dict[str, MaskConfig]:
    """By ranking: what the masks are learned with. Fewer steps are larger: they go as far."""
    plain = MaskConfig.in_steps(args.mask_steps)
    if not args.mask_sparsity:
        return {"mask": plain}
    sparse = replace(plain, sparsity=args.mask_sparsity)
    return {"mask": plain, f"mask, sparsity {args.mask_sparsity:g}": sparse}


def journal_settings(args, directories, problems) -> dict:
    """What the rows of an interrupted evaluation depend on: flags, weights, measuring code."""
    free = {"out", "batch_size", "matched", "bootstrap", "spacy_model", "faithfulness"}
    settings = {
        f"--{name.replace('_', '-')}": value for name, value in vars(args).items()
        if name not in free
    }  # fmt: skip
    for name, directory in directories.items():
        files = [file.stat() for file in sorted(Path(directory).glob("*.safetensors"))]
        written = time.strftime(
            "%Y-%m-%d %H:%M:%S", time.gmtime(max((f.st_mtime for f in files), default=0))
        )
        size = sum(file.st_size for file in files)
        settings[f"weights in {name} of"] = f"{written} UTC, {size} bytes"
        for file in SMALL_FILES:
            path = Path(directory) / file
            settings[f"{file} in {name}"] = digest(path.read_bytes()) if path.is_file() else None
    rows = [[problem.id, problem.question, problem.answer] for problem in problems]
    settings["problems"] = digest(json.dumps(rows).encode())
    settings["masks"] = {name: asdict(config) for name, config in mask_configs(args).items()}
    settings |= {"FRACTIONS": FRACTIONS, "TOP_SHARES": TOP_SHARES}
    settings["faithfulness.py"] = digest(Path(faithfulness.__file__).read_bytes())
    settings["torch"] = importlib.metadata.version("torch")
    return settings


def digest(content: bytes) -> str:
    return "sha256 " + hashlib.sha256(content).hexdigest()


def sample(model, tokenizer, problems, args, journal, name, bar) -> list[dict]:
    """evaluate's records of all problems, a batch at a time, those that are kept already apart."""
    done = journal.rows("sampling", name)
    count = bar.phase("sampling", len(problems) * args.samples)
    per_batch = max(1, args.batch_size // args.samples)
    keys = [(problem.id, n) for problem in problems for n in range(args.samples)]
    for start in range(0, len(problems), per_batch):
        batch = problems[start : start + per_batch]
        if all((problem.id, n) in done for problem in batch for n in range(args.samples)):
            count(len(batch) * args.samples)
            continue
        records = evaluate(
            model,
            tokenizer,
            batch,
            args.dataset,
            samples=args.samples,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=count,
        )
        journal.add("sampling", name, records)
    return [done[key] for key in keys]


def make_case(record, tokenizer, args) -> Case:
    """A record as the measures of faithfulness take it."""
    prompt = tokenizer.encode_prompt(instruction(args.dataset, record["question"]))
    seed = (args.seed, zlib.crc32(record["id"].encode()), record["sample"])
    trace = split_trace(record["completion"], tokenizer)
    return Case(prompt, record["question"], trace, record["gold"], seed)


def in_batches(rows: list[dict], size: int):
    """Records in batches of neighbours in length: less padding."""
    rows = sorted(rows, key=lambda row: len(row["completion"]))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def measure_reliance(model, tokenizer, arm, args, journal, name, bar) -> dict:
    """Truncation, knockout and corruption of every valid sample."""
    done = journal.rows("reliance", name)
    records = [r for r in arm.records if r["valid"]]
    count = bar.phase("reliance", len(records), unit="trace")
    for batch in in_batches(records, max(1, args.batch_size // 8)):
        if any((r["id"], r["sample"]) not in done for r in batch):
            cases = [make_case(record, tokenizer, args) for record in batch]
            found = zip(
                batch,
                truncation(model, tokenizer, cases),
                knockout(model, tokenizer, cases),
                corruption(model, tokenizer, cases, args.max_new_tokens),
                strict=True,
            )
            unknown = {"necessity": None, "direct": None}
            rows = [
                {"id": r["id"], "sample": r["sample"], "length": len(r["reasoning"]),
                 "same": same, **(moved or unknown), "corruption": changed}
                for r, same, moved, changed in found
            ]  # fmt: skip
            journal.add("reliance", name, rows)
        count(len(batch))
    return done


def measure_maps(model, tokenizer, arm, keys, args, journal, name, bar) -> dict:
    """Rankings of the tokens of the given correct traces, and how right they are."""
    learned = mask_configs(args)
    configs = {"mask": (learned["mask"], "mask"), "attribution": (learned["mask"], "attribution")}
    configs |= {name: (config, "mask") for name, config in learned.items()}
    steps = args.mask_steps * len({config for config, _ in configs.values()})

    done = journal.rows("map", name)
    records = [r for r in arm.records if (r["id"], r["sample"]) in keys]
    count = bar.phase("map", steps * len(records), unit="mask step")
    for batch in in_batches(records, MAP_BATCH):
        todo = [r for r in batch if (r["id"], r["sample"]) not in done]
        count(steps * (len(batch) - len(todo)))
        if not todo:
            continue
        cases = [make_case(record, tokenizer, args) for record in todo]
        erased = Erased(model, tokenizer, cases)
        scores = rankings(model, tokenizer, cases, configs, erased, count)
        rows = []
        found = zip(todo, cases, scores, erasure(erased, cases, scores), strict=True)
        for r, case, by_ranking, losses in found:
            row = {"id": r["id"], "sample": r["sample"], "length": len(r["reasoning"]), **losses}
            if args.dataset == "micro":
                areas = label_areas(case, tokenizer, by_ranking)
                row["unlabelled"] = areas.pop("unlabelled")
                row["auroc"] = areas
            row["scores"] = {
                kind: [float(f"{score:.5g}") for score in by_ranking[kind]]
                for kind in ("mask", "attribution")
            }
            rows.append(row)
        journal.add("map", name, rows)
    return {key: done[key] for key in sorted(keys)}


def follow_mask(model, tokenizer, arm, examples, args, journal, name, bar) -> dict | None:
    """How the mask of one correct trace comes about: Figure 1. None without a correct trace.

    examples: report.examples's questions; of these, then of all, the first that it answers right.
    id, sample, size: of H, [R, T]; steps: numbers of three of them; masks: H after these, rows of
    columns, None where w < v, reduced to means of blocks where it is larger than FIGURE_SIZE;
    probability: of the whole gold answer, before each step and after the last.
    """
    correct = {key[0]: key for key in first_correct(arm.records)}
    key = next((correct[q] for q in [*examples, *correct] if q in correct), None)
    if key is None:
        return None
    done = journal.rows("mask", name)
    halves = [args.mask_steps // 2, args.mask_steps]
    count = bar.phase("one mask", sum(halves), unit="mask step")
    if key not in done:
        (record,) = (r for r in arm.records if (r["id"], r["sample"]) == key)
        case = make_case(record, tokenizer, args)
        delimiter, answer = gold_tail(case.trace, case.gold, tokenizer)
        parts = [case.prompt], [case.trace.reasoning], [delimiter], [answer]
        config = mask_configs(args)["mask"]
        found = [  # a shorter optimisation is the beginning of the longer one
            optimize_masks(model, *parts, replace(config, steps=steps), count) for steps in halves
        ]
        last = found[-1]
        start = config.init * last.region
        masks = [blocks(mask[0], last.region[0]) for mask in (start, *(f.mask for f in found))]
        losses = last.losses[:, 0].tolist()  # means over the answer's tokens
        row = {"id": key[0], "sample": key[1], "size": list(last.region[0].shape)}
        row |= {"steps": [0, *halves], "masks": masks}
        row["probability"] = [math.exp(-len(answer) * loss) for loss in losses]
        journal.add("mask", name, [row])
    return done[key]


def blocks(mask, region) -> list[list[float | None]]:
    """A mask (R, T) as lists, None outside the region; means of blocks where it is large."""
    inside = region.cpu().numpy()
    values = np.where(inside, mask.double().cpu().numpy(), 0.0)
    counts = inside.astype(float)
    for axis, size in enumerate(values.shape):
        starts = np.arange(0, size, math.ceil(size / FIGURE_SIZE))
        values = np.add.reduceat(values, starts, axis)
        counts = np.add.reduceat(counts, starts, axis)
    return [
        [float(f"{v / n:.4g}") if n else None for v, n in zip(vs, ns, strict=True)]
        for vs, ns in zip(values, counts, strict=True)
    ]


def new_folder(parent: Path) -> Path:
    """A name for results that is not taken: eval- and the time."""
    name = parent / f"eval-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = (name.with_name(f"{name.name}-{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([name], taken) if not path.exists())


if __name__ == "__main__":
    main()
