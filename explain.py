"""One question explained: a trace, its mask, and what was re-enabled. `python atman.py` is this.

    python atman.py --model data/micro --question "Tom has 5 pens. He buys 3 more. How many now?"
    python atman.py --model DIR --question TEXT --reasoning TEXT --answer 8 --html out.html
    python atman.py --model DIR --compare data/micro --questions FILE --json out.json

DIR is the folder of a checkpoint or of a run, or a name on the hub (hub.py).

The trace is sampled, or given. What the mask restores is an answer: `--answer`, the gold one in
Eq. 2's place, or without it the model's own sampled tokens, its EOS apart. Beside the saliency
stand three probabilities of the whole answer, teacher forced: with the reasoning suppressed (every
entry of H at c), restored (after the last step), and unmasked (the plain model).

atman.py learns the mask, heat.py draws it.
"""

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import heat
from atman import MaskConfig, optimize_masks, token_saliency
from data import DATASETS, instruction
from data.prompts import Tokenizer
from data.traces import DELIMITER, Trace, gold_tail, reasoning_spans, split_trace
from grpo import generate
from hub import weights_of
from model import Llama, LlamaConfig
from ranks import Progress, pick_device

SAMPLED_TOGETHER, MASKED_TOGETHER = 64, 8
GOLD, OWN = "the gold answer", "the model's own answer"


@dataclass(frozen=True)
class Request:
    """A question to explain. answer: the gold one, or None. reasoning: given, or None: sample."""

    question: str
    answer: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True)
class Case:
    """A request with its trace: the ids that the mask is learned on, or why it cannot be.

    rest: what was sampled after the answer, or in the gold answer's place.
    """

    request: Request
    prompt: list[int]
    trace: Trace
    delimiter: list[int]
    answer: list[int]
    rest: list[int]
    failure: str


def explain(
    model,
    tokenizer,
    requests: list[Request],
    config: MaskConfig,
    *,
    label="model",
    dataset="micro",
    kind="mask",
    temperature=1.0,
    max_new_tokens=200,
    seed=0,
    bar=None,
) -> list[heat.HeatMap]:
    """A heat map of each request; where no mask can be learned it says why.

    Sampling draws from (seed, the question): a question gives the same trace in any company. bar: a
    Progress to count on.
    """
    bar = bar or Progress(label, silent=True)
    prompts = [tokenizer.encode_prompt(instruction(dataset, r.question)) for r in requests]
    to_sample = [n for n, request in enumerate(requests) if request.reasoning is None]
    progress = bar.phase("sampling", len(to_sample)) if to_sample else None
    completions = {}
    for start in range(0, len(to_sample), SAMPLED_TOGETHER):
        batch = to_sample[start : start + SAMPLED_TOGETHER]
        sampled = generate(
            model,
            [prompts[n] for n in batch],
            max_new_tokens,
            temperature,
            tokenizer.eos_ids,
            [(seed, zlib.crc32(requests[n].question.encode())) for n in batch],
            progress,
        )
        completions |= zip(batch, sampled, strict=True)
    cases = [
        make_case(request, prompt, completions.get(n), tokenizer)
        for n, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
    ]

    learnable = [n for n, case in enumerate(cases) if not case.failure]
    learnable.sort(key=lambda n: len(cases[n].trace.reasoning))  # alike in length: less padding
    progress = bar.phase("masks", config.steps * len(learnable), "step") if learnable else None
    numbers = {}
    for start in range(0, len(learnable), MASKED_TOGETHER):
        batch = learnable[start : start + MASKED_TOGETHER]
        found = measure(model, [cases[n] for n in batch], config, kind, progress)
        numbers |= zip(batch, found, strict=True)
    bar.close()
    nothing = {"saliency": [], "probabilities": {}, "losses": []}
    return [
        heat.HeatMap(
            label=label,
            question=case.request.question,
            kind=kind,
            prompt=pieces(case.prompt, tokenizer),
            reasoning=pieces(case.trace.reasoning, tokenizer),
            delimiter=pieces(case.delimiter, tokenizer),
            answer=pieces(case.answer, tokenizer),
            rest=pieces(case.rest, tokenizer),
            source=OWN if case.request.answer is None else GOLD,
            notes=notes(case),
            failure=case.failure,
            **numbers.get(n, nothing),
        )
        for n, case in enumerate(cases)
    ]


