"""Signs of gradient masking (Athalye et al. 2018; Carlini et al. 2019): is a robust accuracy worth anything?

To add a check: a generator of `Check` here or in a file beside this one, an entry in `registry.CHECK_FUNCTIONS`, and a
model that has the fault in the tests.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import NotLogits, look_like_probabilities, predict
from dwf_cluster.attacks.pgd import WorstCase, fgsm, pgd
from dwf_cluster.attacks.square import square as square_attack
from dwf_cluster.evaluation.registry import CHECK_FUNCTIONS, CHECK_QUERIES
from dwf_cluster.evaluation.settings import Threat

HUGE = 1.0
"""An L-infinity radius at which an attack can paint any image."""

NOISE = 0.05
"""Accuracy, 0..1, by which two attacks may differ on as few images as are checked."""

RANDOM = 1e-6
"""Change of a deterministic model's outputs from pass to pass, as a share of the largest output."""

FATAL = ("nan", "probabilities", "train_mode")
"""Checks after whose failure no attack would mean anything."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        check: its name.
        value: what was measured.
        limit: the largest value that is no sign of masking.
        meaning: what a larger value means, with the figures.
    """

    check: str
    value: float
    limit: float
    meaning: str

    @property
    def fired(self) -> bool:
        """Whether it is a sign of masking."""
        return not self.value <= self.limit  # NaN is a sign


@dataclass(frozen=True)
class WhiteBox:
    """One run of PGD and what the checks read from it.

    Attributes:
        clean: the images before the run: a faulty model may overwrite its input.
        logits: of the clean images, shape (n, classes).
        worst: the worst case over the run's iterates.
        zero_gradients: share of correctly classified images, 0..1, whose gradient is zero everywhere.
        one_step, last: images after one FGSM step and after the last iteration.
        fgsm, short, long: accuracy, 0..1, after one FGSM step, after `steps` and after 4 * `steps` iterations.
    """

    clean: torch.Tensor
    logits: torch.Tensor
    worst: WorstCase
    zero_gradients: float
    one_step: torch.Tensor
    last: torch.Tensor
    fgsm: float
    short: float
    long: float


@dataclass(frozen=True, eq=False)
class Inspection:
    """A model, images, and intermediate results that several checks share, each computed at its first use.

    Attributes:
        model: as attacks see it: frozen, or any other module.
        x: float in [0, 1], shape (n, channels, height, width); a hundred images are enough.
        y: int64, shape (n,).
        threat: of the PGD that is checked.
        steps: iterations of a short run; a long one has four times as many.
        generators: of random draws, one an image.
    """

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    threat: Threat
    steps: int
    generators: Sequence[torch.Generator]

    @functools.cached_property
    def logits(self) -> torch.Tensor:
        """Outputs for the clean images; not checked."""
        return self.outputs()

    @functools.cached_property
    def randomness(self) -> float:
        """Largest change of an output from pass to pass, as a share of the largest output."""
        return float((self.outputs() - self.logits).abs().max() / self.scale)

    @property
    def scale(self) -> torch.Tensor:
        """The largest output."""
        return self.logits.abs().max().clamp(min=1e-12)

    def outputs(self, images: int | None = None) -> torch.Tensor:
        """Outputs of one more pass over the clean images, `images` at a time."""
        with torch.no_grad():
            parts = torch.split(self.x.clone(), images or len(self.x))
            return torch.cat([self.model(part) for part in parts]) if images else self.model(parts[0])

    def accuracy(self, x: torch.Tensor) -> float:
        """Share of images, 0..1, that the model classifies correctly."""
        with torch.no_grad():
            return float((self.model(x).argmax(1) == self.y).double().mean())

    @functools.cached_property
    def white_box(self) -> WhiteBox:
        """PGD of 4 * `steps` iterations from the clean images.

        Raises:
            NotLogits: if the model returns NaN or probabilities.
        """
        model, x, y, epsilon = self.model, self.x, self.y, self.threat.epsilon
        clean, logits = x.clone(), predict(model, x.clone())
        worst, accuracy = WorstCase(model, x, y, logits, self.generators), {}
        for iterate in pgd(model, x, y, Ball("linf", epsilon), step_size=self.threat.step_size, steps=4 * self.steps):
            if iterate.step == 0:
                assert iterate.gradient is not None
                one_step = fgsm(x, iterate.gradient, epsilon)
                fgsm_accuracy = self.accuracy(one_step)
                zero = ~iterate.gradient.flatten(1).any(1) & worst.robust
                zero_gradients = float(zero.double().sum() / worst.robust.sum().clamp(min=1))
            elif iterate.step in (self.steps, 4 * self.steps):
                accuracy[iterate.step] = self.accuracy(iterate.x)
                last = iterate.x
            worst.see(iterate)
        short, long = accuracy[self.steps], accuracy[4 * self.steps]
        return WhiteBox(clean, logits, worst, zero_gradients, one_step, last, fgsm_accuracy, short, long)

    @functools.cached_property
    def restarted(self) -> torch.Tensor:
        """The worst case over the run and a restart from random points, as images; the run's `worst` is updated."""
        worst, ball = self.white_box.worst, Ball("linf", self.threat.epsilon)
        short_run = functools.partial(
            pgd, self.model, step_size=self.threat.step_size, steps=self.steps, drop_fooled=True
        )
        worst.attack(lambda rest: short_run(rest.x, rest.y, ball, start=ball.random_point(rest.x, rest.generators)))
        return worst.x.clone()


