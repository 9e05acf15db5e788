"""What all processes of a run agree on: whether it is to stop, and who computes on which device."""

from __future__ import annotations

import asyncio
import platform
import threading
from functools import cache
from typing import Any

import ray
import torch

from dwf_cluster.cluster.ray import Claim
from dwf_cluster.cluster.schedule import Placement


class DeviceShared(RuntimeError):
    """A worker was given a device that others have already. Its text names device, node and both."""


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

    async def claim(self, claim: Claim) -> str | None:
        """Note who computes where; returns the complaint if the device has no room for it. A retry claims anew."""
        self._claims[claim.job, claim.worker] = claim
        self._news.append(claim)
        sharing = [c for c in self._claims.values() if (c.node, c.device) == (claim.node, claim.device)]
        if sum(c.share for c in sharing) <= 1 + 1e-9:
            return None
        others = ", ".join(sorted({f"{c.job[1]} of {c.job[0]}" for c in sharing if c.job != claim.job}))
        return f"{claim.device} on {claim.node} is not free: taken by {others or 'another worker of this job'}"

    async def release(self, job: tuple[str, str]) -> None:
        """Forget the claims of a job that has ended."""
        self._claims = {key: claim for key, claim in self._claims.items() if claim.job != job}

    async def devices(self, job: tuple[str, str]) -> list[str]:
        """What a job's workers compute on, in the order of their ranks."""
        return [str(claim) for _, claim in sorted(self._claims.items()) if claim.job == job]

    async def news(self) -> list[Claim]:
        """The claims since this was last asked."""
        news, self._news = self._news, []
        return news


def claim(control: Any, job: tuple[str, str], worker: int, place: Placement) -> None:
    """Say which device this process got.

    Raises:
        DeviceShared: if it is not free.
    """
    complaint = ray.get(control.claim.remote(Claim(job, worker, platform.node(), _device(place), place.gpus)))
    if complaint:
        raise DeviceShared(complaint)


def _device(place: Placement) -> str:
    if not place.gpus:
        return "cpu"
    if not torch.cuda.is_available():  # Ray was told of GPUs that this machine does not have
        return "GPU " + ",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"])
    return f"{torch.cuda.get_device_name(0)} GPU-{torch.cuda.get_device_properties(0).uuid}"


@cache
def stopping(control: Any) -> threading.Event:
    """An event that is set in this process as soon as the run is to stop."""
    event = threading.Event()

    def wait() -> None:
        try:
            ray.get(control.stopped.remote())
        except ray.exceptions.RayError:  # the run is over
            return
        event.set()

    threading.Thread(target=wait, daemon=True).start()
    return event
