"""What the README and docs/ say must be so: links, commands, numbers.

    python -m tests.test_readme              # set the line numbers in the README's links right

A link to a line names the code on it in its title: [Eq. 5](grpo.py#L152 "loss = -surrogate.sum()").
"""

import importlib.util
import re
from pathlib import Path

import pytest

from lab.study.arms import RECOMMENDED
from lab.study.kept import load_arms, load_pilots
from lab.study.measures import own
from lab.study.report import COLUMNS, RELIANCE, arms_table, pilots_table, protocol

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDY = (ROOT / "docs/study.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINE_LINK = re.compile(r'\[([^\]]+)\]\(([\w/]+\.py)#L(\d+) "([^"]+)"\)')


def places(file: str, code: str) -> list[int]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, 1) if code in line]


@pytest.mark.parametrize(("text", "file", "line", "code"), LINE_LINK.findall(README))
def test_a_link_leads_to_the_line_that_it_names(text, file, line, code):
    assert places(file, code) == [int(line)], f"python -m tests.test_readme sets [{text}] right"
    tag = re.match(r"Eq\. \d", text)
    if tag:
        assert int(line) in places(file, tag[0])


def test_every_equation_has_a_link():
    texts = " ".join(text for text, *_ in LINE_LINK.findall(README))
    assert all(f"Eq. {number}" in texts for number in range(1, 6))
    # Each link to a line is one that the test above reads.
    assert len(LINE_LINK.findall(README)) == README.count(".py#L") > 10


def anchors(page: Path) -> set[str]:
    """A page's headings as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?[^)]*\)", text)
    for file, anchor in targets:
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{file}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "study_first.md"])
def test_every_command_exists(page):  # study_first.md's are those of the commit that it names
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:lab|tests|data)(?:\.\w+)*)", text.replace("\n", " ")):
        assert importlib.util.find_spec(module), module
    for script in re.findall(r"(?:python|torchrun) (\w+\.py)", text):
        assert (ROOT / script).is_file(), script


def test_every_module_with_a_command_is_named():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    guarded = [
        path.relative_to(ROOT)
        for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("lab/**/*.py")]
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    assert len(guarded) > 10
    by_script = {"lab/show/explain.py": "python atman.py"}  # the command's short name
    for path in guarded:
        module = ".".join(path.with_suffix("").parts).removesuffix(".__main__")
        command = by_script.get(path.as_posix(), f"python -m {module}")
        assert command in text or (len(path.parts) == 1 and path.name in text), path


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_both_commands_stand_in_the_readme():
    assert "pip install -r requirements.txt && torchrun train.py\n" in README
    assert "pip install -r requirements.txt && python -m pytest\n" in README
    assert "pip install -r requirements.txt && python -m pytest\n" in (ROOT / ".ci/run").read_text()


# ------------------------------------------------------------------------------ the study's numbers


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def table(text: str, head: str) -> dict[str, list[str]]:
    """First cell -> the others, of the first table whose head begins so; its head as ""."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(head))
    rows = {"": cells(lines[first])[1:]}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *values = cells(line)
        rows[name] = values
    return rows


ARMS_HEAD, AUC_HEAD = "| arm (seeds) | computing share, %", "| reward |"


def test_the_readme_quotes_the_study():
    quoted, study = table(README, ARMS_HEAD), table(STUDY, ARMS_HEAD)
    assert len(quoted) > 6 and any(name.startswith(RECOMMENDED) for name in quoted)
    for name, values in quoted.items():
        assert values == study[name][: len(values)]


def test_the_readme_quotes_the_selection():
    quoted, study = table(README, AUC_HEAD), table(STUDY, AUC_HEAD)
    assert len(quoted) > 6 and RECOMMENDED in quoted
    places = [study[""].index(head) for head in quoted[""]]
    for name, values in quoted.items():
        assert values == [study[name][place] for place in places]


def test_the_study_says_what_its_runs_say():
    """A part of it once more from the kept runs; the whole page takes half a minute."""
    runs = load_arms()
    for section in (protocol(runs), pilots_table(load_pilots())):
        assert section in STUDY
    arms = {name: runs[name] for name in ("outcome only", RECOMMENDED)}
    measures = {name: (own(by_seed),) for name, by_seed in arms.items()}
    for columns in (COLUMNS, RELIANCE):
        for line in arms_table(measures, columns).splitlines()[2:]:
            assert line in STUDY.splitlines()


CLOSING = {"accuracy (pass@1)": "accuracy, %", "computing share": "computing share, %"}


@pytest.mark.parametrize("label", CLOSING)
def test_the_closing_table_agrees_with_the_study(label):
    """The first command is seed 0 of the recommended arm, on as many threads as there are."""
    (after,) = re.findall(rf"^    {re.escape(label)} +\S+ +([\d.]+)", README, re.MULTILINE)
    study = table(STUDY, ARMS_HEAD)
    row = next(row for name, row in study.items() if name.startswith(f"{RECOMMENDED} ("))
    cell = row[study[""].index(CLOSING[label])]
    low, high = map(float, re.search(r"\[(\S+), (\S+)\]", cell).groups())
    assert low <= float(after) <= high


# ------------------------------------------------------------------------------------- line numbers


def relinked(text: str) -> str:
    """The text with each link's line number set to the one line that holds its code."""

    def right(link):
        words, file, _, code = link.groups()
        (line,) = places(file, code)
        return f'[{words}]({file}#L{line} "{code}")'

    return LINE_LINK.sub(right, text)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(relinked(README), encoding="utf-8")
