"""Figures of a group of experiments, as vector graphics and PNG, readable in print and by the colour-blind.

    python -m analysis.figures ./runs --out figures

A folder for each group of experiments that differ only in their seed. To add a figure: a function of a `FigureData`
that returns a matplotlib figure, and its entry in `FIGURES`.
"""

from __future__ import annotations

import io
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.command import command, write_whole
from analysis.drawing import FigureData, styled
from analysis.predictions import read_predictions
from analysis.results import load
from analysis.tables import accuracies
from dwf_cluster.console.command import Parser
from dwf_cluster.settings import InvalidInput

__all__ = ["FIGURES", "FigureData", "draw", "draw_all", "save", "write"]


@dataclass(frozen=True)
class FigureEntry:
    """A figure of the report.

    Attributes:
        function: `module:function` of a `FigureData`; returns None if there is nothing to show.
        caption: what the figure shows.
    """

    function: str
    caption: str


FIGURES: Mapping[str, FigureEntry] = {
    "fgsm": FigureEntry(
        "analysis.accuracy_figures:fgsm",
        "Accuracy over FGSM's epsilon, with clean images at 0 (the paper's figure 6, and its names). Bands: one "
        "standard deviation over seeds.",
    ),
    "pgd": FigureEntry(
        "analysis.accuracy_figures:pgd",
        "Accuracy over PGD's iterations (the paper's figure 7, and its names). Bands: one standard deviation over "
        "seeds.",
    ),
    "curve_epsilon": FigureEntry(
        "analysis.curve_figures:over_epsilon",
        "Accuracy under PGD and APGD over the radius of the ball, worst case up to each; dotted: the threat model's. A "
        "curve that does not end at 0 % says that the attack fails, not that the model is robust.",
    ),
    "curve_steps": FigureEntry(
        "analysis.curve_figures:over_steps",
        "Accuracy over the iterations of one long run of PGD, each the last iterate. It is converged where it is flat.",
    ),
    "curve_restarts": FigureEntry(
        "analysis.curve_figures:over_restarts",
        "Accuracy in the worst case over more and more starts of PGD, the first at the image, the others at random "
        "points of the ball. A curve that keeps falling says that more starts are needed.",
    ),
    "experts_and_mixture": FigureEntry(
        "analysis.accuracy_figures:experts_and_mixture",
        "Each expert and the mixture, in every column of the paper's table.",
    ),
    "clean_and_robust": FigureEntry(
        "analysis.accuracy_figures:clean_and_robust",
        "Clean accuracy against accuracy under PGD with restarts. Bars: one standard deviation over seeds.",
    ),
    "training": FigureEntry(
        "analysis.training_figures:training",
        "Loss, clean accuracy and the PGD probe over epochs, mean over seeds. A probe that falls while the loss falls "
        "is catastrophic overfitting.",
    ),
    "cost": FigureEntry(
        "analysis.training_figures:cost",
        "Hours of training (steps only; the mixture with its experts) against accuracy under PGD with restarts.",
    ),
    "compute": FigureEntry(
        "analysis.training_figures:compute",
        "Compute of training (a model with everything it starts from: the mixture with its experts) against accuracy "
        "in the worst case; floating-point operations of the passes that the methods need, not measured ones.",
    ),
    "gate_by_attack": FigureEntry(
        "analysis.gate_figures:gate_by_attack",
        "The gate under each attack: mean weight of each expert on the attacked images, and the mean entropy of the "
        "weights. Attacks that keep the worst case (restarts, gate, expert) give the first image that fooled the "
        "model, or, if none did, the last one that was tried.",
    ),
    "transfer": FigureEntry(
        "analysis.accuracy_figures:transfer",
        "Accuracy on PGD images that were made on another model; on the diagonal, on the model itself.",
    ),
    "gate_by_class": FigureEntry(
        "analysis.gate_figures:gate_by_class",
        "The gate for each true class: mean weight of each expert on clean images and under the longest PGD.",
    ),
    "gate_and_accuracy": FigureEntry(
        "analysis.expert_figures:gate_and_accuracy",
        "Mean gate weight of each expert against its own accuracy, on clean images and on the images of PGD on the "
        "whole model.",
    ),
    "expert_transfer": FigureEntry(
        "analysis.expert_figures:expert_transfer",
        "Experts inside the mixture: accuracy on PGD images that were made on another expert, and the correlation of "
        "their errors under PGD on the whole model.",
    ),
    "dropped_expert": FigureEntry(
        "analysis.expert_figures:dropped_expert",
        "The mixture without one expert, its other gate weights scaled to a sum of 1: accuracy on clean images and "
        "under PGD on what is left. Lines: the whole mixture.",
    ),
    "class_accuracy": FigureEntry(
        "analysis.class_figures:class_accuracy",
        "Accuracy of the defended model for each true class, on clean images and in the worst case. Bars: one standard "
        "deviation over seeds.",
    ),
    "confusion": FigureEntry(
        "analysis.class_figures:confusion",
        "Which class the defended model answers for the images of each true class, over all seeds.",
    ),
    "reliability": FigureEntry(
        "analysis.calibration_figures:reliability",
        "Reliability of the defended model over all seeds: accuracy in 15 bins of the predicted class's probability, "
        "and the share of images in each. ECE: expected calibration error (Guo et al. 2017), mean over seeds.",
    ),
}
"""Figures by name, in the order of the report. Files have these names."""


@styled()
def draw(name: str, data: FigureData) -> Figure | None:
    """One figure of `FIGURES`; None if there are no results for it."""
    figure: Figure | None = pkgutil.resolve_name(FIGURES[name].function)(data)
    return figure


def draw_all(data: FigureData) -> dict[str, Figure]:
    """Draw every figure for which there are results; returns them by name."""
    figures = {name: draw(name, data) for name in FIGURES}
    return {name: figure for name, figure in figures.items() if figure}


def save(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write each figure as PDF, SVG and PNG (300 dots per inch); return the files' paths.

    Raises:
        InvalidInput: if the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"--out: {str(folder)!r} cannot be used: {error.strerror}") from None
    paths = []
    for name, figure in figures.items():
        for file_format in ("pdf", "svg", "png"):
            content = io.BytesIO()
            write(figure, content, file_format)
            paths.append(Path(folder) / f"{name}.{file_format}")
            write_whole(paths[-1], content.getvalue())
    return paths


@styled()
def write(figure: Figure, file: Any, file_format: str) -> None:
    """Write one figure to an open file, as `pdf`, `svg` or `png`; the same figure gives the same bytes."""
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(file_format)
    figure.savefig(file, format=file_format, dpi=300, metadata=undated)


@command
def main(arguments: Sequence[str]) -> None:
    """Write the figures of every group, each group's in a folder of its own; print the paths."""
    parser = Parser(prog="python -m analysis.figures", description="Every figure, as PDF, SVG and PNG.")
    parser.add_argument("storage", nargs="+", help="storage or experiment's folder, a path or an fsspec URL")
    parser.add_argument("--out", default="figures", help="folder for the figures, default: figures")
    options = parser.parse_args(arguments)
    for group in load(*options.storage).groups:
        data = FigureData(group, accuracies(group), read_predictions(group))
        for path in save(draw_all(data), Path(options.out) / group.name):
            print(path)
        for note in group.experiment.selection_notes:
            print(f"{group.title}: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
