"""The report: hostile text anywhere, numbers that are results.json's, figures, what is missing."""

import io
import json
import os
import re
import sys
import warnings

import matplotlib
import pytest

from lab.measure.compare import Arm, compare_arms, matched_traces, measures
from lab.measure.faithfulness import FRACTIONS
from lab.measure.table1 import load_spacy, word_spans
from lab.show import figures, report
from lab.show.tables import CHANGES, RELIANCE, ROWS, main_changes
from lab.show.text import JOINERS, visible
from tests.test_heat import HOSTILE, acts
from tests.test_page import SHADES, Reader

ELEMENTS = set(
    "html head meta title style body section nav article a h1 h2 h3 h4 p pre i bdi small "
    "span div details summary table thead tbody tr th td picture source img".split()
)
ATTRIBUTES = set("class title dir lang charset http-equiv content name id href src srcset media "
                 "alt scope tabindex".split())  # fmt: skip
RANKINGS = ("mask", "attribution", "random")
PNG = b"\x89PNG\r\n\x1a\n"
RUN = {
    "folder": "runs/a",
    "config": {"saliency": "mask", "saliency_weight": 0.5, "gate_saliency": True, "steps": None},
    "evals": [[0, 0.5, 60.0, 300], [2, 0.6, 50.0, 64], [4, 0.75, 40.0, 300]],
    "updates": [[n, -0.5 + n / 10, 60.0 - n] for n in range(1, 5)],
}


def one_arm(seed, text, problems=4, correct=True, label="NUM"):
    """An arm with two samples a question; correct: the first one is right."""
    half = len(text) // 2
    tokens = [text[n : n + 3] for n in range(0, len(text), 3)] if len(text) < 5000 else [text]
    records, traces = [], []
    for n in range(problems):
        for sample in range(2):
            right = correct and sample == 0
            records.append({
                "id": f"q{n}", "question": text[:500] or "?", "gold": "4", "sample": sample,
                "text": text, "reasoning": list(range(len(tokens) + n + seed)),
                "number": "4" if right else None, "correct": right, "valid": right,
                "truncated": not right, "no_delimiter": False,
            })  # fmt: skip
        words = [[0, half, "number", label], [half, len(text), label, label]] * bool(text)
        traces.append({"id": f"q{n}", "sample": 0, "tokens": tokens, "special": [0] * (n == 1),
                       "words": words})  # fmt: skip
    words = [{"tokens": 5 + n, "numbers": 2, "stop_words": seed, "symbols": 1} for n in
             range(len(records))]  # fmt: skip
    arm = Arm(records, words)
    for r in records * correct:
        key = (r["id"], r["sample"])
        if not r["valid"]:
            continue
        n = int(r["id"][1:])
        arm.reliance[key] = {"id": r["id"], "sample": 0, "length": 9, "same": [n > 2] * 3
                             + [seed > 0, True, True], "necessity": 0.1 * n + seed / 7,
                             "direct": 0.01 * n, "corruption": n % 2 == 0}  # fmt: skip
        losses = {name: [(n + k + place) / 13 for k in range(5)]
                  for place, name in enumerate(RANKINGS)}  # fmt: skip
        arm.maps[key] = {
            "id": r["id"], "sample": 0, "length": len(tokens), "probability": 0.9,
            "comprehensiveness": losses, "sufficiency": losses, "unlabelled": [n, 50],
            "overshoot": max(0, n - 1) / 4,
            "auroc": {"all tokens": {name: 0.2 * n for name in RANKINGS}, "no punctuation": {}},
            "scores": {k: [(-1) ** i / (i + 1) for i in range(len(tokens))]
                       for k in ("mask", "attribution")},
        }  # fmt: skip
    steps = [0, 2, 4]
    masks = [[[-0.4 + k * n / 20 if v <= n else None for v in range(3)] for n in range(4)]
             for k in steps]  # fmt: skip
    if correct:
        arm.mask = {"id": "q0", "sample": 0, "size": [4, 3], "steps": steps, "masks": masks,
                    "probability": [0.1, 0.2, 0.4, 0.7, 0.9]}  # fmt: skip
    return arm, traces


