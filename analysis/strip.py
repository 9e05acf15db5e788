"""A strip of test images: clean, what PGD adds, attacked, with predictions and gate weights. Needs torch.

    python -m analysis.strip ./runs/digits-seed0-0123456789 --out strip.png

It shows the first images of the test set, so that they are not selected by hand.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from analysis.command import command, write_whole
from analysis.drawing import DEFENDED, PALETTE, styled
from analysis.folder import ExperimentFolder
from analysis.results import load
from dwf_cluster.console.command import Parser
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.plan.jobs import EXPERTS, JOINT, is_trained
from dwf_cluster.settings import InvalidInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGES = 6
"""Columns of the strip."""


@dataclass(frozen=True)
class Attacked:
    """Test images before and after an attack on the defended model.

    Attributes:
        label: true labels, shape (n,).
        x: pixels in [0, 1], shape (2, n, channels, height, width): clean and attacked.
        prediction: shape (2, n).
        gate: weights, shape (2, n, experts).
        steps: iterations of the attack.
    """

    label: NDArray[Any]
    x: NDArray[Any]
    prediction: NDArray[Any]
    gate: NDArray[Any]
    steps: int


def attack(run: ExperimentFolder, data_folder: Path) -> Attacked:
    """Attack the defended model with the longest PGD of its result table, on the CPU.

    Args:
        run: the experiment; its checkpoints are read.
        data_folder: folder of downloaded images.

    Raises:
        InvalidInput: if the model has no gate or no checkpoint.
    """
    import torch

    from dwf_cluster.attacks.ball import Ball
    from dwf_cluster.attacks.gradient import predict
    from dwf_cluster.attacks.pgd import pgd
    from dwf_cluster.data.device import to_float
    from dwf_cluster.data.sources import load as load_images
    from dwf_cluster.defences.build import trained
    from dwf_cluster.models.frozen import frozen
    from dwf_cluster.models.mixture import Gated

    experiment = run.experiment
    defended = experiment.defended
    if not METHODS[defended.method].has_gate:
        raise InvalidInput(f"{run.url}: cannot be used: its defended model {defended.name} has no gate")
    if not is_trained(defended, run.store):
        raise InvalidInput(
            f"{run.url}: cannot be used: its {defended.name} has no checkpoint, "
            f"`--stages {JOINT if defended.parents else EXPERTS}` makes it"
        )
    images = load_images(experiment.data, data_folder)
    model = frozen(trained(experiment.models, defended.name, images.format, experiment.seed, run.store))
    assert isinstance(model, Gated)

    x, y = to_float(torch.tensor(images.x_test[:IMAGES])), torch.tensor(images.y_test[:IMAGES])
    ball, steps = Ball("linf", experiment.pgd.epsilon), max(experiment.evaluation.pgd_steps)
    *_, last = pgd(model, x, y, ball, step_size=experiment.pgd.step_size, steps=steps)
    pair = (x, last.x.contiguous())
    with torch.no_grad():
        gate = [model.gate(part).numpy() for part in pair]
    prediction = [predict(model, part).argmax(1).numpy() for part in pair]
    return Attacked(y.numpy(), np.stack([part.numpy() for part in pair]), np.stack(prediction), np.stack(gate), steps)


@styled()
def draw(run: ExperimentFolder, shown: Attacked) -> Figure:
    """One column for each image: clean, perturbation (grey is none), attacked, gate weights before and after."""
    experiment, epsilon = run.experiment, run.experiment.pgd.epsilon
    experts = list(experiment.defended.experts)
    figure = Figure(figsize=(6.5, 5.2))
    rows = figure.subplots(4, len(shown.label), squeeze=False, height_ratios=[1, 1, 1, 0.09 * len(experts) + 0.4])
    clean, attacked = shown.x
    perturbation = 0.5 + (attacked - clean) / (2 * epsilon)
    for i, (label, before, after) in enumerate(zip(shown.label, *shown.prediction, strict=True)):
        for axes, pixels in zip(rows[:3, i], (clean[i], perturbation[i], attacked[i]), strict=True):
            colours = pixels.transpose(1, 2, 0)
            axes.imshow(colours if colours.shape[2] == 3 else colours[:, :, 0], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, predicted in ((rows[0, i], before), (rows[2, i], after)):
            wrong = predicted != label
            title = f"{predicted}, not {label}" if wrong else f"{predicted}"
            axes.set_title(title, color=DEFENDED if wrong else "black", fontsize=8, pad=3)
        position = np.arange(len(experts))
        rows[3, i].barh(position - 0.2, 100 * shown.gate[0, i], height=0.4, color=PALETTE[3], label="clean")
        rows[3, i].barh(position + 0.2, 100 * shown.gate[1, i], height=0.4, color=DEFENDED, label="attacked")
        rows[3, i].set_yticks(position, experts if i == 0 else [""] * len(experts), fontsize=6)
        rows[3, i].set(xlim=(0, 100), ylim=(len(experts) - 0.4, -0.6))
        rows[3, i].tick_params(length=0, labelsize=6)
        rows[3, i].grid(visible=False, axis="y")
    for axes, name in zip(rows[:, 0], ("clean", "perturbation", f"PGD-{shown.steps}", "gate (%)"), strict=True):
        axes.set_ylabel(name)
    figure.suptitle(
        f"The first test images under PGD, epsilon {epsilon:.3g}; above them the predictions of the "
        f"{experiment.defended.name}",
        fontsize=9,
    )
    figure.legend(*rows[3, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@command
def main(arguments: Sequence[str]) -> None:
    """Draw the strip of one experiment and print its path."""
    parser = Parser(
        prog="python -m analysis.strip",
        description="Test images, clean and attacked, with predictions and gate weights.",
    )
    parser.add_argument("folder", help="experiment's folder, a path or an fsspec URL")
    parser.add_argument("--out", default="strip.png", help="a .png, .pdf or .svg file, default: strip.png")
    parser.add_argument("--data-folder", default="data", help="folder of downloaded images, default: data")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise InvalidInput(f"--out: {options.out!r} cannot be used: allowed is a name ending in .png, .pdf or .svg")
    runs = [run for group in load(options.folder).groups for run in group.runs]
    if len(runs) > 1:
        raise InvalidInput(
            f"folder: {options.folder!r} cannot be used: it holds {len(runs)} experiments, allowed is one"
        )
    figure = draw(runs[0], attack(runs[0], Path(options.data_folder)))
    content = io.BytesIO()
    figure.savefig(content, format=out.suffix[1:], dpi=300)
    write_whole(out, content.getvalue())
    print(out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
