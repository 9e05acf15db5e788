"""Signs of gradient masking (Athalye et al. 2018; Carlini et al. 2019): is a robust accuracy worth anything?

The checks of this file look at outputs, gradients and perturbations; those of `attack_checks` compare attacks.

To add a check: a generator of `Check` here or in a file beside this one, an entry in `registry.CHECK_FUNCTIONS`, and a
model that has the fault in the tests.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator

from dwf_cluster.attacks.gradient import NotLogits, look_like_probabilities
from dwf_cluster.evaluation.inspection import Inspection
from dwf_cluster.evaluation.registry import CHECK_FUNCTIONS
from dwf_cluster.evaluation.significance import Check

RANDOM = 1e-6
"""Change of a deterministic model's outputs from pass to pass, as a share of the largest output."""

FATAL = ("nan", "probabilities", "train_mode")
"""Checks after whose failure no attack would mean anything."""


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
    """Outputs that are not finite; training stops at such weights, so a plain model has none."""
    share = float((~inspection.logits.isfinite()).any(1).double().mean())
    yield _of_outputs(inspection, "nan", share, 0.0, f"{share:.0%} of outputs hold NaN or infinity")


def probabilities(inspection: Inspection) -> Iterator[Check]:
    """Outputs that are probabilities."""
    value = float(look_like_probabilities(inspection.logits))
    meaning = "outputs are probabilities, where attacks need logits"
    yield _of_outputs(inspection, "probabilities", value, 0.0, meaning)


def random(inspection: Inspection) -> Iterator[Check]:
    """Outputs that differ from pass to pass."""
    value = inspection.randomness
    meaning = f"outputs change from pass to pass, by {value:.2g} of the largest"
    yield _of_outputs(inspection, "random", value, RANDOM, meaning)


def train_mode(inspection: Inspection) -> Iterator[Check]:
    """Outputs that depend on the rest of the batch; not measurable if they are random."""
    if inspection.randomness > RANDOM:
        return
    in_parts = inspection.outputs(max(2, len(inspection.x) // 3))
    value = float((in_parts - inspection.logits).abs().max() / inspection.scale)
    meaning = f"an image's outputs change with the rest of its batch, by {value:.2g} of the largest"
    yield _of_outputs(inspection, "train_mode", value, 1e-3, meaning)


def zero_gradients(inspection: Inspection) -> Iterator[Check]:
    """Correctly classified images without a gradient, also for want of a path from the outputs to the pixels."""
    run = inspection.white_box
    value, correct = run.zero_gradients, int((run.logits.argmax(1) == inspection.y).sum())
    meaning = f"{value:.0%} of correct images have no gradient at all"
    yield Check("zero_gradients", value, 0.01, meaning, could_fire=correct > 0)


def perturbation(inspection: Inspection) -> Iterator[Check]:
    """Adversarial images outside of the ball or of [0, 1]: some models overwrite the images that they are given."""
    run, ball = inspection.white_box, inspection.ball
    attacked = (run.one_step, run.last, inspection.restarted.x)
    moved = max(float(ball.distance(run.clean, images).max()) for images in attacked)
    outside = max(float((images - images.clamp(0, 1)).abs().max()) for images in attacked)
    meaning = f"images moved by up to {moved:.4g} and left [0, 1] by {outside:.4g}, where {ball.epsilon:.4g} is allowed"
    # In L1 and L2 the length is a sum, whose rounding grows with it.
    limit = 1e-5 * max(1.0, ball.epsilon)
    yield _of_outputs(inspection, "perturbation", max(moved - ball.epsilon, outside), limit, meaning)


def _of_outputs(inspection: Inspection, check: str, value: float, limit: float, meaning: str) -> Check:
    """A check that cannot fire for a plain model."""
    fired = not value <= limit
    return Check(check, value, limit, meaning, could_fire=fired or not inspection.is_plain)