def results(names=("a/run", "b"), text="So 2 + 2 = 4.\n", other="no", runs=(RUN, None), **options):
    """What eval.py would write; other: what stands in the places beside traces and names."""
    arms, models = {}, {}
    for n, (name, run) in enumerate(zip(names, runs, strict=False)):
        arms[name], traces = one_arm(n, text, **options)
        own = arms[name].own()
        models[name] = {
            "checkpoint": other, "summary": arms[name].summary(),
            "measures": measures(own, 50, 0), **arms[name].results(), "traces": traces, "run": run,
        }  # fmt: skip
    pairs = []
    if len(arms) == 2:
        one, two = arms.values()
        found = compare_arms(one, two, matched_traces(one, two, 0.1), 50, 0)
        pairs.append({"before": names[0], "after": names[1]} | found)
    about = {"command": other, "arguments": {"dataset": other, "split": other, "out": other},
             "versions": {"spacy_pipeline": other}, "seeds": {"sampling": 0}}  # fmt: skip
    return json.loads(json.dumps(about | {"models": models, "pairs": pairs}))


class Page(Reader):
    """Tables by the heading before them: rows of [label, cells ...]."""

    def __init__(self, page):
        self.tables, self.heading = {}, ""
        super().__init__(page)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if tag in ("img", "source"):
            self.open.pop()

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        text = self.texts[-1][2]
        if tag in ("h2", "h3", "h4"):
            self.heading = text
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("th", "td"):
            self.tables.setdefault(self.heading, [])
            self.row = [*getattr(self, "row", []), text]
        if tag == "tr":
            self.tables[self.heading][-1], self.row = self.row, []


def numbers(text):
    return [float(found) for found in re.findall(r"[-+]?\d+\.?\d*", text)]


def expect(text, found, scale=1.0, digits=3):
    """A cell holds value, low and high, rounded."""
    if not found or found["value"] is None:
        assert text == "-"
        return
    values = [found[key] * scale for key in ("value", "low", "high") if found[key] is not None]
    assert numbers(text) == pytest.approx(values, abs=0.51 * 10**-digits)


# ----------------------------------------------------------------------------------- untrusted text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_anywhere_adds_no_element_or_attribute(text):
    run = RUN | {"folder": text, "config": {text: text, "saliency": text}}
    names = (text[:1000] or "a", (text[:50] or "a") + "2")
    found = results(names, text, text[:1000], (run, RUN), problems=2, label=text)
    page = report.page(found, {1: (PNG, PNG), 2: (PNG, PNG)})
    page.encode()
    reader = Page(page)
    assert reader.elements <= ELEMENTS
    assert {name for name, _ in reader.attributes} <= ATTRIBUTES
    assert not any(map(acts, set(page) - set("\n" + JOINERS)))
    assert reader.classes() <= SHADES | {
        "wn", "ws", "wy", "wp", "text", "side", "scale", "say", "sp", "v", "part", "scroll",
        "long", "four", "key",
    }  # fmt: skip
    assert reader.values("href") == {f"#{name}" for name in reader.values("id")}
    assert all(value.startswith("data:image/png;base64,") for value in
               reader.values("src") | reader.values("srcset"))  # fmt: skip
    expected = visible(text, JOINERS) or "(none)"
    assert any(box.rstrip("\n") == expected.rstrip("\n") for box in reader.of("div", "text"))


