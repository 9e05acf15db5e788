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
from typing import Any

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
from analysis.statistics import ALPHA, is_established
from analysis.sweep_tables import Setting, setting_tables
from dwf_cluster.console.command import Parser
from dwf_cluster.presets import invocation
from dwf_cluster.settings import to_text
from dwf_cluster.store.tables import SCHEMAS, dead_experts

_CONDITIONS = {
    "clean": "on clean images",
    "worst_case": "in the worst case of all attacks",
    "pgd_restarts": "under PGD with restarts",
}
"""Where the primary family is tested, by attack."""

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
        """The result in sentences: accuracies of the defended model, and what is established against its rivals."""
        defended = self.group.defended
        if self.measured[self.measured.model == defended].empty:
            return [f"The {defended} is not evaluated yet."]
        seeds = f"seed {self.group.seeds[0]}" if len(self.group.seeds) == 1 else f"{len(self.group.seeds)} seeds"
        primary = [list(each(rows)) for _, rows in self._primary.groupby("attack", sort=False)]
        attacks = dict.fromkeys(["clean", *(rows[0].attack for rows in primary)])
        shown = [f"{self._accuracy(attack)} {_CONDITIONS[attack]}" for attack in attacks]
        return [
            f"{self.measured.examples.max()} test images of {Path(self.group.experiment.data.source).name}, {seeds}. "
            f"Accuracy of the {defended}: {' and '.join(shown)}.",
            *(self._verdict(rows) for rows in primary),
            f"Tests are paired, {tables.tested_over(self.group)}. Everything outside these {len(self._primary)} "
            f"comparisons is exploratory.",
        ]

    @property
    def _primary(self) -> pd.DataFrame:
        return self.tests[self.tests.primary.astype(bool)]

    def _accuracy(self, attack: str) -> str:
        measured, threat = self.measured, self.group.experiment.threat
        rows = measured[(measured.model == self.group.defended) & (measured.attack == attack)]
        at_threat = rows[rows.epsilon.isna() | (rows.epsilon == threat.epsilon)]
        return f"{tables.percent(next(each(at_threat)))} %" if len(at_threat) else "(not measured)"

    def _verdict(self, rows: Sequence[Any]) -> str:
        """What is established in one column of the primary family.

        Args:
            rows: of `comparisons`, one for each rival.
        """
        defended, condition = self.group.defended, _CONDITIONS[rows[0].attack]
        different = [row for row in rows if row.p_corrected < ALPHA]
        ahead = [row.other for row in different if row.difference > 0]
        behind = [row.other for row in different if row.difference < 0]
        incomplete = [row.other for row in rows if row.incomplete]
        listed = f"{len(ahead)} of {len(rows)}{': ' if ahead else ''}{', '.join(ahead)}"
        where = f"{condition[0].upper()}{condition[1:]}"
        if len(self.group.seeds) == 1:
            sentences = [
                f"{where}: one seed establishes nothing about the methods. Of these trained models, the {defended} is "
                f"ahead of {listed}"
            ]
            sentences += [f"It is behind {', '.join(behind)}"] if behind else []
        else:
            state = (
                "established" if all(is_established(row) and row.difference > 0 for row in rows) else "not established"
            )
            sentences = [
                f"{where}: that the {defended} is ahead of every rival is {state}. It is established against {listed}"
            ]
            sentences += [f"It is established that the {defended} is behind {', '.join(behind)}"] if behind else []
        sentences += [f"Incomplete, so no claim is made against: {', '.join(incomplete)}"] if incomplete else []
        if complete := [row for row in rows if not row.incomplete]:
            best = min(complete, key=lambda row: float(row.difference))
            low, high = 100 * best.low, 100 * best.high
            sentences.append(
                f"Against the best rival, {best.other}, the difference is {100 * best.difference:+.1f} points (95 % "
                f"interval {low:+.1f} to {high:+.1f}, not corrected for choosing this rival; p = "
                f"{best.p_corrected:.2g}, corrected)"
            )
        return ". ".join(sentences) + "."

    @cached_property
    def checks(self) -> pd.DataFrame:
        """The checks for gradient masking; those that have found a sign come first."""
        names = ["seed", "model", "check", "value", "limit", "p", "could_fire", "fired", "meaning", "examples"]
        checks = self.group.frame("checks", names)
        return checks.sort_values("fired", ascending=False, kind="stable")

    @property
    def masking(self) -> str:
        """The result of the checks in a sentence: how many were run, how many could fire, how many fired."""
        checks = self.checks
        if checks.empty:
            return "Signs of gradient masking: not checked, no checks are stored."
        ran = f"{len(checks)} checks of {checks.model.nunique()} models"
        if checks.could_fire.isna().any():
            ran += "; how many of them could fire was not recorded"
        else:
            ran += f", {int(checks.could_fire.sum())} of which could fire"
        fired = [f"{row.model} {row.check} (seed {row.seed})" for row in each(checks[checks.fired])]
        listed = f": {', '.join(fired[:8])}{', ...' * (len(fired) > 8)}" if fired else ""
        return f"Signs of gradient masking: {len(fired) or 'none'} in {ran}{listed}."

    @property
    def dead_experts(self) -> list[str]:
        """A sentence for each expert that its gate gives no image in the last epoch."""
        return [
            f"Warning: seed {run.experiment.seed}, {sentence}."
            for run in self.group.runs
            for sentence in dead_experts(run.rows("metrics", ["model", "epoch", "expert_shares"]).to_pylist())
        ]

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
