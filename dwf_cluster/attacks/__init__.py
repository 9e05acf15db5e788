"""Attacks: pure functions of (model, x, y, ...) that return adversarial examples.

Inputs are float32 NCHW in [0, 1], labels int64; epsilon and step size are in those pixel units, L-infinity.
The model must be a frozen view (`frozen`): evaluation mode, no parameter gradients. Nothing of the model and
nothing of the global random state changes.

To add an attack: a function here that returns adversarial examples, its columns in `grid.py`, its call in
`evaluation.py`.
"""

from dwf_cluster.attacks.gradient import NotLogits, check_logits, input_gradient
from dwf_cluster.attacks.linf import fgsm, pgd, pgd_restarts, random_start
from dwf_cluster.attacks.view import frozen

__all__ = ["NotLogits", "check_logits", "fgsm", "frozen", "input_gradient", "pgd", "pgd_restarts", "random_start"]