def test_figures_draw_hostile_text_without_reading_it(tmp_path):
    text = "$x_1^{2 \\frac{ $ " + "\n".join(HOSTILE.values())[:3000] + HOSTILE["long"]
    names = ("_" + text[:90], "$\\alpha_{$")
    found = results(names, text, text, (RUN, RUN), problems=1)
    found["models"][names[1]]["mask"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write_report(tmp_path, found)
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert figures.drawable("a\x1b日ب\u202e") == "a‹U+001B›‹U+65E5›‹U+0628›‹U+202E›"
    assert figures.short("/a/long/path/" * 9 + "end", 20) == "/a/l…a/long/path/end"


# ------------------------------------------------------------------------------------------ numbers


def test_every_number_of_the_tables_is_that_of_the_results():
    found = results()
    page = Page(report.page(found, {}))
    models = list(found["models"].values())
    rows = {row[0]: row[1:] for row in page.tables["Table 1"]}
    for key, (label, share) in ROWS.items():
        if key in models[0]["summary"]:
            for text, entry in zip(rows.pop(label.strip()), models, strict=True):
                scale, interval = 100 if share else 1, entry["measures"][key]
                assert numbers(text)[0] == pytest.approx(scale * entry["summary"][key], abs=0.051)
                ends = [scale * interval["low"], scale * interval["high"]]
                assert numbers(text)[1:] == pytest.approx(ends, abs=0.051)
    assert rows == {"": ["1. a/run (AtManRL)", "2. b"]}

    rows = {row[0]: row[1:] for row in page.tables["Does the model rely on its reasoning?"]}
    keys = RELIANCE | {f"same answer at {f:.0%}": f"same answer at {f:.0%} of it"
                       for f in FRACTIONS[:-1]}  # fmt: skip
    for key, label in keys.items():
        for text, entry in zip(rows.pop(label), models, strict=True):
            expect(text, entry["measures"][key])
    assert list(rows) == [""]

    for n, entry in enumerate(models):
        title = f"is the map right? {['1. a/run (AtManRL)', '2. b'][n]}, 4 traces"
        head, *body = page.tables[title]
        assert head[1:] == ["comprehensiveness (up)", "sufficiency (down)", "AUROC"]
        assert [row[0] for row in body] == list(RANKINGS)
        for ranking, *cells in body:
            for test, text in zip(
                ("comprehensiveness", "sufficiency", "auroc"), cells, strict=True
            ):
                expect(text, entry["measures"][f"{test}/{ranking}"])

    note = "overshoot: 2 of 4 masks ended below the unmasked loss, by 0.375 nats per answer token"
    assert section(report.page(found, {}), "map").count(note) == 2

    (pair,) = found["pairs"]
    labels = {label.strip(): key for key, (label, _) in ROWS.items()}
    labels |= {label: key for key, label in RELIANCE.items()}
    assert "symbols by spaCy, no." in section(report.page(found, {}), "differences")
    body = page.tables["2. b less 1. a/run (AtManRL)"][1:]
    assert len(body) >= 15
    for label, own, matched, questions in body:
        key = labels.get(label) or label.removeprefix("map: ").replace(", ", "/")
        expect(own, pair["own"][key])
        other = pair["matched"]["differences"].get(key)
        expect(matched, other)
        assert questions == (str(other["questions"]) if other else "-")

    figure = Page(report.page(found, {1: (PNG, PNG)})).tables["Figure 1: a mask comes about"]
    assert figure[1] == ["1. a/run (AtManRL)", "10.0%", "40.0%", "90.0%", "q0, sample 0"]


def test_words_have_one_kind_each():
    (words,) = word_spans(["So two cats = $5.\n"], load_spacy(None))
    assert words == [
        [0, 2, "stop word", ""], [3, 6, "number", ""], [7, 11, "other", ""], [12, 13, "symbol", ""],
        [14, 15, "symbol", ""], [15, 16, "number", ""], [16, 17, "punctuation", ""],
    ]  # fmt: skip


# ------------------------------------------------------------------------------- which traces, runs


def test_examples_are_the_first_that_all_arms_answer_and_write_differently():
    def row(problem, text, correct, sample=0):
        return {"id": problem, "sample": sample, "text": text, "correct": correct}

    one = [row("wrong", "a", False), row("same", "a", True), row("late", "a", False),
           row("late", "b", True, 1), row("half", "a", True), row("good", "a", True)]  # fmt: skip
    two = [row("wrong", "b", False), row("same", "a", True), row("late", "a", True),
           row("half", "b", False), row("good", "b", True)]  # fmt: skip
    assert report.examples({"one": one, "two": two}) == ["late", "good", "same"]
    assert report.examples({"one": one}) == ["same", "late", "half"]
    assert report.examples({}) == []
    assert [r["sample"] for r in report.shown_records(one, 1)] == [0, 0, 1, 0, 0]
    assert len(report.shown_records([row(f"q{n}", "", True) for n in range(700)], 2)) == 250


def test_a_metrics_file_of_another_program_costs_no_report(tmp_path):
    checkpoint = tmp_path / "run/checkpoint"
    checkpoint.mkdir(parents=True)
    lines = [
        3,
        {"step": 1, "eval": 0.5},
        {"step": 2, "eval": {"loss": 1}},
        {"step": 3, "outcome": 1},
    ]
    lines += [{"step": 4, "outcome": -0.5, "length": 7}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (checkpoint.parent / "metrics.jsonl").write_text(text)
    (checkpoint.parent / "config.json").write_text("[1]")
    run = report.read_run(checkpoint)
    assert run["updates"] == [[4, -0.5, 7]] and run["evals"] == [] and run["config"] == {}


def test_a_run_is_read_from_beside_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "run/checkpoint"
    checkpoint.mkdir(parents=True)
    assert report.read_run(checkpoint) is None and report.read_run(tmp_path / "none") is None
    lines = [{"step": 0, "eval": {"pass@1": 0.5, "tokens": 60, "problems": 300}},
             {"step": 1, "eval": {"pass@1": 0.25, "tokens": 50}},
             {"step": 1, "outcome": -0.5, "length": 50.0, "other": None},
             {"step": 1, "outcome": -0.25, "length": 40.0}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "outc'
    (tmp_path / "run/metrics.jsonl").write_text(text)
    (tmp_path / "run/config.json").write_text('{"saliency": "none"}')
    run = report.read_run(checkpoint)
    assert run["evals"] == [[0, 0.5, 60, 300], [1, 0.25, 50]]
    assert run["updates"] == [[1, -0.25, 40.0]]
    assert run["folder"] == str(tmp_path / "run")
    for config, role, words in (
        (run["config"], "baseline", "baseline: trained with the outcome reward only"),
        (RUN["config"], "AtManRL", "mask saliency, weight 0.5"),
        (
            {"saliency": "none", "length_penalty": 0.5},
            "control",
            "outcome, a length penalty of 0.5",
        ),
        ({"saliency": "cir", "length_penalty": 0.5}, "AtManRL", "weight None, a length penalty of"),
        ({"saliency": "attribution", "shuffle_saliency": True}, "control", "shuffled attribution"),
        ({}, "", "names no saliency"),
    ):
        found, text = report.what_it_is({"config": config})
        assert found == role and words in text
    assert "no training run" in report.what_it_is(None)[1]
    assert run["commands"] == []
    typed = "python train.py --out a\npython train.py --resume a\n"
    (tmp_path / "run/commands.txt").write_text(typed)
    deeper = tmp_path / "run/checkpoints/step-00000002"
    deeper.mkdir(parents=True)
    for folder in (checkpoint, deeper):
        found = report.read_run(folder)
        assert found["commands"] == typed.splitlines()
        assert found["evals"] == run["evals"]


def section(page, name):
    """One part of the page as HTML, its white space single."""
    part = page.split(f'<section class="part" id="{name}">')[1].split('<section class="part"')[0]
    return " ".join(part.split())


def drawn(run, monkeypatch):
    """Lines of Figure 2's accuracies, rollouts apart: (updates, line style, marker's face)."""
    saved = []
    monkeypatch.setattr(figures, "as_png", lambda figure, dpi: saved.append(figure))
    figures.draw_history({"a": run | {"updates": []}}, True)
    return [(list(line.get_xdata()), line.get_linestyle(), line.get_markerfacecolor())
            for line in saved[0].axes[0].get_lines()]  # fmt: skip


def test_evaluations_of_fewer_problems_are_left_out(monkeypatch):
    ((joined, style, _),) = drawn(RUN, monkeypatch)
    assert (joined, style) == ([0, 4], "-")


@pytest.mark.parametrize("sizes", [[], [300]], ids=["an older results.json", "one size"])
def test_evaluations_of_as_many_problems_are_joined(sizes, monkeypatch):
    run = RUN | {"evals": [[*row[:3], *sizes] for row in RUN["evals"]]}
    ((joined, style, _),) = drawn(run, monkeypatch)
    assert (joined, style) == ([0, 2, 4], "-")


def measure(value, low, high):
    return {"value": value, "low": low, "high": high, "questions": 4}


def test_what_changed_is_no_stronger_than_its_intervals():
    own = {
        "pass@1": measure(0.004, -0.01, 0.02), "tokens": measure(-12.0, -13.25, -11.0),
        "computing": measure(0.3125, 0.25, 0.375), "necessity": measure(0.1, 0.1, 0.1),
        "corruption": measure(0.25, 0.0, 0.5),
    }  # fmt: skip
    assert main_changes({"own": own}) == (
        "computing share higher, +31.2 points [+25.0, +37.5]; "
        "accuracy not distinguishable, +0.4 points [-1.0, +2.0]; "
        "tokens per trace lower, -12.0 [-13.2, -11.0]; "
        "corruption not distinguishable, +25.0 points [+0.0, +50.0]"  # 0 is within
    )
    own = {"pass@1": measure(0.5, None, None), "corruption": measure(None, None, None)}
    assert main_changes({"own": own}) == "accuracy not distinguishable, +50.0 points"


def three_pairs():
    found = results()
    (pair,) = found["pairs"]
    pair["own"]["computing"] = measure(0.3, 0.2, 0.4)
    found["models"] |= {"c": found["models"]["b"], "d": found["models"]["b"]}
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]  # as eval.py has them of four arms
    names = list(found["models"])
    found["pairs"] = [pair | {"before": names[a], "after": names[b]} for a, b in pairs]
    return found


def test_the_page_opens_with_what_changed_against_the_first_arm():
    found = three_pairs()
    page = report.page(found, {0: (PNG, PNG)})
    first = page.split('<section class="part" id="')[1]
    assert first.startswith("changes") and first.count("computing share higher, +30.0 points") == 3
    for after in ("2. b", "3. c", "4. d"):
        line = f"<p><bdi>{after}</bdi> less <bdi>1. a/run (AtManRL)</bdi>:"
        assert line in first
    assert first.count("<picture>") == 1 and first.count("<p><bdi>") == 3
    assert 'href="#changes"' in page
    assert "What changed" not in report.page(results(("a",), runs=(None,)), {})


def test_a_forest_plot_has_a_panel_for_each_pair_and_a_line_for_each_interval(monkeypatch):
    saved = []
    monkeypatch.setattr(figures, "as_png", lambda figure, dpi: saved.append(figure) or PNG)
    found = three_pairs()
    own = found["pairs"][0]["own"]
    report.draw(found | {"models": {n: m | {"mask": None, "run": None, "traces": []}
                                    for n, m in found["models"].items()}})  # fmt: skip
    panels = saved[0].subfigs
    assert [panel.get_suptitle() for panel in panels] == [
        f"{after} less 1. a/run" for after in ("2. b", "3. c", "4. d")
    ]
    shares, tokens = panels[0].axes
    shown = [key for key in CHANGES if key in own and key != "tokens"]
    assert [text.get_text() for text in shares.get_yticklabels()] == [CHANGES[k] for k in shown]
    assert shown[0] == "computing" and shown[1] == "pass@1" and len(shown) >= 5
    lines = {(tuple(line.get_xdata()), round(line.get_ydata()[0])) for line in shares.get_lines()
             if len(line.get_xdata()) == 2}  # fmt: skip
    for row, key in enumerate(shown, 1):
        assert ((own[key]["low"], own[key]["high"]), row) in lines
    points = [line for line in shares.get_lines() if list(line.get_xdata()) == [0.3]]
    assert [line.get_markerfacecolor() for line in points] == [figures.ARM_COLOURS[0]]
    hollow = [line for line in shares.get_lines() if line.get_markerfacecolor() == "white"]
    assert {line.get_xdata()[0] for line in hollow} == {0}  # both arms are right as often
    assert [text.get_text() for text in tokens.get_yticklabels()] == ["tokens per trace"]


def test_learning_curves_show_the_computing_share_where_there_is_one(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(figures, "as_png", lambda figure, dpi: saved.append(figure) or PNG)
    share = {"computing": 0.25}
    for evaluated, updated in (({}, {}), ({}, {"computing": None}), (share, share)):
        history = [
            {"step": 0, "eval": {"pass@1": 0.5, "pass@4": 0.75, "tokens": 60} | evaluated},
            {"step": 1, "length": 5.0, "outcome": -0.5, "saliency": 0, "reward": 0.0} | updated,
        ]
        figures.curves(history, tmp_path / "curves.png")
    labels = [[line.get_label() for line in figure.axes[0].get_lines()] for figure in saved]
    plain = ["accuracy (pass@1)", "pass@4"]
    assert labels[:2] == [plain, plain]
    assert labels[2] == [*plain, "computing share", "computing share, rollouts"]
    assert [list(line.get_ydata()) for line in saved[2].axes[0].get_lines()[2:]] == [[0.25]] * 2


def test_learning_curves_look_the_same_whatever_a_user_prefers(tmp_path):
    history = [{"step": n, "eval": {"pass@1": n / 4, "pass@4": n / 3, "tokens": 60 - n}}
               for n in (0, 2)]  # fmt: skip
    history.insert(1, {"step": 1, "length": 5.0, "outcome": -0.5, "saliency": 0.1, "reward": 0.0})
    files = tmp_path / "one.png", tmp_path / "two.png"
    figures.curves(history, files[0])
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "savefig.dpi": 30}):
        figures.curves(history, files[1])
        assert matplotlib.rcParams["font.size"] == 30  # the user's own are back
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().startswith(PNG)


# ------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("report"), results(problems=3)
    for entry in found["models"].values():  # numbers that were not finite
        entry["map"][0]["scores"]["mask"][0] = entry["mask"]["probability"][2] = None
    (folder / "results.json").write_text(json.dumps(found))
    report.main([str(folder)])
    return folder


def test_the_page_is_whole_in_itself_and_its_figures_lie_beside_it(written):
    names = {path.name for path in written.iterdir()}
    pngs = {"differences.png", *(f"figure{n}.png" for n in range(1, 6))}
    assert names == {"report.html", "results.json"} | pngs
    for path in written.glob("*.png"):
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 3000
    page = (written / "report.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'" in page
    assert "://" not in page and "url(" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 6
    for part in ("width=device-width", "prefers-color-scheme: dark", "content-visibility: auto",
                 "Figure 3: q0", "Figure 5: q2", "No training history", "2. b"):  # fmt: skip
        assert part in page


def test_the_same_results_give_the_same_bytes(tmp_path, capsys):
    found = results(("a",), runs=(None,), problems=1)
    found["models"]["a"]["mask"] = None
    (tmp_path / "results.json").write_text(json.dumps(found))
    report.main([str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.html'}\n"
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in files} == {"figure3.png", "report.html", "results.json"}
    report.write_report(tmp_path, found)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_an_output_without_unicode_is_told_what_was_written(tmp_path, monkeypatch):
    folder = tmp_path / "é"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results(())))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    report.main([str(folder)])
    assert out.buffer.getvalue().endswith(b"/\\xe9/report.html\n")


def test_figures_of_other_results_do_not_stay(tmp_path):
    for name in ("differences.png", "figure1.png", "figure2.png", "figure5.png"):
        (tmp_path / name).write_bytes(PNG)
    found = results(("a",), runs=(None,), problems=1, correct=False)
    report.write_report(tmp_path, found)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "figure3.png"}