def make_case(request: Request, prompt, completion, tokenizer: Tokenizer) -> Case:
    """Split a trace into what is masked and what is scored. completion: sampled ids, else None."""
    if completion is None:
        text = f"{request.reasoning.strip()}\n{DELIMITER}\n{request.answer.strip()}"
        completion = [*tokenizer.encode(text), tokenizer.eos_ids[0]]
    trace = split_trace(completion, tokenizer)
    delimiter = trace.delimiter
    answer, rest = trace.answer, []
    if not trace.truncated:
        answer, rest = answer[:-1], answer[-1:]
    failure = ""
    if not trace.delimiter:
        why = "it was cut at --max-new-tokens" if trace.truncated else "the model ended without it"
        failure = f"no delimiter {DELIMITER} in the trace: {why}; try another --seed"
    elif not trace.reasoning_text.strip():
        failure = "no reasoning before the delimiter, nothing to mask; try another --seed"
    elif request.answer is not None:
        delimiter, answer = gold_tail(trace, request.answer, tokenizer)
        rest = [] if request.reasoning is not None else trace.answer
    elif not tokenizer.decode(answer).strip():
        failure = "no answer after the delimiter; give the gold one with --answer"
    return Case(request, prompt, trace, delimiter, answer, rest, failure)


def notes(case: Case) -> list[str]:
    """What to know beside the map: where trace and answer come from."""
    gold, trace = case.request.answer, case.trace
    if case.request.reasoning is not None:
        return ["the trace was given, not sampled"]
    said = []
    if gold is not None and trace.delimiter:
        verdict = "right" if trace.correct(gold) else "wrong"
        said.append(f"the model itself answered {trace.parsed(gold) or 'nothing'}: {verdict}")
    if trace.delimiter and trace.truncated:
        said.append("the trace was cut at --max-new-tokens")
    if trace.delimiter_count > 1:
        said.append(f"{trace.delimiter_count} delimiters: the first one splits the trace")
    return said


def measure(model, cases: list[Case], config: MaskConfig, kind, progress=None) -> list[dict]:
    """Learn the masks of one batch: of each case its saliency, probabilities and losses."""
    prompts, delimiters = [c.prompt for c in cases], [c.delimiter for c in cases]
    reasonings, answers = [c.trace.reasoning for c in cases], [c.answer for c in cases]
    result = optimize_masks(model, prompts, reasonings, delimiters, answers, config, progress)
    saliencies = token_saliency(result, config, kind)
    rows = []
    for n, answer in enumerate(answers):
        losses = result.losses[:, n].tolist()  # means over the answer's tokens
        probabilities = {
            "suppressed": math.exp(-losses[0] * len(answer)),  # H = c
            "restored": math.exp(-losses[-1] * len(answer)),
            "unmasked": math.exp(-result.unmasked[n].item() * len(answer)),
        }
        saliency = saliencies[n].tolist()
        rows.append({"saliency": saliency, "probabilities": probabilities, "losses": losses})
    return rows


def pieces(ids: list[int], tokenizer: Tokenizer) -> list[heat.Piece]:
    """Tokens as heat.py takes them. A character belongs to the first of the tokens that spell it.

    A token without bytes is special, and goes by its name.
    """
    text, spans = reasoning_spans(ids, tokenizer)
    return [
        heat.Piece(i, text[start:end], False)
        if tokenizer.token_bytes(i)
        else heat.Piece(i, tokenizer.token_name(i), True)
        for i, (start, end) in zip(ids, spans, strict=True)
    ]


