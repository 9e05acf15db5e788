"""Attacks: pure functions of (model, x, y, ball, ...) that yield or return adversarial examples.

Inputs are float NCHW in [0, 1], labels int64; epsilon and step size are in those pixel units. The model must be
frozen (`models.frozen`): evaluation mode, no parameter gradients. Nothing of the model and nothing of the
global random state changes. Random draws come from one generator an image, so no result depends on the batch.

To add an attack: a function here that yields its iterates, and a suite in `evaluation/registry.py` that runs it.
"""
