"""State that all processes of a run share: which experiments were asked to stop, and which worker has which device.

Needs no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """The device that one worker computes on.

    Attributes:
        job: folder of the experiment, and name of the job.
        worker: its rank in the job, from 0.
        node: host name.
        device: `cpu`, or the GPU's name and UUID.
        share: of a GPU, 0..1; 0 on a CPU.
        hardware: what torch computes on: `cpu`, or the GPU's name.
        process: its process ID.
        cudnn: version of its cuDNN; None on a CPU.
    """

    job: tuple[str, str]
    worker: int
    node: str
    device: str
    share: float
    hardware: str
    process: int
    cudnn: str | None = None

    def __str__(self) -> str:
        return f"{self.node}: {self.device}"


class Control:
    """Ray actor, one for each run.

    Ray may kill and restart it at any time, without its state; the driver restores the state with each `news`.
    """

    def __init__(self) -> None:
        self._stopped: set[str] = set()
        self._changed = asyncio.Condition()
        self._claims: dict[tuple[tuple[str, str], int], Claim] = {}
        self._news: list[Claim] = []

    async def stop(self, folders: Iterable[str]) -> None:
        """Ask the trainings of these experiments to save what they have and to end."""
        async with self._changed:
            self._stopped |= set(folders)
            self._changed.notify_all()

    async def stopped(self, known: int = -1) -> set[str]:
        """Wait until more than `known` experiments have been asked to stop; return their folders."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._stopped) > known)
            return self._stopped

    async def claim(self, claim: Claim) -> str | None:
        """Record a claim, or return why the device is not free. The claim of a retry replaces the last one."""
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
            stopped: folders of the experiments that the calling driver has asked to stop.
            claims: of the driver's running jobs.
        """
        # Before anything is awaited: a release that was sent after this call must not be overtaken.
        for claim in claims:
            self._claims.setdefault((claim.job, claim.worker), claim)
        news, self._news = self._news, []
        await self.stop(stopped)
        return news
