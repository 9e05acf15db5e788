"""What the checks for gradient masking share: the model, images, and intermediate results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import Objective, carlini_wagner, cross_entropy, predict
from dwf_cluster.attacks.pgd import Iterate, Remaining, WorstCase, pgd
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.models.deterministic import is_plain


@dataclass(frozen=True)
class WhiteBox:
    """One run of PGD from the clean images, and what the checks read from it. Tensors of bool have shape (n,).

    Attributes:
        clean: the images before the run: a faulty model may overwrite its input.
        logits: of the clean images, shape (n, classes).
        zero_gradients: share of correctly classified images, 0..1, whose gradient is zero everywhere.
        one_step, last: images after one step of length epsilon, and after the last iteration.
        after_one, after_short, after_long: images that are classified correctly after that step, after `steps`
            iterations and after 4 * `steps`.
        left_by_short, left_by_long: images that are classified correctly at every iterate until there.
    """

    clean: torch.Tensor
    logits: torch.Tensor
    zero_gradients: float
    one_step: torch.Tensor
    last: torch.Tensor
    after_one: torch.Tensor
    after_short: torch.Tensor
    after_long: torch.Tensor
    left_by_short: torch.Tensor
    left_by_long: torch.Tensor


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
        others: frozen models by name that images are made on, to be tested on this one.
    """

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    threat: Threat
    steps: int
    generators: Sequence[torch.Generator]
    others: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def ball(self) -> Ball:
        """The allowed images."""
        return Ball(self.threat.norm, self.threat.epsilon)

    @functools.cached_property
    def is_plain(self) -> bool:
        """Of the model: as of `models.deterministic.is_plain`."""
        return is_plain(self.model)

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

    def correct(self, x: torch.Tensor) -> torch.Tensor:
        """Which images the model classifies correctly: bool, shape (n,)."""
        with torch.no_grad():
            correct: torch.Tensor = self.model(x).argmax(1) == self.y
        return correct

    @functools.cached_property
    def white_box(self) -> WhiteBox:
        """PGD of 4 * `steps` iterations from the clean images.

        Raises:
            NotLogits: if the model returns NaN or probabilities.
        """
        model, x, y, ball = self.model, self.x, self.y, self.ball
        clean, logits = x.clone(), predict(model, x.clone())
        worst, after, left = WorstCase(model, x, y, logits), {}, {}
        for iterate in pgd(model, x, y, ball, step_size=self.threat.step_size, steps=4 * self.steps):
            if iterate.step == 0:
                assert iterate.gradient is not None
                one_step = ball.project(x, x + ball.epsilon * ball.direction(iterate.gradient))
                after_one = self.correct(one_step)
                zero = ~iterate.gradient.flatten(1).any(1) & worst.robust
                zero_gradients = float(zero.double().sum() / worst.robust.sum().clamp(min=1))
            worst.see(iterate)
            if iterate.step in (self.steps, 4 * self.steps):
                after[iterate.step] = self.correct(iterate.x)
                left[iterate.step] = worst.robust.clone()
        short, long = self.steps, 4 * self.steps
        states = after_one, after[short], after[long], left[short], left[long]
        return WhiteBox(clean, logits, zero_gradients, one_step, iterate.x, *states)

    def long_run(
        self, rest: Remaining, objective: Objective = cross_entropy, restart: bool = False
    ) -> Iterator[Iterate]:
        """PGD of 4 * `steps` iterations on some images, from a random point of the ball if it is a restart."""
        start = self.ball.random_point(rest.x, rest.generators) if restart else None
        options = {"step_size": self.threat.step_size, "steps": 4 * self.steps, "start": start}
        return pgd(self.model, rest.x, rest.y, self.ball, **options, objective=objective, drop_fooled=True)  # type: ignore[arg-type]

    def attack(self, images: torch.Tensor, run: Callable[[Remaining], Iterator[Iterate]]) -> WorstCase:
        """Attack some of the images: bool, shape (n,). The images of the result that are robust are those left."""
        worst = WorstCase(self.model, self.x, self.y, self.white_box.logits, self.generators)
        worst.robust = images.clone()
        worst.attack(run)
        return worst

    @functools.cached_property
    def restarted(self) -> WorstCase:
        """The images that the long run leaves, after a run of the same length from random points."""
        return self.attack(self.white_box.left_by_long, lambda rest: self.long_run(rest, restart=True))

    @functools.cached_property
    def on_margin(self) -> WorstCase:
        """The images that the long run leaves, after a run of the same length on the margin instead."""
        return self.attack(self.white_box.left_by_long, lambda rest: self.long_run(rest, carlini_wagner))

    @property
    def left_by_white_box(self) -> torch.Tensor:
        """The images that resist the long run, its restart and the run on the margin: bool, shape (n,)."""
        return self.restarted.robust & self.on_margin.robust
