"""One page that shows what experiments came to, says where each number came from, and needs no network.

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

import dwf_cluster
from analysis import command, figures, tables
from analysis.predictions import Predictions, read_predictions
from analysis.results import ExperimentFolder, Group, each, key_of_row, load
from analysis.statistics import ALPHA
from dwf_cluster.experiment import invocation
from dwf_cluster.settings import InvalidInput, to_text
from dwf_cluster.store.tables import SCHEMAS

MIXTURE = "mixture"
_TABLES = ("evaluations", "predictions", "metrics", "checks", "jobs")


@dataclass(frozen=True)
class Section:
    """What the page says of one group.

    Attributes:
        group: the experiments.
        found: of `read_predictions.outcomes`.
        measured: of `tables.accuracies`.
        tests: of `statistics.comparisons`.
        tables: of `tables.of_group`.
        remarks: of `tables.of_group`.
    """

    group: Group
    found: Predictions
    measured: pd.DataFrame
    tests: pd.DataFrame
    tables: Sequence[tables.Table]
    remarks: Sequence[str]

    @property
    def headline(self) -> list[str]:
        """The result in sentences, each number with what stands behind it."""
        of_mixture = {row.title: row for row in each(self.measured[self.measured.model == MIXTURE])}
        if not of_mixture:
            return ["The mixture is not evaluated yet."]
        images = next(iter(of_mixture.values())).examples
        seeds = self.group.seeds
        over = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
        said = [
            f"{images} test images of {Path(self.group.experiment.data.source).name}, {over}. Of the mixture's answers "
            f"{self._right('clean')} are right on clean images, {self._right('pgd')} under its longest PGD and "
            f"{self._right('pgd_restarts')} under PGD with restarts."
        ]
        for attack, where in (("clean", "On clean images"), ("pgd_restarts", "Under PGD with restarts")):
            said += self._against_best_rival(attack, where)
        return said

    def _right(self, attack: str) -> str:
        rows = list(each(self.measured[(self.measured.model == MIXTURE) & (self.measured.attack == attack)]))
        return f"{tables.percent(rows[-1])} %" if rows else "(not measured)"

    def _against_best_rival(self, attack: str, where: str) -> list[str]:
        rivals = self.measured[(self.measured.attack == attack) & (self.measured.model != MIXTURE)]
        if rivals.empty:
            return []
        rival = max(each(rivals), key=lambda row: float(row.mean)).model
        pair = {MIXTURE, rival}
        rows = [row for row in each(self.tests[self.tests.attack == attack]) if {row.model, row.other} == pair]
        if not rows:
            return []
        (row,) = rows
        sign = 1 if row.model == MIXTURE else -1
        low, high = sorted((100 * sign * row.low, 100 * sign * row.high))
        place = f"{abs(100 * row.difference):.1f} points {'ahead' if sign * row.difference > 0 else 'behind'}"
        verdict = "established on these images" if row.p_holm < ALPHA else "not established"
        seeds = (
            f"Over the seeds it is {100 * sign * row.difference:+.1f} ± {100 * row.std:.1f} (paired t-test, "
            f"p = {row.p_seeds:.2g})."
            if row.seeds > 1
            else "One seed says nothing of others."
        )
        return [
            f"{where} the best other model is {rival}. The mixture is {place} (95 % interval {low:+.1f} to "
            f"{high:+.1f}), which is {verdict}: McNemar, p = {row.p_holm:.2g} after Holm over {len(self.tests)} "
            f"comparisons. {seeds}"
        ]

    @cached_property
    def checks(self) -> pd.DataFrame:
        """Signs of gradient masking, those that are there first."""
        checks = self.group.frame(
            "checks", ["seed", "model", "check", "value", "limit", "fired", "meaning", "examples"]
        )
        return checks.sort_values("fired", ascending=False, kind="stable")

    @property
    def masking(self) -> str:
        """The checks in a sentence."""
        if self.checks.empty:
            return "Nobody looked for signs of gradient masking: no checks are stored."
        looked = f"{len(self.checks)} checks of {self.checks.model.nunique()} models"
        fired = [f"{row.model} {row.check} (seed {row.seed})" for row in each(self.checks[self.checks.fired])]
        if not fired:
            return f"Signs of gradient masking: none in {looked}."
        return (
            f"Signs of gradient masking: {len(fired)} in {looked}: {', '.join(fired[:8])}{', ...' * (len(fired) > 8)}."
        )

    @property
    def recount(self) -> str:
        """Whether the predictions add up to the evaluations."""
        agree, differ = 0, []
        seeds = {seed: i for i, seed in enumerate(self.group.seeds)}
        names = ["model", "attack", "source", "epsilon", "steps", "seed", "correct"]
        for row in each(self.group.frame("evaluations", names)):
            right = self.found.correct.get((row.model, key_of_row(*row[1:5])))
            if right is not None and (right[seeds[row.seed]] >= 0).any():
                same = int((right[seeds[row.seed]] == 1).sum()) == row.correct
                agree += same
                differ += [] if same else [f"{row.model} {row.attack} (seed {row.seed})"]
        if differ:
            return f"Warning: counted again from the predictions, {len(differ)} cells differ: {', '.join(differ[:5])}."
        return f"Counted again from the predictions, {agree} cells of the evaluations agree."

    @property
    def sources(self) -> list[tuple[str, list[str]]]:
        """For each experiment its URL, and how many files and rows of each table were read."""
        return [(run.url, [self._read(run, table) for table in _TABLES]) for run in self.group.runs]

    @staticmethod
    def _read(run: ExperimentFolder, table: str) -> str:
        files = run.parquet(table)
        return f"{len(files)} files, {run.dataset(table).count_rows():,} rows" if files else "none"

    @property
    def software(self) -> list[tuple[str, str]]:
        """What ran: every value that the jobs name."""
        jobs = self.group.frame("jobs")
        names = [*(name for name in SCHEMAS["jobs"].names if name.endswith("_version")), "git_commit", "host", "device"]
        return [(name, ", ".join(map(str, jobs[name].dropna().unique())) or "not recorded") for name in names]

    @property
    def settings(self) -> list[tuple[str, str, bool]]:
        """Every setting, and whether it is not the preset's."""
        return [(name, to_text(value), name in self.group.changed) for name, value in self.group.settings.items()]

    @property
    def command(self) -> str:
        """What measures it again."""
        preset, _ = invocation(self.group.experiment)
        seeds = ",".join(map(str, self.group.seeds))
        changed = [shlex.quote(f"{name}={to_text(value)}") for name, value in self.group.changed.items()]
        sets = " \\\n    --set " + " ".join(changed) if changed else ""
        return f"python -m dwf_cluster.launch --local --preset {shlex.quote(preset)} --seed {seeds}{sets}"

    @cached_property
    def figures(self) -> list[tuple[str, str, str]]:
        """Name, caption and data URI of each figure."""
        made = figures.of_group(self.group, self.measured, self.found)
        return [(name, figures.CAPTIONS[name], _data_uri(figure)) for name, figure in made.items()]