def test_what_is_missing_is_said():
    alone = report.page(results(("a",), runs=(None,)), {})
    assert "One arm alone" in alone and "No training history" in alone
    wrong = report.page(results(("a",), correct=False, runs=(RUN,)), {})
    assert "No mask: " in wrong and "Not measured" in wrong and "only correct traces" in wrong
    assert "answers nothing: wrong, cut at the limit" in wrong
    nothing = report.page(results(()), {})
    assert "No trace to show." in nothing and Page(nothing).elements <= ELEMENTS
    plain = results()
    for entry in plain["models"].values():  # as --faithfulness off leaves it, or an older eval.py
        entry |= {"reliance": [], "map": [], "measures": {}}
        for key in ("mask", "run", "traces"):
            del entry[key]
    assert "No trace to show." in report.page(plain, report.draw(plain))


@pytest.mark.parametrize("key", RELIANCE)
def test_one_measure_of_reliance_is_shown_without_the_others_and_a_map(key):
    found = results(("a",))
    (entry,) = found["models"].values()
    entry |= {"map": [], "measures": {key: entry["measures"][key]}}
    page = report.page(found, {})
    assert "Not measured" not in page
    rows = {row[0]: row[1] for row in Page(page).tables["Does the model rely on its reasoning?"]}
    expect(rows[RELIANCE[key]], entry["measures"][key])


