"""One self-contained HTML page: results, figures, where each number comes from, and how to reproduce it.

    python -m analysis.report ./runs --out report.html

A section for each group of experiments that differ only in their seed.
"""

from __future__ import annotations

import base64
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

import dwf_cluster
from analysis import figures, tables
from analysis.columns import CELL_FIELDS, each, key_of_row
from analysis.command import command, write_whole
from analysis.folder import ExperimentFolder
from analysis.formats import Table
from analysis.predictions import Predictions, read_predictions
from analysis.results import Group, load
from analysis.statistics import ALPHA
from analysis.sweep_tables import Setting, setting_tables
from dwf_cluster.console.command import Parser
from dwf_cluster.presets import invocation
from dwf_cluster.settings import to_text
from dwf_cluster.store.tables import SCHEMAS

_TABLES = ("evaluations", "predictions", "metrics", "checks", "jobs")


@dataclass(frozen=True)
class Section:
    """The page's section on one group.

    Attributes:
        group: the experiments.
        predictions: result of `read_predictions`.
        measured, tests, tables, remarks: result of `tables.make_tables`.
    """

    group: Group
    predictions: Predictions
    measured: pd.DataFrame
    tests: pd.DataFrame
    tables: Sequence[Table]
    remarks: Sequence[str]

    @staticmethod
    def read(group: Group) -> Section:
        """Read a group's results."""
        predictions = read_predictions(group)
        return Section(group, predictions, *tables.make_tables(group, predictions))

    @property
    def headline(self) -> list[str]:
        """The result in sentences: accuracies of the defended model, and its difference to the best other model."""
        defended = self.group.defended
        rows = self.measured[self.measured.model == defended]
        if rows.empty:
            return [f"The {defended} is not evaluated yet."]
        seeds = f"seed {self.group.seeds[0]}" if len(self.group.seeds) == 1 else f"{len(self.group.seeds)} seeds"
        sentences = [
            f"{rows.examples.iloc[0]} test images of {Path(self.group.experiment.data.source).name}, {seeds}. Accuracy "
            f"of the {defended}: {self._accuracy('clean')} on clean images, {self._accuracy('pgd')} under its longest "
            f"PGD and {self._accuracy('pgd_restarts')} under PGD with restarts."
        ]
        for attack, condition in (("clean", "On clean images"), ("pgd_restarts", "Under PGD with restarts")):
            sentences += self._against_best_other(attack, condition)
        return sentences

    def _accuracy(self, attack: str) -> str:
        measured = self.measured
        rows = list(each(measured[(measured.model == self.group.defended) & (measured.attack == attack)]))
        return f"{tables.percent(rows[-1])} %" if rows else "(not measured)"

    def _against_best_other(self, attack: str, condition: str) -> list[str]:
        defended = self.group.defended
        others = self.measured[(self.measured.attack == attack) & (self.measured.model != defended)]
        if others.empty:
            return []
        other = max(each(others), key=lambda row: float(row.mean)).model
        rows = [
            row for row in each(self.tests[self.tests.attack == attack]) if {row.model, row.other} == {defended, other}
        ]
        if not rows:
            return []
        (row,) = rows
        sign = 1 if row.model == defended else -1
        low, high = sorted((100 * sign * row.low, 100 * sign * row.high))
        side = "ahead" if sign * row.difference > 0 else "behind"
        verdict = "established on these images" if row.p_holm < ALPHA else "not established"
        over_seeds = (
            f"Over the seeds the difference is {100 * sign * row.difference:+.1f} ± {100 * row.std:.1f} (paired "
            f"t-test, p = {row.p_seeds:.2g})."
            if row.seeds > 1
            else "One seed is no statement about other seeds."
        )
        return [
            f"{condition} the best other model is {other}. The {defended} is {abs(100 * row.difference):.1f} points "
            f"{side} (95 % interval {low:+.1f} to {high:+.1f}), which is {verdict}: McNemar, p = {row.p_holm:.2g} "
            f"after Holm over {len(self.tests)} comparisons. {over_seeds}"
        ]

    @cached_property
    def checks(self) -> pd.DataFrame:
        """The checks for gradient masking; those that have found a sign come first."""
        checks = self.group.frame(
            "checks", ["seed", "model", "check", "value", "limit", "fired", "meaning", "examples"]
        )
        return checks.sort_values("fired", ascending=False, kind="stable")

    @property
    def masking(self) -> str:
        """The result of the checks in a sentence."""
        if self.checks.empty:
            return "Signs of gradient masking: not checked, no checks are stored."
        checked = f"{len(self.checks)} checks of {self.checks.model.nunique()} models"
        fired = [f"{row.model} {row.check} (seed {row.seed})" for row in each(self.checks[self.checks.fired])]
        if not fired:
            return f"Signs of gradient masking: none in {checked}."
        return (
            f"Signs of gradient masking: {len(fired)} in {checked}: {', '.join(fired[:8])}{', ...' * (len(fired) > 8)}."
        )

    @property
    def recount(self) -> str:
        """Whether the predictions add up to the evaluations."""
        agree, differ = 0, []
        seeds = {seed: i for i, seed in enumerate(self.group.seeds)}
        for row in each(self.group.frame("evaluations", [*CELL_FIELDS, "seed", "correct"])):
            correct = self.predictions.correct.get((row.model, key_of_row(row)))
            if correct is not None and (correct[seeds[row.seed]] >= 0).any():
                same = int((correct[seeds[row.seed]] == 1).sum()) == row.correct
                agree += same
                differ += [] if same else [f"{row.model} {row.attack} (seed {row.seed})"]
        if differ:
            return f"Warning: counted again from the predictions, {len(differ)} cells differ: {', '.join(differ[:5])}."
        return f"Counted again from the predictions, {agree} cells of the evaluations agree."

    @property
    def sources(self) -> list[tuple[str, list[str]]]:
        """The URL of each experiment, and how many files and rows of each table were read."""
        return [(run.url, [self._size(run, table) for table in _TABLES]) for run in self.group.runs]

    @staticmethod
    def _size(run: ExperimentFolder, table: str) -> str:
        files = run.parquet(table)
        return f"{len(files)} files, {run.dataset(table).count_rows():,} rows" if files else "none"

    @property
    def software(self) -> list[tuple[str, str]]:
        """Versions, hosts and devices that the jobs recorded."""
        jobs = self.group.frame("jobs")
        names = [*(name for name in SCHEMAS["jobs"].names if name.endswith("_version")), "git_commit", "host", "device"]
        return [(name, ", ".join(map(str, jobs[name].dropna().unique())) or "not recorded") for name in names]

    @property
    def settings(self) -> list[tuple[str, str, bool]]:
        """Every setting, and whether it differs from the preset."""
        return [(name, to_text(value), name in self.group.changed) for name, value in self.group.settings.items()]

    @property
    def command(self) -> str:
        """The command that reproduces the experiments."""
        preset, _ = invocation(self.group.experiment)
        seeds = ",".join(map(str, self.group.seeds))
        changed = [shlex.quote(f"{name}={to_text(value)}") for name, value in self.group.changed.items()]
        sets = " \\\n    --set " + " ".join(changed) if changed else ""
        return f"python -m dwf_cluster.launch --local --preset {shlex.quote(preset)} --seed {seeds}{sets}"

    @cached_property
    def figures(self) -> list[tuple[str, str, str]]:
        """Name, caption and data URI of each figure."""
        drawn = figures.draw_all(figures.FigureData(self.group, self.measured, self.predictions))
        return [(name, figures.FIGURES[name].caption, _data_uri(figure)) for name, figure in drawn.items()]


def _data_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figures.write(figure, file, "svg")
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def page(storages: Sequence[str]) -> str:
    """The report as HTML.

    Args:
        storages: as for `load`.

    Raises:
        InvalidInput: as `load`, and if no group has evaluations yet.
    """
    results = load(*storages)
    sections = [Section.read(group) for group in results.evaluated]
    environment = Environment(
        loader=PackageLoader("analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        sections=sections,
        setting_tables=setting_tables([Setting.of(s.group, s.measured, s.predictions) for s in sections]),
        not_evaluated=[group.title for group in results.groups if group not in results.evaluated],
        storages=storages,
        tables=_TABLES,
        version=dwf_cluster.__version__,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        report_command=shlex.join(["python", "-m", "analysis.report", *storages, "--out", "report.html"]),
    )


@command
def main(arguments: Sequence[str]) -> None:
    """Write the page and print its path."""
    parser = Parser(prog="python -m analysis.report", description="One self-contained HTML page.")
    parser.add_argument("storage", nargs="+", help="storage or experiment's folder, a path or an fsspec URL")
    parser.add_argument("--out", default="report.html", help="file to write, default: report.html")
    options = parser.parse_args(arguments)
    write_whole(Path(options.out), page(options.storage).encode())
    print(options.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