# ------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        explained = run(args)
    except (ValueError, OSError) as error:  # what a user gave: one sentence, no traceback
        sys.exit(heat.visible(f"error: {error}"))  # a chat template may raise what it likes
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if not explained:
        sys.exit("error: no trace could be explained; 'no map' above says why")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show which reasoning tokens have to be attended to for an answer to be likely."
    )
    limits = "; ".join(f"{k}: {v.max_new_tokens['heldout']}" for k, v in DATASETS.items())
    add = parser.add_argument
    add("--model", required=True, help="checkpoint directory, folder of a run, or hub name")
    add("--compare", metavar="MODEL", help="a second checkpoint, shown beside it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--question", help="the question, as a user asks it")
    text = (
        "several: a question a line, or JSON lines with question and, if wanted, answer, reasoning"
    )
    what.add_argument("--questions", metavar="FILE", help=text)
    add("--reasoning", help="the trace to explain, without delimiter (default: sample one)")
    add("--answer", help="the gold answer, a number or a letter (default: the model's own answer)")
    add("--html", metavar="FILE", help="write a page to open in a browser")
    add("--json", metavar="FILE", help="write all numbers")
    text = "whose words ask for the answer (default: micro)"
    add("--dataset", choices=DATASETS, default="micro", help=text)
    text = "how far a token was re-enabled, or the loss that this recovered (default: mask)"
    add("--saliency", choices=("mask", "attribution"), default="mask", help=text)
    add("--device", help="cpu or cuda, by default cuda where there is one")
    options = {  # name: (type, default, at least, help)
        "mask-steps": (int, 200, 1, "optimisation steps per mask, at a rate of 0.2 / steps"),
        "mask-sparsity": (float, 0.0, 0, "what re-enabling costs; 0 is the paper"),
        "seed": (int, 0, 0, "of the sampling"),
        "temperature": (float, 1.0, 0, "of the sampling; 0 is greedy"),
        "max-new-tokens": (int, None, 1, f"longest completion, by default {limits}"),
    }
    for name, (kind, default, _, text) in options.items():
        text += "" if default is None else f" (default: {default})"
        add(f"--{name}", type=kind, default=default, help=text)
    args = parser.parse_args(arguments)
    for name, (_, _, least, _) in options.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name} {value}: must be a number of at least {least}")
    if args.questions is not None and (args.answer, args.reasoning) != (None, None):
        parser.error("--answer and --reasoning go with --question; in --questions FILE they are "
                     'keys of a JSON line: {"question": ..., "answer": ...}')  # fmt: skip
    if args.reasoning is not None and args.answer is None:
        parser.error("--reasoning without --answer: say which answer the reasoning leads to")
    if args.html and args.json and os.path.realpath(args.html) == os.path.realpath(args.json):
        parser.error(f"--json {args.json}: the same file as --html; name another")
    for flag, file in (("html", args.html), ("json", args.json)):
        if file and args.questions and os.path.realpath(file) == os.path.realpath(args.questions):
            parser.error(f"--{flag} {file}: the same file as --questions; name another")
    return args