def a_run(folder, text="So 2 + 2 = 4.\n#####\n4"):
    """A run of two updates, whose third is being written: one question of three, and of two."""
    settings = {"steps": 9, "saliency_weight": 0.5, "length_penalty": 0.1, "note": text}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "commands.txt").write_text("python train.py --out a\n")
    lines = [
        {"step": 0, "eval": {"pass@1": 0.5, "tokens": 60}},
        {"step": 1, "outcome": 0.5},
        {"step": 2, "outcome": 0.25, "length": 7.5},
        {"step": 2, "eval": {"pass@1": 0.75}},
    ]
    logs = {"metrics.jsonl": lines, "samples.jsonl": []}  # fmt: skip
    for step, id, outcome, saliency, length in (
        (1, "older", 1, 1, 0), (1, "older", 0, 0, 0),
        (2, "near", 1, 0.5, 100), (2, "near", 1, 0.25, 100),
        (2, "far", 0, 0.5, 200), (2, "far", 1, 1.0, 300), (2, "far", 0, 0.5, 100),
    ):  # fmt: skip
        facts = {
            "id": id,
            "gold": "4",
            "text": f"{text} {outcome} {length}",
            "advantage": outcome / 2,
        }
        row = {"step": step, "outcome": outcome, "saliency": saliency, "length": length} | facts
        logs["samples.jsonl"].append(row)
    for name, rows in logs.items():
        (folder / name).write_text(
            "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "'
        )
    return folder


