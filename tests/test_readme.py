"""The README's links to lines must point at the lines they speak of."""

import re
from pathlib import Path

import pytest

from tests import study_report
from lab.study.__main__ import DEFAULT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[([^\]]+)\]\((\w[\w/.]*\.py)#L(\d+)\)", README)


@pytest.mark.parametrize(("tag", "file", "line"), LINKS)
def test_a_link_leads_to_the_line_with_its_tag(tag, file, line):
    assert tag in (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_every_equation_has_a_link():
    assert {f"Eq. {n}" for n in range(1, 6)} <= {tag for tag, _, _ in LINKS}


def test_both_commands_stand_in_the_readme():
    assert "pip install -r requirements.txt && torchrun train.py\n" in README
    assert "pip install -r requirements.txt && python -m pytest\n" in README
    assert "pip install -r requirements.txt && python -m pytest\n" in (ROOT / ".ci/run").read_text()


def cells(line: str) -> list[str]:
    return [part.strip() for part in line.strip("| \n").split("|")]


def rows(text: str, head: str) -> dict[str, list[str]]:
    """First cell -> the others, of the first table whose head begins so; its head as ""."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(head))
    found = {"": cells(lines[first])[1:]}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *values = cells(line)
        found[name] = values
    return found


STUDY = (ROOT / "docs/study.md").read_text(encoding="utf-8")
ARMS_HEAD = "| arm (seeds) | accuracy, %"


def test_the_readme_quotes_the_study():
    quoted, study = rows(README, ARMS_HEAD), rows(STUDY, ARMS_HEAD)
    assert len(quoted) > 6 and "micro preset (3)" in quoted
    for name, values in quoted.items():
        assert values == study[name][: len(values)]


def test_the_study_says_what_its_runs_say():
    """A part of it once more from the kept runs; the whole page takes half a minute."""
    runs = study_report.load()
    for part in (
        study_report.protocol(runs),
        study_report.pilots_table(study_report.load_pilots()),
    ):
        assert part in STUDY
    arms = {name: runs[name] for name in ("outcome only", DEFAULT)}
    measures = {name: study_report.own(runs) for name, runs in arms.items()}
    for columns in (study_report.COLUMNS, study_report.FAITHFULNESS):
        for line in study_report.arms_table(arms, measures, columns).splitlines()[2:]:
            assert line in STUDY.splitlines()


CLOSING = {  # the first command's table -> the study's
    "accuracy (pass@1)": "accuracy, %", "pass@4": "pass@4, %", "tokens per trace": "tokens",
    "numbers": "numbers, %", "stop words": "stop words, %", "symbols": "symbols, %",
}  # fmt: skip


@pytest.mark.parametrize("label", CLOSING)
def test_the_closing_table_agrees_with_the_study(label):
    """Seed 0 on two threads, within the interval of the preset's runs on one."""
    (after,) = re.findall(rf"^    {re.escape(label)} +\S+ +([\d.]+)", README, re.MULTILINE)
    study = rows(STUDY, ARMS_HEAD)
    found = study["micro preset (3)"][study[""].index(CLOSING[label])]
    low, high = map(float, re.search(r"\[(\S+), (\S+)\]", found).groups())
    assert low <= float(after) <= high
