"""What all processes of a run agree on: whether it is to stop, and who computes on which device. Needs no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One worker's word on what it computes on.

    Attributes:
        job: folder of the experiment, and name of the job.
        worker: its rank in the job, from 0.
        node: host name.
        device: `cpu`, or the GPU's name and UUID.
        share: of a GPU, 0..1; 0 on a CPU.
        hardware: what torch computes on: `cpu`, or the GPU's name.
        process: its process ID.
    """

    job: tuple[str, str]
    worker: int
    node: str
    device: str
    share: float
    hardware: str
    process: int

    def __str__(self) -> str:
        return f"{self.node}: {self.device}"


class Control:
    """Ray actor, one for each run.

    It may be killed and started again at any time, without what it knew: the driver tells it with each `news`.
    """

    def __init__(self) -> None:
        self._stopped: set[str] = set()
        self._changed = asyncio.Condition()
        self._claims: dict[tuple[tuple[str, str], int], Claim] = {}
        self._news: list[Claim] = []

    async def stop(self, folders: Iterable[str]) -> None:
        """Ask every training of these experiments to save what it has and end."""
        async with self._changed:
            self._stopped |= set(folders)
            self._changed.notify_all()

    async def stopped(self, known: int = -1) -> set[str]:
        """Folders of the experiments that are to stop, as soon as they are more than so many."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._stopped) > known)
            return self._stopped

    async def claim(self, claim: Claim) -> str | None:
        """Note who computes where, or return why the device has no room for it. A retry's claim replaces the last."""
        self._claims.pop((claim.job, claim.worker), None)
        sharing = [c for c in self._claims.values() if (c.node, c.device) == (claim.node, claim.device)]
        if sum(c.share for c in (*sharing, claim)) <= 1 + 1e-9:
            self._claims[claim.job, claim.worker] = claim
            self._news.append(claim)
            return None
        others = ", ".join(sorted({f"{c.job[1]} of {c.job[0]}" for c in sharing if c.job != claim.job}))
        return f"{claim.device} on {claim.node} is not free: taken by {others or 'another worker of this job'}"

    async def release(self, job: tuple[str, str]) -> None:
        """Forget the claims of a job that has ended."""
        self._claims = {key: claim for key, claim in self._claims.items() if claim.job != job}

    async def claims(self, job: tuple[str, str]) -> list[Claim]:
        """The claims of a job's workers, in the order of their ranks."""
        return [claim for _, claim in sorted(self._claims.items()) if claim.job == job]

    async def news(self, stopped: Iterable[str] = (), claims: Iterable[Claim] = ()) -> list[Claim]:
        """The claims since the last call.

        Args:
            stopped: folders of the experiments that the asking driver knows to be asked to stop.
            claims: of its running jobs, as far as it knows them.
        """
        # Before anything is awaited: a release that was sent after this call must not be overtaken.
        for claim in claims:
            self._claims.setdefault((claim.job, claim.worker), claim)
        news, self._news = self._news, []
        await self.stop(stopped)
        return news