def test_the_report_of_a_run_that_still_goes(tmp_path, capsys):
    report.main([str(a_run(tmp_path))])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.html'}\n"
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert page.elements <= ELEMENTS and {name for name, _ in page.attributes} <= ATTRIBUTES
    assert "2 updates so far of 9." in html and "python train.py --out a" in html
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG) and "data:image/png" in html
    # The question whose rewards differ most comes first; best and worst of each, by reward:
    # outcome + 0.5 saliency - 0.1 of each 100 tokens.
    assert re.findall(r"question (\w+), update (\d)", html) == [("far", "2"), ("near", "2")]
    rewards = [float(x) for x in re.findall(r"<bdi>reward</bdi></th><td><bdi>([-+.\d]+)", html)]
    assert rewards == pytest.approx([1 + 0.5 - 0.3, 0.25 - 0.2, 1 + 0.25 - 0.1, 1 + 0.125 - 0.1])
    assert re.findall(r"<p dir=\"auto\">4 (\d \d+)</p>", html) == [
        "1 300",
        "0 200",
        "1 100",
        "1 100",
    ]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_in_a_run_adds_no_element(text, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "curves", lambda *_: None)  # drawn above
    page = Page(report.write_run_report(a_run(tmp_path, text)).read_text())
    assert page.elements <= ELEMENTS and {name for name, _ in page.attributes} <= ATTRIBUTES
    assert visible(text, JOINERS).split("\n")[0] in "".join(page.of("div", "text"))


