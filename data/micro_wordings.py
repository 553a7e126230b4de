"""The words of the embedded tasks: their stories, and the sentences about them.

They stand in data/wordings/, a TOML file for each task. Whoever writes another one there, and names
it in DATASETS (data/__init__.py), has a task of the same kind in other words and with other
numbers.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "wordings"
TASKS = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@dataclass(frozen=True)
class Domain:
    """A kind of story: how its start, its steps, its question and its running state are worded.

    templates: of "start" (slot x), "question", "state" (slot eq) and each kind of step, which are
    those of micro_task.OPERATORS, with slots b and k.
    """

    weight: float  # how often a problem tells such a story
    templates: dict[str, list[str]]
    money: bool = False
    signed: bool = False  # the quantity may fall below zero


@dataclass(frozen=True)
class Wordings:
    """What one file says; see data/wordings/micro.toml for each part."""

    names: dict[str, list[str]]
    items: list[str]
    places: list[str]
    numbers: dict
    macros: dict[str, str]
    sentences: dict[str, list[str]]
    domains: dict[str, Domain]

    def expand(self, template: str) -> str:
        """The template with its macros, such as {who}, replaced by the choices they stand for."""
        for macro, choices in self.macros.items():
            template = template.replace(macro, choices)
        return template


@cache
def read_wordings(task: str) -> Wordings:
    """The wordings of one of TASKS."""
    said = tomllib.loads((FOLDER / f"{task}.toml").read_text())
    tables, domains = said.pop("tables"), {}
    for name, domain in said["domains"].items():
        text, kinds = "".join(tables[table] for table in domain.pop("tables")), {}
        if "who" in domain:
            text = text.replace("{who}", domain.pop("who"))
        for line in text.splitlines():
            kind, template = line.split(maxsplit=1)
            kinds.setdefault(kind, []).append(template)
        domains[name] = Domain(templates=kinds, **domain)
    names = {she: of.split() for she, of in said["names"].items()}
    words = {"names": names, "items": said["items"].split(), "places": said["places"].split()}
    return Wordings(**said | words | {"domains": domains})