def run(args: argparse.Namespace) -> bool:
    """Explain and show everything; whether any trace had a map."""
    device = pick_device(args.device)
    requests = read_requests(args)
    directories = {args.model: weights_of(args.model)}
    if args.compare:
        other = weights_of(args.compare, "--compare")
        if os.path.realpath(other) == os.path.realpath(directories[args.model]):
            raise ValueError(
                f"--compare {args.compare}: the same as --model; name another checkpoint"
            )
        directories[args.compare] = other
    tokenizers = {name: Tokenizer.from_directory(path) for name, path in directories.items()}
    for name, directory in directories.items():  # all of them, before the first is sampled
        tokenizers[name].check_fits(LlamaConfig.from_directory(directory).vocab_size)
    for flag in ("html", "json"):
        check_writable(flag, getattr(args, flag))
    config = MaskConfig.in_steps(args.mask_steps, sparsity=args.mask_sparsity)
    limit = args.max_new_tokens or DATASETS[args.dataset].max_new_tokens["heldout"]
    columns = []
    for name, directory in directories.items():
        columns += [
            explain(
                Llama.from_pretrained(directory, device=device),
                tokenizers[name],
                requests,
                config,
                label=name,
                dataset=args.dataset,
                kind=args.saliency,
                temperature=args.temperature,
                max_new_tokens=limit,
                seed=args.seed,
                bar=Progress(heat.visible(name)),
            )
        ]
    questions = [list(heats) for heats in zip(*columns, strict=True)]
    show(questions, args.saliency)
    settings = {
        "model": args.model,
        "compare": args.compare,
        "dataset": args.dataset,
        "saliency": args.saliency,
        "seed": args.seed,
        "temperature": args.temperature,
        "max_new_tokens": limit,
        **{f"mask_{name}": value for name, value in asdict(config).items()},
    }
    if args.html:
        write("html", args.html, heat.page(questions, settings))
    if args.json:
        scale = {"kind": args.saliency, "limit": heat.LIMIT[args.saliency], "levels": heat.LEVELS}
        result = {
            "settings": settings,
            "scale": scale,
            "questions": [[heat.as_dict(one) for one in heats] for heats in questions],
        }
        write("json", args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return any(not one.failure for heats in questions for one in heats)


def show(questions: list[list[heat.HeatMap]], kind: str) -> None:
    """Print to the terminal, with colour where it is one and NO_COLOR (no-color.org) is not set."""
    out = sys.stdout
    colour = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = min(shutil.get_terminal_size((100, 24)).columns, 200)
    text = "\n".join(heat.terminal(heats, width, colour) for heats in questions)
    text += "\n" + heat.legend_line(kind, colour)
    heat.say(text, end="")


def read_requests(args: argparse.Namespace) -> list[Request]:
    """The questions of the command line. ValueError naming the flag, or the file and line."""
    if args.questions is None:
        given = {"question": args.question, "answer": args.answer, "reasoning": args.reasoning}
        return [make_request(given, "--")]
    flag = f"--questions {args.questions}"
    try:
        text = Path(args.questions).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{flag}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{flag}: is not UTF-8 text; save it as UTF-8") from None
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{flag}: holds no question; write one on each line")
    as_json = args.questions.endswith(".jsonl") or lines[0][1].lstrip().startswith("{")
    requests = []
    for n, line in lines:
        place = f"{flag}, line {n}"
        given = {"question": line}
        if as_json:
            try:
                given = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: is not valid JSON ({error})") from None
            if not isinstance(given, dict):
                raise ValueError(f'{place}: needs an object such as {{"question": "..."}}')
        requests.append(make_request(given, f"{place}: "))
    return requests


def make_request(given: dict, place: str) -> Request:
    """Check what was given for one question. place begins the sentence of an error."""
    values = {}
    for name in ("question", "answer", "reasoning"):
        value = given.get(name)
        if type(value) in (int, float) and name == "answer":
            value = str(value)
        if value is None and name != "question":
            continue
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}{name}: needs text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{place}{name}: is not valid text (a lone surrogate)") from None
        values[name] = value.strip()
    request = Request(**values)
    if request.answer is not None:
        if "\n" in request.answer or not request.answer.replace(",", "").strip():
            raise ValueError(f"{place}answer: give a number, a letter or a word alone")
    if request.reasoning is not None:
        if request.answer is None:
            raise ValueError(f"{place}reasoning: needs an answer beside it")
        if DELIMITER in request.reasoning:
            raise ValueError(
                f"{place}reasoning: holds the delimiter {DELIMITER}; give what comes before "
                "it, and the answer by itself"
            )
    return request


def check_writable(flag: str, file: str | None) -> None:
    """ValueError naming the flag where a file cannot be written: before the work, not after it."""
    if file is None:
        return
    target = Path(os.path.realpath(file))
    if target.is_dir():
        raise ValueError(f"--{flag} {file}: is a folder; name a file")
    if not target.parent.is_dir():
        raise ValueError(f"--{flag} {file}: there is no folder {target.parent}; make it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"--{flag} {file}: may not be written to; name another")


def write(flag: str, file: str, text: str) -> None:
    """Write a file, whole or not at all. ValueError naming the flag when it cannot be."""
    target = Path(os.path.realpath(file))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and not target.is_file():  # a device or a pipe
            target.write_text(text, encoding="utf-8")
        else:
            part.write_text(text, encoding="utf-8")
            part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = error.strerror or error
        raise ValueError(f"--{flag} {file}: cannot be written ({reason}); name another") from None
    heat.say(f"wrote {heat.visible(file)}")