def masking(inspection: Inspection) -> Iterator[Check]:
    """Run every check of `registry.CHECK_FUNCTIONS`, in order; a fatal failure is the last result."""
    for path in CHECK_FUNCTIONS.values():
        function: Callable[[Inspection], Iterator[Check]] = pkgutil.resolve_name(path)
        try:
            for result in function(inspection):
                yield result
                if result.check in FATAL and result.fired:
                    return
        except NotLogits as error:
            yield Check("nan_under_attack", 1.0, 0.0, f"on attacked images {error}")
            return


def nan(inspection: Inspection) -> Iterator[Check]:
    """Outputs that are not finite."""
    share = float((~inspection.logits.isfinite()).any(1).double().mean())
    yield Check("nan", share, 0.0, f"{share:.0%} of outputs hold NaN or infinity")


def probabilities(inspection: Inspection) -> Iterator[Check]:
    """Outputs that are probabilities."""
    value = float(look_like_probabilities(inspection.logits))
    yield Check("probabilities", value, 0.0, "outputs are probabilities, where attacks need logits")


def random(inspection: Inspection) -> Iterator[Check]:
    """Outputs that differ from pass to pass."""
    value = inspection.randomness
    yield Check("random", value, RANDOM, f"outputs change from pass to pass, by {value:.2g} of the largest")


def train_mode(inspection: Inspection) -> Iterator[Check]:
    """Outputs that depend on the rest of the batch; not measurable if they are random."""
    if inspection.randomness > RANDOM:
        return
    in_parts = inspection.outputs(max(2, len(inspection.x) // 3))
    value = float((in_parts - inspection.logits).abs().max() / inspection.scale)
    meaning = f"an image's outputs change with the rest of its batch, by {value:.2g} of the largest"
    yield Check("train_mode", value, 1e-3, meaning)


def zero_gradients(inspection: Inspection) -> Iterator[Check]:
    """Correctly classified images without a gradient."""
    value = inspection.white_box.zero_gradients
    yield Check("zero_gradients", value, 0.01, f"{value:.0%} of correct images have no gradient at all")


def one_step(inspection: Inspection) -> Iterator[Check]:
    """One step that is a better attack than many."""
    run, steps = inspection.white_box, inspection.steps
    meaning = f"PGD-{steps} leaves {run.short:.1%}, one step of the same size {run.fgsm:.1%}"
    yield Check("one_step", run.short - run.fgsm, NOISE, meaning)


def more_steps(inspection: Inspection) -> Iterator[Check]:
    """A short attack that is better than a long one."""
    run, steps = inspection.white_box, inspection.steps
    meaning = f"PGD-{steps} leaves {run.short:.1%}, PGD-{4 * steps} {run.long:.1%}"
    yield Check("more_steps", run.long - run.short, NOISE, meaning)


def restarts(inspection: Inspection) -> Iterator[Check]:
    """Images of the worst case that are classified correctly when they are tested again."""
    run, accuracy = inspection.white_box, inspection.accuracy(inspection.restarted)
    meaning = f"PGD-{4 * inspection.steps} leaves {run.long:.1%}, the worst case over it and a restart {accuracy:.1%}"
    yield Check("restarts", accuracy - run.long, NOISE, meaning)


def perturbation(inspection: Inspection) -> Iterator[Check]:
    """Adversarial images outside of the ball or of [0, 1]."""
    run, epsilon = inspection.white_box, inspection.threat.epsilon
    attacked, ball = (run.one_step, run.last, inspection.restarted), Ball("linf", epsilon)
    moved = max(float(ball.distance(run.clean, images).max()) for images in attacked)
    outside = max(float((images - images.clamp(0, 1)).abs().max()) for images in attacked)
    meaning = f"images moved by up to {moved:.4g} and left [0, 1] by {outside:.4g}, where {epsilon:.4g} is allowed"
    yield Check("perturbation", max(moved - epsilon, outside), 1e-5, meaning)


def black_box(inspection: Inspection) -> Iterator[Check]:
    """Images that only an attack without gradients fools."""
    _ = inspection.restarted  # the white-box attacks end with the restart
    worst, model, epsilon = inspection.white_box.worst, inspection.model, inspection.threat.epsilon
    before = worst.robust.clone()
    worst.attack(lambda rest: square_attack(model, rest.x, rest.y, epsilon, rest.generators, queries=CHECK_QUERIES))
    value = float((before & ~worst.robust).double().mean())
    meaning = f"a black-box attack fools {value:.1%} that resisted the white-box attacks"
    yield Check("black_box", value, NOISE, meaning)


def huge_epsilon(inspection: Inspection) -> Iterator[Check]:
    """Images that resist an attack with an unlimited budget."""
    worst = WorstCase(inspection.model, inspection.x, inspection.y, inspection.white_box.logits)
    long_run = functools.partial(
        pgd, inspection.model, step_size=HUGE / 10, steps=2 * inspection.steps, drop_fooled=True
    )
    worst.attack(lambda rest: long_run(rest.x, rest.y, Ball("linf", HUGE)))
    value = float(worst.robust.double().mean())
    meaning = f"{value:.1%} stand at an epsilon of {HUGE:g}, at which any image can be painted"
    yield Check("huge_epsilon", value, NOISE, meaning)
