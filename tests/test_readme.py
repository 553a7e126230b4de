"""The README's links to lines must point at the lines they speak of."""

import re
from pathlib import Path

import pytest

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
