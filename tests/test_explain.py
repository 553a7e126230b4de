"""The command that explains a trace, on the shipped checkpoint with few mask steps."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atman import token_saliency
from data.prompts import Prompting
from data.tokenizer import Tokenizer
from lab.run import sampling
from lab.run.checkpoint import load_llama
from lab.run.command import sentences
from lab.run.suffix import learn_masks
from lab.show import explain, heat, terminal
from lab.show.explain import Request, Settings
from lab.show.page import explained_page
from tests import tiny

ROOT = Path(__file__).parent.parent
QUESTION = "Mia has 12 cards. She buys 2 packs of 6 cards each. How many cards does Mia have now?"
OTHER = "At first, Ben has $15. He buys 2 toys for $2 each. How much money does Ben have now?"
REASONING = "2 * 6 = 12. 12 + 12 = 24."
SMALL = ["--model", ROOT / "data/micro", "--device", "cpu", "--mask-steps", "2"]


@pytest.fixture(scope="module")
def micro():
    directory = ROOT / "data/micro"
    return load_llama(directory), Tokenizer.from_directory(directory)


def in_steps(steps: int, **changes) -> Settings:
    return Settings(model="data/micro", mask_steps=steps, **changes)


def command(capsys, *arguments, small=True) -> str:
    """What the command prints to standard output."""
    explain.main([str(a) for a in [*(SMALL if small else []), *arguments]])
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as refusal:
        explain.main([str(a) for a in arguments])
    assert refusal.value.code not in (0, None)
    printed = capsys.readouterr()
    return printed.out + printed.err + str(refusal.value.code)


def says(monkeypatch, tokenizer, *texts, ended=True):
    """Makes sampling return these texts, in turn."""
    end = [tokenizer.eos_ids[0]] if ended else []
    turns = iter(texts)
    monkeypatch.setattr(
        sampling,
        "generate",
        lambda model, prompts, *_, **__: [[*tokenizer.encode(next(turns)), *end] for _ in prompts],
    )


# ---------------------------------------------------------------------------------------- numbers


def answer_probability(model, context, answer, columns=None, mask=None):
    """Teacher forced, one answer token after the other, each by a full forward pass.

    columns: [first, last) of the reasoning in the sequence; mask (R, T): H, added ten times over.
    """
    probability = 1.0
    for n, token in enumerate(answer):
        tokens = torch.tensor([[*context, *answer[:n]]])
        additive = None
        if mask is not None:
            first, last = columns
            length = tokens.shape[1]
            additive = torch.zeros(1, 1, length, length)
            for row in range(first, length):
                for column in range(first, min(row + 1, last)):
                    additive[0, 0, row, column] = 10 * min(
                        float(mask[row - first, column - first]), 0
                    )
        with torch.no_grad():
            probability *= model(tokens, mask=additive)[0, -1].softmax(-1)[token].item()
    return probability


def test_probabilities_are_products_over_the_answer_by_full_passes(micro):
    model, tokenizer = micro
    settings = in_steps(3)
    (heat_map,) = explain.explain(model, tokenizer, [Request(QUESTION, "24", REASONING)], settings)
    parts = heat_map.prompt, heat_map.reasoning, heat_map.delimiter, heat_map.answer
    parts = prompt, reasoning, delimiter, answer = [[p.id for p in part] for part in parts]
    assert prompt == tokenizer.encode_prompt(QUESTION) and len(answer) == 2
    assert tokenizer.decode(reasoning + delimiter + answer) == f"{REASONING}\n#####\n24"

    context, columns = [*prompt, *reasoning, *delimiter], (len(prompt), len(prompt + reasoning))
    masks = learn_masks(model, [parts], settings.masks())
    start = torch.full_like(masks.H[0], settings.masks().init)
    by_hand = {
        "suppressed": answer_probability(model, context, answer, columns, start),
        "restored": answer_probability(model, context, answer, columns, masks.H[0]),
        "unmasked": answer_probability(model, context, answer),
    }
    assert heat_map.probabilities == pytest.approx(by_hand, rel=1e-4)
    assert len(set(by_hand.values())) == 3  # so that none can pass for another
    assert heat_map.saliency == token_saliency(masks, settings.masks())[0].tolist()
    assert heat_map.losses == masks.losses[:, 0].tolist() and len(heat_map.losses) == 4
    assert math.exp(-2 * heat_map.losses[0]) == pytest.approx(by_hand["suppressed"], rel=1e-4)


def test_attribution_of_sentences_sums_to_the_loss_recovered(micro):
    model, tokenizer = micro
    settings = in_steps(40, saliency="attribution")
    (heat_map,) = explain.explain(model, tokenizer, [Request(QUESTION, "24", REASONING)], settings)
    recovered = heat_map.losses[0] - heat_map.losses[-1]
    sentences, equations = heat.stretches(heat_map).values()
    assert sum(unit.saliency for unit in sentences) == pytest.approx(recovered, rel=0.1)
    assert [unit.text for unit in equations] == ["2 * 6 = 12", "12 + 12 = 24"]


def test_a_question_is_explained_alike_alone_and_in_company(micro):
    model, tokenizer = micro
    requests = [Request(OTHER), Request(QUESTION, "24"), Request(QUESTION, "24", "6 + 6 = 12")]
    settings = in_steps(3, seed=3)
    together = explain.explain(model, tokenizer, requests, settings)
    assert len({len(heat_map.reasoning) for heat_map in together}) == 3
    assert len(together[2].reasoning) < len(together[0].reasoning)  # they are not in rising order
    for request, beside in zip(requests, together, strict=True):
        (alone,) = explain.explain(model, tokenizer, [request], settings)
        assert alone.reasoning == beside.reasoning and alone.answer == beside.answer
        assert alone.saliency == pytest.approx(beside.saliency, abs=1e-4)
        assert alone.probabilities == pytest.approx(beside.probabilities, rel=1e-3)


def test_whose_answer_is_explained(micro, monkeypatch):
    model, tokenizer = micro
    says(monkeypatch, tokenizer, *["1 + 1 = 2.\n#####\n23"] * 2)
    requests = [Request(QUESTION), Request(QUESTION, "1,024")]
    own, gold = explain.explain(model, tokenizer, requests, in_steps(1))
    assert (own.source, gold.source) == ("the model's own answer", "the gold answer")
    assert tokenizer.decode([p.id for p in own.answer]) == "23"
    assert [p.text for p in own.rest] == ["<|end_of_text|>"] and own.rest[0].special
    assert tokenizer.decode([p.id for p in gold.answer]) == "1024"
    assert gold.notes == ["the model itself answered 23: wrong"]
    assert "".join(p.text for p in gold.rest) == "23<|end_of_text|>"


@pytest.mark.parametrize(
    ("text", "ended", "answer", "reason"),
    [
        ("5 + 3 = 8.", True, None, "no delimiter ##### in the trace: it ended without marking an"),
        ("5 + 3 = 8.", False, "8", "it ran into --max-new-tokens; what helps: --shots"),
        ("5 = 5.\n#### 8", True, None, "wrote #### before the answer; what helps: --delimiter"),
        ("", True, "8", "no delimiter"),
        ("#####\n8", True, "8", "no reasoning before the delimiter"),
        (" \n#####\n8", True, None, "no reasoning before the delimiter"),
        ("5 + 3 = 8.\n#####\n", True, None, "no answer after the delimiter"),
        ("5 + 3 = 8.\n##### \n", False, None, "no answer after the delimiter"),
        ("5 + 3 = 8.\n#####\nmany", True, None, "which is a number or a letter from A to D"),
        ("5 + 3 = 8.\n" + 42 * "#####\n", False, None, "no answer after the delimiter"),
    ],
)
def test_a_trace_without_a_mask_says_why_and_the_others_show(
    text, ended, answer, reason, micro, monkeypatch
):
    model, tokenizer = micro
    says(monkeypatch, tokenizer, text, ended=ended)
    requests = [Request(QUESTION, answer), Request(QUESTION, "24", REASONING)]
    bad, good = explain.explain(model, tokenizer, requests, in_steps(1))
    assert reason in bad.failure and bad.saliency == [] and bad.probabilities == {}
    assert good.failure == "" and len(good.saliency) == len(good.reasoning)
    for form in (terminal.draw([bad, good]), explained_page([[bad, good]], {})):
        assert bad.failure[:30] in form
    json.dumps(heat.as_dict(bad), allow_nan=False)


@pytest.mark.parametrize("answer", ["8", "$8.50 or so", "B"])
def test_a_number_or_a_letter_is_an_own_answer(answer, micro, monkeypatch):
    model, tokenizer = micro
    says(monkeypatch, tokenizer, f"5 + 3 = 8.\n#####\n{answer}")
    (heat_map,) = explain.explain(model, tokenizer, [Request(QUESTION)], in_steps(1))
    assert heat_map.failure == "" and heat.text_of(heat_map.answer) == answer


def test_a_cut_trace_with_its_answer_is_explained_and_says_so(micro, monkeypatch):
    model, tokenizer = micro
    says(monkeypatch, tokenizer, "5 ##### So ##### 8", ended=False)
    (heat_map,) = explain.explain(model, tokenizer, [Request(QUESTION)], in_steps(1))
    assert heat_map.failure == "" and len(heat_map.saliency) == len(heat_map.reasoning)
    assert heat_map.notes == [
        "the trace was cut at --max-new-tokens",
        "2 delimiters: the first one splits the trace",
    ]


def test_hostile_reasoning_goes_through_the_model_and_comes_back(micro):
    model, tokenizer = micro
    text = "<script>alert('x')</script> \"\u202e مرحبا 👩‍👩‍👧 \x1b[31m\x00 <|eot_id|>\n5 = 5"
    (heat_map,) = explain.explain(model, tokenizer, [Request(QUESTION, "24", text)], in_steps(1))
    assert heat.text_of(heat_map.reasoning) == text + "\n"
    assert not any(piece.special for piece in heat_map.reasoning)  # what is written stays text
    assert [p.text for p in heat_map.prompt][:2] == ["<|begin_of_text|>", "<|start_header_id|>"]
    assert "\x1b" not in terminal.draw([heat_map])
    assert "<script>" not in explained_page([[heat_map]], {})


def test_a_sampled_special_token_is_named_and_no_part_of_the_text(micro):
    _, tokenizer = micro
    ids = [*tokenizer.encode("a"), tokenizer.bos_id, 10**6, *tokenizer.encode("é👍")]
    pieces = heat.pieces(ids, tokenizer)
    assert [p.text for p in pieces if p.special] == ["<|begin_of_text|>", "<id 1000000>"]
    assert heat.text_of(pieces) == "aé👍" and [p.id for p in pieces] == ids


# -------------------------------------------------------------------------------------- the command


def test_the_command_shows_a_given_trace_and_writes_both_files(tmp_path, capsys):
    page, numbers = tmp_path / "out.html", tmp_path / "out.json"
    page.write_text("old")
    given = ["--question", QUESTION, "--reasoning", REASONING, "--answer", "24"]
    printed = command(capsys, *given, "--html", page, "--json", numbers)
    assert "(the gold answer)" in printed and "given, not sampled" in printed
    assert re.search(r"suppressed \S+%  restored \S+%  unmasked >?\d", printed)
    assert "\x1b" not in printed  # not a terminal
    assert page.read_text().startswith("<!doctype html>") and QUESTION in page.read_text()
    result = json.loads(numbers.read_text())
    assert result["settings"]["mask_steps"] == 2 and result["settings"]["mask_lr"] == 0.1
    assert result["settings"]["seed"] == 0
    assert result["scale"] == {"kind": "mask", "limit": 1.0, "levels": 10}
    trace = result["questions"][0][0]
    assert "".join(t["text"] for t in trace["reasoning"]) == REASONING + "\n"
    assert len(trace["losses"]) == 3 and set(trace["probabilities"]) == {
        "suppressed", "restored", "unmasked",
    }  # fmt: skip
    assert sorted(tmp_path.iterdir()) == [page, numbers]


def test_a_file_of_questions_and_a_second_checkpoint(tmp_path, capsys, micro):
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in (ROOT / "data/micro").iterdir():
        (twin / file.name).symlink_to(file)
    lines = [{"question": OTHER}, {"question": QUESTION, "answer": 24, "reasoning": REASONING}]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    numbers = tmp_path / "out.json"
    printed = command(capsys, "--questions", questions, "--compare", twin, "--json", numbers,
                      "--saliency", "attribution", "--temperature", "0")  # fmt: skip
    assert printed.count("question   ") == 2
    assert printed.count("checkpoint ") == 4 and f"checkpoint {twin}"[:40] in printed
    pairs = json.loads(numbers.read_text())["questions"]
    assert [pair[0]["question"] for pair in pairs] == [OTHER, QUESTION]
    for left, right in pairs:
        assert left["label"] != right["label"] == str(twin)
        assert left["reasoning"] == right["reasoning"]  # the same weights
    plain = tmp_path / "questions.txt"
    plain.write_text(f"{OTHER}\r\n\r\n{OTHER}\r\n")
    assert command(capsys, "--questions", plain).count("question   ") == 2


def test_a_run_is_a_name_too_and_its_checkpoint_is_no_other_model(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint").symlink_to(ROOT / "data/micro")
    (run / "config.json").write_text('{"saliency": "none"}')
    twin = tmp_path / "twin/checkpoint"
    twin.mkdir(parents=True)
    for file in (ROOT / "data/micro").iterdir():
        (twin / file.name).symlink_to(file)
    given = ["--question", QUESTION, "--reasoning", REASONING, "--answer", "24"]
    small = ["--device", "cpu", "--mask-steps", "1"]
    arguments = ["--model", run, *small, *given]
    printed = command(capsys, *arguments, "--compare", twin.parent, small=False)
    assert printed.count("checkpoint ") == 2
    again = refused(capsys, *arguments, "--compare", run / "checkpoint")
    assert f"--model {run}: the same checkpoint as {run / 'checkpoint'}; name another" in again


def test_examples_system_text_and_delimiter_of_the_command(capsys, tmp_path):
    asked = ["--question", QUESTION, "--reasoning", REASONING, "--answer", "24"]
    put = ["--shots", "1", "--system", "Be brief.", "--delimiter", "####"]
    command(capsys, *asked, *put, "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    stated = {name: content["settings"][name] for name in ("shots", "system", "delimiter")}
    assert stated == {"shots": 1, "system": "Be brief.", "delimiter": "####"}
    text, delimiter = (
        "".join(piece["text"] for piece in content["questions"][0][0][part])
        for part in ("prompt", "delimiter")
    )
    assert text.count("<|start_header_id|>") == 5 and "Be brief." in text and QUESTION in text
    assert text.count("\n####\n") == 1 and delimiter.strip() == "####"
    said = refused(capsys, *SMALL, *asked[:2], "--delimiter", " #")
    assert "--delimiter ' #': give one line" in said


def test_the_same_seed_gives_the_same_trace_and_another_another(micro):
    model, tokenizer = micro
    traces = [
        explain.explain(model, tokenizer, [Request(QUESTION)], in_steps(1, seed=seed))[0]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert traces[0] == traces[1]
    assert len({tuple(trace.reasoning) for trace in traces}) > 1
    asked = Prompting("micro").prompt(tokenizer, Request(QUESTION).problem())
    assert [p.id for p in traces[0].prompt] == asked


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": ""}, True),  # no-color.org: present and not empty
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colour_is_for_terminals_without_no_color(
    terminal, environment, coloured, monkeypatch, capsys
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    heat_map = heat.HeatMap("m", "q", "mask", [heat.Piece(1, "x")], [0.5])
    explain.show([[heat_map]], "mask")
    assert ("\x1b[" in capsys.readouterr().out) == coloured


def test_an_output_without_unicode_still_shows(monkeypatch, tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.chdir(tmp_path)
    with sentences():
        explain.show([[heat.HeatMap("é", "→ 👍", "mask", [])]], "mask")
        explain.write("--html", "é.html", "page")
    assert b"\\u2192 \\U0001f44d" in out.buffer.getvalue()
    assert out.buffer.getvalue().endswith(b"\nwrote \\xe9.html\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "nowhere", "--question", "Why?"], "error: --model nowhere"),
        ([*SMALL, "--question", "Why?", "--compare", "nowhere"], "error: --compare nowhere"),
        ([*SMALL, "--question", " "], "error: --question: needs text"),
        ([*SMALL], "give one of --question and --questions"),
        ([*SMALL, "--question", "Why?", "--questions", "file"], "give one of --question and"),
        ([*SMALL, "--questions", "nowhere.txt"], "--questions nowhere.txt: no such file"),
        ([*SMALL, "--questions", "."], "--questions .: is a folder"),
        ([*SMALL, "--questions", "README.md", "--answer", "8"], "go with --question"),
        ([*SMALL, "--question", "Why?", "--reasoning", "So."], "--reasoning: needs an answer"),
        ([*SMALL, "--question", "Why?", "--reasoning", " ", "--answer", "8"], "--reasoning: needs"),
        ([*SMALL, "--question", "Why?", "--answer", ""], "--answer: needs text"),
        ([*SMALL, "--question", "Why?", "--answer", ","], "--answer: give a number"),
        (
            [*SMALL, "--question", "Why?", "--reasoning", "a ##### 8", "--answer", "8"],
            "--reasoning: holds the delimiter",
        ),
        ([*SMALL, "--question", "Why?", "--html", "."], "--html .: name a file"),
        ([*SMALL, "--question", "Why?", "--json", "no/x"], "--json no/x: name a file, in a folder"),
        ([*SMALL, "--question", "Why?", "--json", "x", "--html", "./x"], "--json x: the same file"),
        ([*SMALL, "--question", "Why?", "--compare", ROOT / "data/micro"], "the same checkpoint"),
        (
            [*SMALL, "--question", "Why?", "--compare", f"{ROOT}/data/../data/micro/"],
            "the same checkpoint",
        ),
        ([*SMALL, "--questions", "x", "--json", "./x"], "--json ./x: the same file as --questions"),
        ([*SMALL, "--questions", "x", "--html", "x"], "--html x: the same file as --questions"),
        ([*SMALL, "--question", "Why?", "--mask-steps", "0"], "--mask-steps 0"),
        ([*SMALL, "--question", "Why?", "--temperature", "nan"], "--temperature nan"),
        ([*SMALL, "--question", "Why?", "--seed", "-1"], "--seed -1"),
        ([*SMALL, "--question", "Why?", "--device", "cuda:99"], "--device cuda:99"),
        ([*SMALL, "--question", "Why?", "--saliency", "loud"], "--saliency"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, named, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sampling, "generate", lambda *_: pytest.fail("sampled"))
    monkeypatch.chdir(tmp_path)
    printed = refused(capsys, *arguments)
    assert named in printed and "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "holds no question"),
        (b"\n \n", "holds no question"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b'{"question": "Why?"}\n{"question": \n', "line 2: is not valid JSON"),
        (b'{"question": "Why?"}\nWhy?\n', "line 2: is not valid JSON"),
        (b'\n{"answer": 5}', "line 2: question: needs text"),
        (b'{"question": 5}', "line 1: question: needs text"),
        (b'{"question": "a\\ud800"}', "line 1: question: needs text, of whole characters"),
        (b'{"question": "a", "answer": "\\udfff"}', "line 1: answer: needs text, of whole"),
        (b'["a", "\\udfff"]', "question 2: question: needs text, of whole characters"),
        (b'{"question": "Why?", "answer": true}', "line 1: answer: needs text"),
        (b'{"question": "Why?", "answer": "a\\nb"}', "line 1: answer: give a number"),
        (b'{"question": "Why?", "reasoning": "So"}', "line 1: reasoning: needs an answer"),
        (
            b'{"question": "Why?", "answer": "3 thousand"}',
            "answer: give a number alone or a letter",
        ),
        (b'{"question": "Why?", "answer": "eight"}', "line 1: answer: give a number alone"),
        (b'{"question": "Why?", "answer": "1/2"}', "line 1: answer: give a number alone"),
        (b'{"question": "Why?", "answer": NaN}', "line 1: answer: give a number alone"),
        (b"[]", "holds an array without a question"),
        (b'["Why?", ""]', "question 2: question: needs text"),
        (b'["Why?", 5]', "question 2: needs an object"),
        (b'[{"question": "Why?"}, {"answer": 5}]', "question 2: question: needs text"),
        (b'["Why?", ["Why?"]]', "question 2: needs an object"),
        (b'[\n {"question": "Why?"},\n]', "is not valid JSON"),
        (b'["Why?", ' + b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_bad_line_is_named(content, named, tmp_path, capsys):
    questions = tmp_path / "questions"
    questions.write_bytes(content)
    printed = refused(capsys, *SMALL, "--questions", questions)
    assert f"error: --questions {questions}" in printed and named in printed


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("questions.jsonl", '"Why?"\n', "line 1: needs an object"),
        ("questions.json", '"Why?"\n', "line 1: needs an object"),
        ("questions.json", "5", "line 1: needs an object"),
        ("questions.json", "Why?\nHow?\n", "line 1: is not valid JSON"),
        ("questions.JSON", '[Why?, "How?"]', "line 1: is not valid JSON"),
    ],
)
def test_json_that_holds_no_questions_is_refused(name, content, named, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert f"{name}, {named}" in refused(capsys, *SMALL, "--questions", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "asked"),
    [
        ("a.json", '[\n {\n  "question": "Why?"\n }\n]', [("Why?", None)]),
        ("a.json", '["Why?", {"question": "How?", "answer": 1200.0}]', "two"),
        ("a.json", '\ufeff["Why?",\n{"question": "How?", "answer": "$1,200"}]\n', "two"),
        ("a.json", '{"question": "Why?"}\n\n{"question": "How?", "answer": "1200"}\n', "two"),
        ("a.json", '{\n"question": "Why?",\n"answer": "B"}', [("Why?", "B")]),
        ("a.jsonl", '["Why?", {"question": "How?", "answer": 1200}]', "two"),
        ("a.txt", '["Why?"]', [("Why?", None)]),
        ("a.txt", "[5 points] Why?\n[] How?", [("[5 points] Why?", None), ("[] How?", None)]),
        ("a.txt", '["Tom" is a boy] How many?', [('["Tom" is a boy] How many?', None)]),
        ("a.txt", "5", [("5", None)]),
    ],
)
def test_the_forms_of_a_file_of_questions(name, content, asked, tmp_path):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    requests = explain.read_requests(explain.Settings(model="m", questions=str(file)))
    wanted = [("Why?", None), ("How?", "1200")] if asked == "two" else asked
    assert [(request.question, request.answer) for request in requests] == wanted


def test_nothing_explained_is_an_error_after_the_trace_is_shown(micro, monkeypatch, capsys):
    says(monkeypatch, micro[1], "5 + 3 = 8.")
    printed = refused(capsys, *SMALL, "--question", "Why?")
    assert "no map     no delimiter" in printed and "5 + 3 = 8." in printed
    assert "error: no trace could be explained" in printed


def test_a_failed_write_names_the_flag_and_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(
            ValueError, match=r"^--json .*out.json: .* written \(.*No space.*; name"
        ):
            explain.write("--json", str(target), "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    link = tmp_path / "link"
    link.symlink_to(target)
    explain.write("--json", str(link), "new")
    assert link.is_symlink() and target.read_text() == "new"
    explain.write("--json", os.devnull, "gone")
    assert not Path(os.devnull).is_file()


def test_atman_is_the_command_and_a_refusal_has_no_traceback():
    done = subprocess.run(
        [sys.executable, "atman.py", "--model", "nowhere", "--question", "Why?"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: --model nowhere")
    assert "Traceback" not in done.stderr


def test_a_given_trace_is_split_where_it_was_joined(micro):
    """Reasoning that ends in hashes, or holds six of them, does not move the delimiter."""
    model, tokenizer = micro
    for reasoning in ("So #", "a ###### b", "5 = 5.", "x\n####"):
        request = Request(QUESTION, "-5", reasoning)
        rollout, joined = explain.given_rollout(model, tokenizer, request, Prompting("micro"))
        heat_map = explain.unmeasured(request, rollout, joined, tokenizer, "model", in_steps(1))
        assert heat_map.failure == "" and heat.text_of(heat_map.answer) == "-5"
        assert "".join(
            map(heat.text_of, (heat_map.reasoning, heat_map.delimiter, heat_map.answer))
        ) == (f"{reasoning}\n#####\n-5")
        assert rollout.trace.reasoning == [piece.id for piece in heat_map.reasoning]


def test_a_given_trace_is_joined_as_the_model_would_write_it(micro):
    """A shipped model that writes its answer on the next line, and one made to write it beside."""
    model, tokenizer = micro
    request, prompting = Request(QUESTION, "24", REASONING), Prompting("micro")
    next_line, beside = (tokenizer.encode(f"{REASONING}\n#####{gap}24") for gap in "\n ")
    shared = next(n for n, (a, b) in enumerate(zip(next_line, beside, strict=False)) if a != b)
    size = tokenizer.vocab_size
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    table[beside[shared - 1 : -1], beside[shared:]] += 9
    for chooser, *ranked in (
        (model, next_line, beside),
        (tiny.bigram(table.tolist()), beside, next_line),
    ):
        rollout, joined = explain.given_rollout(chooser, tokenizer, request, prompting)
        assert rollout.completion == [*ranked[0], tokenizer.eos_ids[0]]
        assert rollout.trace.reasoning == ranked[0][:shared]
        start = rollout.prompt + ranked[0][:shared]
        chances = [answer_probability(chooser, start, ids[shared:]) for ids in ranked]
        assert chances[0] > 2 * chances[1]
        taken, left = (tokenizer.decode(ids)[len(REASONING) :] for ids in ranked)
        shown = " against ".join(map(heat.probability, chances))
        assert joined == f"joined as {taken!r}, likelier than {left!r} for this model: {shown}"


def test_overshoot_is_shown_counted_and_can_be_stopped(tmp_path, capsys):
    """A wrong gold answer is likelier with the reasoning suppressed: that mask stops at c."""
    numbers, page, questions = (tmp_path / name for name in ("out.json", "out.html", "in.jsonl"))
    lines = [{"question": QUESTION, "answer": n, "reasoning": REASONING} for n in (7, 24)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    overshoots = []
    for more in ([], ["--stop-at-unmasked"]):
        files = "--questions", questions, "--json", numbers, "--html", page
        printed = command(capsys, *files, "--mask-steps", "20", *more)
        read = json.loads(numbers.read_text())
        (wrong,), (right,) = read["questions"]
        unmasked = -math.log(wrong["probabilities"]["unmasked"]) / len(wrong["answer"])
        assert wrong["overshoot"] == pytest.approx(unmasked - wrong["losses"][-1], rel=1e-3)
        assert right["overshoot"] == 0 and (read["masks"], read["overshot"]) == (2, 1)
        shown = f"{wrong['overshoot']:.3g} nats"
        assert printed.count(f"overshoot  {shown} below the unmasked loss") == 1
        assert f"\novershoot: 1 of 2 masks ended below the unmasked loss, by {shown} " in printed
        assert page.read_text().count(f"<p>overshoot: {shown} below the unmasked loss</p>") == 1
        assert read["settings"]["mask_stop_at_unmasked"] == bool(more)
        overshoots.append(wrong["overshoot"])
    assert overshoots[0] > overshoots[1] > 0 and set(wrong["losses"]) == {wrong["losses"][0]}


def test_precision_is_the_weights_format_and_float32_on_a_cpu(tmp_path, capsys, monkeypatch):
    loaded, load = [], explain.load_llama

    def loading(*arguments):
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(explain, "load_llama", loading)
    traces = []
    for more in ([], ["--precision", "float32"], ["--precision", "bfloat16"]):
        given = ["--question", QUESTION, "--reasoning", REASONING, "--answer", "24"]
        command(capsys, *given, "--json", tmp_path / "out.json", *more)
        read = json.loads((tmp_path / "out.json").read_text())
        traces.append(read["questions"][0][0])
        stated = more[-1] if more else "float32"
        assert read["settings"]["precision"] == stated
        assert loaded[-1].embed_tokens.weight.dtype == getattr(torch, stated)
    assert traces[0] == traces[1] != traces[2]
    assert traces[0]["losses"][0] == pytest.approx(traces[2]["losses"][0], rel=0.1)


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "run", interrupt)
    with pytest.raises(SystemExit) as end:
        explain.main([str(a) for a in [*SMALL, "--question", "Why?"]])
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"