def _data_uri(figure: Any) -> str:
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
    sections, results = [], load(*storages)
    for group in results.evaluated:
        found = read_predictions(group)
        sections.append(Section(group, found, *tables.of_group(group, found)))
    environment = Environment(
        loader=PackageLoader("analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        sections=sections,
        overview=tables.overview([(section.group, section.measured) for section in sections]),
        waiting=[group.title for group in results.groups if group not in results.evaluated],
        storages=storages,
        tables=_TABLES,
        version=dwf_cluster.__version__,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        again=shlex.join(["python", "-m", "analysis.report", *storages, "--out", "report.html"]),
    )


def main(arguments: Sequence[str]) -> None:
    """Write the page and print its path."""
    parser = command.Parser(prog="python -m analysis.report", description="One self-contained HTML page.")
    parser.add_argument("storage", nargs="+", help="storage or experiment's folder, a path or an fsspec URL")
    parser.add_argument("--out", default="report.html", help="the file, default: report.html")
    options = parser.parse_args(arguments)
    text = page(options.storage)
    try:
        command.write_whole(Path(options.out), text.encode())
    except OSError as error:
        raise InvalidInput(f"--out: {options.out!r} cannot be used: {error.strerror}") from None
    print(options.out)


if __name__ == "__main__":
    sys.exit(command.run(main))
