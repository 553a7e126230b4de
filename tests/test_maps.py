"""The study's token maps: what is measured of them, and what the table says.

python -m pytest tests/test_maps.py
"""

import json

import numpy as np
import pytest

from data import micro_task
from lab.study import maps


def kept_by_hand():
    """Two traces on which attribution is right, and recency on neither; one has no AUROC."""
    right, wrong = [1.0, 1.0, 0.9, 0.1], [0.25, None, 0.1, 0.9]
    traces = {name: {"attribution": right, "recency": wrong, "is-number": wrong} for name in "ab"}
    traces["b"] = traces["b"] | {"attribution": [0.5, 1.0, 0.7, 0.3]}
    return {"settings": {"steps": 200}, "traces": traces}


def test_the_table_holds_means_and_paired_differences():
    rows = [line.strip("| ").split(" | ") for line in maps.markdown(kept_by_hand()).splitlines()]
    first = {row[0]: row[1:] for row in rows if len(row) == 6}
    assert first["attribution"][0].startswith("0.750 [") and first["attribution"][-1] == "201 b"
    assert first["attribution"][2].startswith("0.800 [") and first["recency"][-1] == "0"
    assert first["recency"][0] == "0.250 [0.250, 0.250]" and first["recency"][1] == "-"
    less = [row for row in rows if row[0] == "attribution" and len(row) == 5]
    assert len(less) == len(maps.BASES)
    for _, area, no_punctuation, comprehensiveness, sufficiency in less:
        assert area.startswith("+0.500 [") and no_punctuation == "-"
        assert comprehensiveness.startswith("+0.700 [") and sufficiency.startswith("-0.700 [")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    file = tmp_path_factory.mktemp("maps") / "maps.json"
    maps.run(maps.Settings(questions=5, rollouts=4, steps=2, batch=4, out=str(file)))
    return json.loads(file.read_text())


def test_one_right_computing_trace_a_question_is_measured_by_every_map(kept):
    asked = [problem.id for problem in micro_task.load("heldout", 5)]
    assert kept["traces"] and set(kept["traces"]) <= set(asked)
    names = {*maps.COSTS, *maps.BASES, "random"}
    for row in kept["traces"].values():
        assert row.keys() == names
        for areas_and_erasure in row.values():
            assert len(areas_and_erasure) == len(maps.MEASURES)
            assert all(value is None or -1 <= value <= 1 for value in areas_and_erasure)
    # Hiding what was left out alone as the most needed costs more than hiding tokens by chance.
    lost = {name: np.mean([row[name][2] for row in kept["traces"].values()]) for name in names}
    assert lost["leave-one-out"] > lost["random"]
