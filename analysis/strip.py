"""Test images, what PGD adds to them, what comes of it, and what the gate trusts. Needs torch and the checkpoints.

    python -m analysis.strip ./runs/digits-seed0-0123456789 --out strip.png

The first images of the test set: nobody chose them.
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

from analysis.command import Parser, run, write_whole
from analysis.figures import COLOURS, styled
from analysis.results import ExperimentFolder, load

MIXTURE = "mixture"
from dwf_cluster.settings import InvalidInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGES = 6
"""Columns of the strip."""


@dataclass(frozen=True)
class Attacked:
    """What the mixture makes of some test images.

    Attributes:
        label: shape (n,), true.
        x: pixels in [0, 1], shape (2, n, channels, height, width): clean and attacked.
        prediction: shape (2, n).
        gate: weights, shape (2, n, experts).
        steps: of the attack.
    """

    label: NDArray[Any]
    x: NDArray[Any]
    prediction: NDArray[Any]
    gate: NDArray[Any]
    steps: int


def attack(run: ExperimentFolder, data_folder: Path) -> Attacked:
    """Attack the trained mixture with the longest PGD of its result table, on the CPU.

    Args:
        run: of the experiment; its checkpoints are read.
        data_folder: where downloaded images lie.

    Raises:
        InvalidInput: if the mixture has no checkpoint.
    """
    import torch

    from dwf_cluster.attacks.ball import Ball
    from dwf_cluster.attacks.gradient import predict
    from dwf_cluster.attacks.pgd import pgd
    from dwf_cluster.data.device import to_float
    from dwf_cluster.data.sources import load as load_images
    from dwf_cluster.defences.build import trained
    from dwf_cluster.models.frozen import frozen
    from dwf_cluster.models.mixture import Mixture
    from dwf_cluster.store import checkpoints

    experiment = run.experiment
    checkpoint = checkpoints.load_latest(run.store, MIXTURE)
    if checkpoint is None:
        raise InvalidInput(f"{run.url}: cannot be used: its mixture has no checkpoint, `--stages joint` makes it")
    images = load_images(experiment.data, data_folder)
    mixture = trained(experiment.models, MIXTURE, images.format, experiment.seed, run.store)
    view = frozen(mixture)
    assert isinstance(view, Mixture)

    x, y = to_float(torch.tensor(images.x_test[:IMAGES])), torch.tensor(images.y_test[:IMAGES])
    ball, steps = Ball("linf", experiment.pgd.epsilon), max(experiment.evaluation.pgd_steps)
    *_, last = pgd(view, x, y, ball, step_size=experiment.pgd.step_size, steps=steps)
    both = (x, last.x.contiguous())
    with torch.no_grad():
        gate = [view.gate(part).numpy() for part in both]
    prediction = [predict(view, part).argmax(1).numpy() for part in both]
    return Attacked(y.numpy(), np.stack([part.numpy() for part in both]), np.stack(prediction), np.stack(gate), steps)


@styled()
def draw(run: ExperimentFolder, shown: Attacked) -> Figure:
    """A column an image: clean, the perturbation (grey is none), attacked, and the gate before and after."""
    experiment, epsilon = run.experiment, run.experiment.pgd.epsilon
    experts = list(experiment.defended.parents)
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
            says = f"{predicted}, not {label}" if wrong else f"{predicted}"
            axes.set_title(says, color=COLOURS[MIXTURE] if wrong else "black", fontsize=8, pad=3)
        place = np.arange(len(experts))
        rows[3, i].barh(place - 0.2, 100 * shown.gate[0, i], height=0.4, color=COLOURS["fgsm-at"], label="clean")
        rows[3, i].barh(place + 0.2, 100 * shown.gate[1, i], height=0.4, color=COLOURS[MIXTURE], label="attacked")
        rows[3, i].set_yticks(place, experts if i == 0 else [""] * len(experts), fontsize=6)
        rows[3, i].set(xlim=(0, 100), ylim=(len(experts) - 0.4, -0.6))
        rows[3, i].tick_params(length=0, labelsize=6)
        rows[3, i].grid(visible=False, axis="y")
    for axes, name in zip(rows[:, 0], ("clean", "perturbation", f"PGD-{shown.steps}", "gate (%)"), strict=True):
        axes.set_ylabel(name)
    figure.suptitle(
        f"The first test images under PGD, epsilon {epsilon:.3g}; above them what the mixture says", fontsize=9
    )
    figure.legend(*rows[3, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main(arguments: Sequence[str]) -> None:
    """Draw the strip of one experiment and print its path."""
    parser = Parser(prog="python -m analysis.strip", description="Test images, attacked, with predictions and gate.")
    parser.add_argument("folder", help="experiment's folder, a path or an fsspec URL")
    parser.add_argument("--out", default="strip.png", help="a .png, .pdf or .svg file, default: strip.png")
    parser.add_argument("--data-folder", default="data", help="folder of downloaded images, default: data")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise InvalidInput(f"--out: {options.out!r} cannot be used: allowed is a name ending in .png, .pdf or .svg")
    runs = [found for group in load(options.folder).groups for found in group.runs]
    if len(runs) > 1:
        raise InvalidInput(
            f"folder: {options.folder!r} cannot be used: it holds {len(runs)} experiments, allowed is one"
        )
    figure = draw(runs[0], attack(runs[0], Path(options.data_folder)))
    content = io.BytesIO()
    figure.savefig(content, format=out.suffix[1:], dpi=300)
    try:
        write_whole(out, content.getvalue())
    except OSError as error:
        raise InvalidInput(f"--out: {options.out!r} cannot be used: {error.strerror}") from None
    print(out)


if __name__ == "__main__":
    sys.exit(run(main))
