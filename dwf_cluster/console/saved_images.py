"""`dwf evaluate --from`: the accuracy of a model on adversarial images that were saved before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from dwf_cluster.attacks.gradient import NotLogits, predict
from dwf_cluster.console.tables import show
from dwf_cluster.data.device import to_float
from dwf_cluster.data.sources import Images
from dwf_cluster.evaluation.adversarial import AdversarialImages, read, verify
from dwf_cluster.evaluation.merge import wilson
from dwf_cluster.evaluation.subject import isolated, prepare
from dwf_cluster.models.frozen import frozen
from dwf_cluster.settings import InvalidInput, printable

Tested = tuple[AdversarialImages, NDArray[np.int64]]
"""Images, and the model's prediction for each."""


def show_accuracies(
    files: Sequence[Path], model: nn.Module, images: Images, device: str | None, batch_size: int
) -> None:
    """Verify the files, test the model on their images, and print its accuracy for each column.

    Args:
        files: of adversarial images.
        model: pixels in [0, 1] in, logits out.
        images: give the clean test images.
        device: that computes; None: the model's own.
        batch_size: images at once.

    Raises:
        InvalidInput: if a file or the model cannot be used.
    """
    tested: list[Tested] = []
    for file in files:
        saved = read(file)
        verify(saved, images.x_test, images.y_test, file)
        tested.append((saved, _predictions(saved, model, device, batch_size)))
    total = sum(len(saved) for saved, _ in tested)
    table = Table(
        title=f"Accuracy in percent on {total} saved images, each within its ball",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("made on", "attack"):
        table.add_column(heading, no_wrap=True)
    for heading in ("norm", "epsilon", "steps", "images", "accuracy", "95 % interval", "when saved", "same answers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in _rows(tested):
        table.add_row(*cells)
    show(Console(), table)
    differ = sum(int((predicted != saved.prediction).sum()) for saved, predicted in tested)
    if differ == 0:
        print("every answer is the one that was saved: this is the model that the images were made on, or equals it")
    else:
        print(
            f"{differ} of {total} answers differ from the saved ones: another model, other weights, or images rounded "
            "to uint8"
        )


def _predictions(saved: AdversarialImages, model: nn.Module, device: str | None, batch_size: int) -> NDArray[np.int64]:
    try:
        with isolated(0):
            subject = prepare(model, saved.images, saved.label, device, batch_size)
            attacked, parts = frozen(subject.model), []
            for start in range(0, len(saved), batch_size):
                batch = torch.tensor(subject.x[start : start + batch_size], device=subject.device)
                x = to_float(batch) if batch.dtype == torch.uint8 else batch
                parts.append(predict(attacked, x).argmax(1).cpu().numpy())
    except NotLogits as error:
        raise InvalidInput(f"--model: cannot be used: {error}") from None
    return np.concatenate(parts)


def _rows(tested: Sequence[Tested]) -> Iterator[tuple[str, ...]]:
    """Cells of each column of the saved images, in the order of the files."""
    frames = [
        pd.DataFrame(
            {
                **{name: getattr(saved, name) for name in ("source", "attack", "norm", "epsilon", "steps")},
                "right": predicted == saved.label,
                "before": saved.prediction == saved.label,
                "same": predicted == saved.prediction,
            }
        )
        for saved, predicted in tested
    ]
    columns = pd.concat(frames).groupby(["source", "attack", "norm", "epsilon", "steps"], sort=False)
    for key, shares in columns:
        source, attack, norm, epsilon, steps = map(str, key)
        right, count = int(shares.right.sum()), len(shares)
        low, high = wilson(right, count)
        yield (
            printable(source, 40),
            printable(attack, 40),
            norm,
            f"{float(epsilon):.4g}",
            steps.replace("-1", ""),
            str(count),
            f"{100 * right / count:.1f}",
            f"[{100 * low:.1f}, {100 * high:.1f}]",
            f"{100 * shares.before.mean():.1f}",
            f"{100 * shares.same.mean():.1f}",
        )
