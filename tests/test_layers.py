"""The shape of the house: who may import whom, and how large files and functions may be.

Imports are read from the source, those inside functions too. From the ground up:

    model, atman, grpo | data < lab/run < lab/measure < lab/show < eval < train < lab/study < tests
"""

import ast
import graphlib
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHOD = ("model", "atman", "grpo")
HEIGHTS = {"lab": 0, "method": 0, "data": 0, "lab.run": 1, "lab.measure": 2, "lab.show": 3}
HEIGHTS |= {"eval": 4, "train": 5, "lab.study": 6, "tests": 7}
COMMAND = ("atman", "lab.show.explain")  # `python atman.py` hands on to it, by name


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = [path for folder in ("data", "lab", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
SOURCES = {module_of(path): path.read_text() for path in [*ROOT.glob("*.py"), *PATHS]}
CODE = {name: text for name, text in SOURCES.items() if name.split(".")[0] != "tests"}


def layer_of(module: str) -> str:
    if module in METHOD:
        return "method"
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "lab" else names[0]


def imports_of(source: str, modules=SOURCES) -> set[str]:
    """What a source imports: modules of the project by their file, others by their package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("import_module", "run_module"):  # by name, where it is written
                names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {file_of(name, modules) for name in names}


def file_of(name: str, modules) -> str:
    """lab.run.hub.weights_directory -> lab.run.hub; torch.nn -> torch."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def allowed(importer: str, imported: str) -> bool:
    above, below = layer_of(importer), layer_of(imported)
    return above == below or HEIGHTS[below] < HEIGHTS[above]


ARROWS = {
    module: {name for name in imports_of(source) if name in SOURCES} - {module}
    for module, source in SOURCES.items()
}


def test_imports_go_down_or_stay_in_their_folder():
    arrows = [(module, name) for module, names in ARROWS.items() for name in sorted(names)]
    assert len(arrows) > 100
    assert [arrow for arrow in arrows if not allowed(*arrow) and arrow != COMMAND] == []


def test_no_file_imports_itself_by_way_of_others():
    graph = ARROWS | {COMMAND[0]: ARROWS[COMMAND[0]] - {COMMAND[1]}}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("module", METHOD)
def test_the_method_needs_torch_and_numpy_alone(module):
    others = imports_of(SOURCES[module]) - set(METHOD) - set(sys.stdlib_module_names)
    assert others - {COMMAND[1]} <= {"torch", "numpy"}


def test_the_session_does_not_know_the_method():
    assert not ARROWS["lab.run.session"] & {"atman", "grpo"}


@pytest.mark.parametrize(
    "source, imported",
    [
        ("import train", {"train"}),
        ("from lab.run import hub, flags as f", {"lab.run.hub", "lab.run.flags"}),
        ("from lab.run.hub import weights_directory", {"lab.run.hub"}),
        ("def f():\n    from lab.show.heat import page", {"lab.show.heat"}),
        ("from data import Problem", {"data"}),
        ("from data import gsm8k", {"data.gsm8k"}),
        ("import torch.nn.functional as F", {"torch"}),
        ("import runpy\nrunpy.run_module('train')", {"runpy", "train"}),
    ],
)
def test_imports_are_read(source, imported):
    modules = {"train", "data", "data.gsm8k", "lab.run.hub", "lab.run.flags", "lab.show.heat"}
    assert imports_of(source, modules) == imported


@pytest.mark.parametrize(
    "importer, imported, expected",
    [
        ("grpo", "model", True),
        ("model", "data.traces", False),
        ("data.traces", "model", False),
        ("lab.run.sampling", "data.traces", True),
        ("lab.run.session", "lab.run.runs", True),
        ("lab.run.session", "lab.show.figures", False),
        ("lab.measure.arms", "eval", False),
        ("lab.show.report", "train", False),
        ("train", "eval", True),
        ("eval", "train", False),
        ("train", "lab.study.report", False),
        ("lab.study.report", "train", True),
        ("lab.study.report", "tests.tiny", False),
    ],
)
def test_the_rule(importer, imported, expected):
    assert allowed(importer, imported) == expected


# Sizes


def lines_of(source: str) -> int:
    return len(source.splitlines())


def functions() -> dict[str, int]:
    """Lines of each function outside tests, decorators aside."""
    return {
        f"{module}:{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
        for module, source in CODE.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }


def test_five_files_on_top():
    top = {name: lines_of(source) for name, source in CODE.items() if "." not in name}
    assert top.keys() - {"data", "lab"} == {"model", "atman", "grpo", "train", "eval"}
    sizes = {name: top[name] for name in (*METHOD, "train", "eval")}
    assert max(sizes.values()) <= 400, sizes
    assert sum(sizes.values()) <= 1600, sizes


def test_no_file_is_long():
    sizes = {module: lines_of(source) for module, source in CODE.items()}
    assert {module: size for module, size in sizes.items() if size > 500} == {}
    assert sum(sizes.values()) <= 11_940


def test_no_function_is_long():
    lengths = functions()
    assert {name: length for name, length in lengths.items() if length > 80} == {}
    assert statistics.median(lengths.values()) <= 12
    (loop,) = [length for name, length in lengths.items() if name.startswith("train:train:")]
    assert loop <= 75
