"""What all processes of a run agree on: whether it is to stop, and who computes on which device. Needs no torch."""

from __future__ import annotations

import asyncio

from dwf_cluster.cluster.ray import Claim


class Control:
    """Ray actor, one for each run."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._claims: dict[tuple[tuple[str, str], int], Claim] = {}
        self._news: list[Claim] = []

    async def stop(self) -> None:
        """Ask every training to save what it has and end."""
        self._stop.set()

    async def stopped(self) -> None:
        """Return when `stop` has been called."""
        await self._stop.wait()

    async