@pytest.mark.parametrize("missing", ["config.json", "commands.txt", "samples.jsonl"])
def test_what_a_run_lacks_costs_no_report(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "curves", lambda *_: None)  # as where it fails
    (a_run(tmp_path) / missing).unlink()
    html = report.write_run_report(tmp_path).read_text()
    assert "2 updates so far" in html and "No figure could be drawn." in html
    assert ("None yet." in html) == (missing == "samples.jsonl")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "is missing"),
        (b"", "is damaged"),
        (b'{"models": {"a"', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[]", "expected a JSON object"),
        (b"{}", "has no models"),
    ],
)
def test_bad_results_are_named_in_a_sentence(content, named, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(SystemExit) as refusal:
        report.main([str(tmp_path)])
    message = refusal.value.code
    assert message.startswith(f"error: {tmp_path / 'results.json'}") and named in message
    assert "\n" not in message and os.listdir(tmp_path) in ([], ["results.json"])


def test_numbers_that_were_not_finite_are_shown_as_such(written):
    page = Page((written / "report.html").read_text())
    _, *rows = page.tables["Figure 1: a mask comes about"]
    assert [row[2] for row in rows] == ["n/a", "n/a"]  # half-way
    # The first token of either arm's first trace, where its mask is shown.
    assert page.attributes.count(("title", "n/a")) == 2
