"""Random assignments and random files of experiments give an experiment, or an error of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import build, fields_of_an_experiment
from dwf_cluster.settings import InvalidInput

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([field.name for field in fields_of_an_experiment()])
NAMES = FIELDS | st.text(max_size=30)
VALUES = st.text(max_size=40) | JSON.map(json.dumps) | st.sampled_from(["1", "0.5", "1,2", "true", "null"])


def _assert_valid_or_one_line(build_experiment: Callable[[], Experiment]) -> None:
    """The result is an experiment that survives a round trip through JSON, or the error has one line."""
    try:
        experiment = build_experiment()
    except InvalidInput as error:
        (line,) = str(error).splitlines()
        assert line.isprintable()
    else:
        assert Experiment.from_json(experiment.to_json()) == experiment
        assert "/" not in experiment.folder


FUZZ = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZ
@given(st.lists(st.tuples(NAMES, VALUES).map("=".join) | st.text(max_size=30), max_size=4))
def test_random_assignments_give_an_experiment_or_an_error_of_one_line(assignments: list[str]) -> None:
    _assert_valid_or_one_line(lambda: build("digits", 0, assignments))


@st.composite
def _damaged_files(draw: st.DrawFn) -> str:
    fields: Any = json.loads(build("digits").to_json())
    for name in draw(st.lists(FIELDS, max_size=3)):
        *parents, leaf = name.split(".")
        part = fields
        for parent in parents:
            part = part[parent] if isinstance(part.get(parent), dict) else {}
        part[leaf] = draw(JSON)
    if draw(st.booleans()):
        fields[draw(st.text(max_size=12) | st.sampled_from(list(fields)))] = draw(JSON)
    text = json.dumps(fields)
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


@FUZZ
@given(_damaged_files() | JSON.map(json.dumps) | st.text(max_size=60))
def test_random_files_give_an_experiment_or_an_error_of_one_line(text: str) -> None:
    _assert_valid_or_one_line(lambda: Experiment.from_json(text))
