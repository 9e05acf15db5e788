"""Square Attack, L-infinity (Andriushchenko et al. 2020, algorithms 1 and 2): random squares, no gradient."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import margin, predict
from dwf_cluster.attacks.pgd import Iterate

_FIRST_SHARE = 0.8
"""Share of an image's pixels that the first squares cover."""

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which that share is halved."""


def square(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    epsilon: float,
    generators: Sequence[torch.Generator],
    *,
    queries: int = 5000,
    planned: int | None = None,
    authors_code: bool = False,
) -> Iterator[Iterate]:
    """Change one random square of each image at a time, and keep what lowers its margin.

    It has more than seven parameters because AutoAttack varies three of them.

    Args:
        model: pixels in, logits out; only its outputs are used.
        x, y: as for `pgd`.
        epsilon: radius of the L-infinity ball, pixels in [0, 1].
        generators: one an image; no draw depends on the batch.
        queries: number of forward passes.
        planned: forward passes that the squares' sizes are scheduled over; by default `queries`.
        authors_code: squares do not touch the last row and column, and their sizes change one query later, as in the
            authors' code; else as in the paper.

    Yields:
        The candidates of each query, for the images not yet fooled.

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    ball, (channels, height, width) = Ball("linf", epsilon), x.shape[1:]
    index = torch.arange(len(x), device=x.device)
    signs = [torch.randint(2, (channels, 1, width), generator=g) * 2 - 1 for g in generators]
    # Row, column and a sign for each channel, of every query.
    draws = torch.stack([torch.rand((queries, 2 + channels), generator=g) for g in generators]).to(x.device)
    tried = ball.project(x, x + epsilon * torch.stack(signs).to(x))  # vertical stripes
    best, lowest = tried, torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    for query in range(1, queries + 1):
        logits = predict(model, tried)
        yield Iterate(query, index, tried, logits)
        loss = margin(logits, y)
        best = torch.where((loss < lowest)[:, None, None, None], tried, best)
        lowest = torch.minimum(loss, lowest)
        keep = logits.argmax(1) == y
        if query == queries or not bool(keep.any()):
            return
        if not bool(keep.all()):
            x, y, index, best, lowest, draws = (t[keep] for t in (x, y, index, best, lowest, draws))
        passed = (query - authors_code) * 10_000 // (planned or queries)
        share = _FIRST_SHARE / 2 ** bisect_left(_HALVINGS, passed)
        side = min(max(round((share * height * width) ** 0.5), 1), height, width)
        places = ((0, height - side + (not authors_code)), (1, width - side + (not authors_code)))
        top, left = ((draws[:, query, i, None] * count).long() for i, count in places)
        high, wide = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
        change = torch.where(draws[:, query, 2:] < 0.5, -2 * epsilon, 2 * epsilon)[:, :, None, None]
        tried = ball.project(x, best + change * (high[:, None, :, None] & wide[:, None, None]))
