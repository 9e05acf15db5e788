"""A running Ray: one of our own on this machine, or one that is there already; and jobs on it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dwf_cluster.cluster import failures, temporary
from dwf_cluster.cluster.control import Claim, Control
from dwf_cluster.cluster.events import Ended, Note, Started
from dwf_cluster.cluster.memory import Memory
from dwf_cluster.plan.jobs import Job
from dwf_cluster.plan.resources import Limits, Resources, alike_nodes
from dwf_cluster.plan.schedule import Allocation, Schedule
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import LockLost, StorageFailed, Store

STOP_SECONDS = 60.0
"""How long a run that is to stop waits for trainings to save what they have."""

_CONTROL_SECONDS = 10.0
"""How long the driver waits for an answer of the control actor, which may be starting again."""


class RayNotStarted(RuntimeError):
    """Ray did not start on this machine. Its text is one line."""


class Cluster:
    """Runs jobs on the Ray that this process is connected to.

    Attributes:
        resources: what it has.
        dashboard, token_file: where people look on, and what they need for it.
        control: the `Control` actor of the run.
    """

    def __init__(self, resources: Resources, dashboard: str = "", token_file: str = "", control: Any = None) -> None:
        import ray

        self._ray = ray
        # Outside of what a trial has asked for, which is nothing to compute with.
        anywhere = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placement_group=None)
        # Ray reuses the processes of this function, which never compute on a GPU.
        self._task = ray.remote(max_retries=failures.BY_RAY, scheduling_strategy=anywhere)(_run_job)
        # CUDA reads CUDA_VISIBLE_DEVICES once in a process, so each call has a process of its own. `options` cannot
        # set `max_calls`.
        self._gpu_task = ray.remote(max_retries=failures.BY_RAY, max_calls=1, num_gpus=1, scheduling_strategy=anywhere)(
            _run_job
        )
        # On this node: should another be lost, the run still has it.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        # Its calls, several a second, would bury the jobs in the dashboard.
        quiet = {"enable_task_events": False, "num_cpus": 0, "scheduling_strategy": here}
        # Ray may kill it at low memory. It starts again, and `_news` gives it back what it knew.
        lasting = {"max_restarts": -1, "max_task_retries": -1}
        self.control = control or ray.remote(Control).options(**quiet, **lasting).remote()
        self._stopped: set[str] = set()
        self._claims: dict[tuple[tuple[str, str], int], Claim] = {}
        self._asked: Any = None
        self.resources = resources
        self.dashboard = dashboard
        self.token_file = token_file

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process of this Ray it is made anew, of the same run."""
        return Cluster, (self.resources, self.dashboard, self.token_file, self.control)

    def stop(self, folders: Iterable[str]) -> None:
        """Ask all processes to stop what they do for these experiments; trainings save what they have."""
        self._stopped |= set(folders)
        self._answer(self._ask("stop", self._stopped), _CONTROL_SECONDS)

    def is_stopped(self, folder: str) -> bool:
        """Whether that was asked for an experiment."""
        self._stopped |= self._answer(self._ask("stopped"), _CONTROL_SECONDS) or set()
        return folder in self._stopped

    def share(self, value: Any) -> Any:
        """Put a value where every task of this Ray can read it; returns the reference."""
        return self._ray.put(value)

    def run(
        self,
        jobs: Sequence[Job],
        allocations: Mapping[Job, Allocation],
        stores: Mapping[str, Store],
        images: Any,
        title: Callable[[Job], str],
        stopping: Callable[[], bool],
    ) -> Generator[Started | Claim | Ended | Note | None, None, None]:
        """Run jobs as `schedule` has them; those that fail are tried again as `failures` has it.

        Args:
            jobs: to run.
            allocations: what each of them gets.
            stores: where the jobs write, by the folder of their experiment.
            images: reference to a `data.sources.Images`.
            title: a job's name in the dashboard.
            stopping: says whether the run is to stop: then no job is started, trainings save what they have, at
                the same step on all their workers, and evaluations are given up.

        Yields:
            What was started, who computes where, what ended, lines for the user, and None about once a second. If
            the caller stops early, what still runs is cancelled.
        """
        schedule = Schedule(jobs, allocations, self.resources.slots)
        attempts, memory = failures.Attempts(), Memory(self._node_memory())
        running: dict[Any, Job] = {}
        stranded: dict[Any, float] = {}
        deadline, looked = float("inf"), time.monotonic()

        def submit(job: Job) -> None:
            need = memory.need(job, allocations[job])
            running[self._submit(job, title(job), allocations[job], stores[job.folder], images, need)] = job

        try:
            while time.monotonic() < deadline:
                if stopping() and deadline == float("inf"):
                    deadline = time.monotonic() + STOP_SECONDS
                    self._stop(running)
                while not stopping() and (job := schedule.start()):
                    submit(job)
                    yield Started(job)
                if not running:
                    return
                ended, _ = self._ray.wait(list(running), timeout=0.2)
                yield from self._news(running.values())
                for reference in ended:
                    job = running.pop(reference)
                    self._release(job)
                    failure = self._failure(reference, job, title(job))
                    if failure and not stopping() and attempts.again(job, failure.kind):
                        memory.failed(job, failure.kind)
                        submit(job)
                        yield Note(f"{title(job)}: {failure.reason}; tried again")
                        continue
                    store = stores[job.folder]
                    outcome = self._outcome(reference, job, failure, attempts, store, stopping())
                    schedule.end(job, outcome.state == "done")
                    memory.learn(job, outcome.state == "done", store)
                    yield outcome
                if time.monotonic() > looked + 1:
                    looked = time.monotonic()
                    for event in self._stranded(running, stranded, allocations, title):
                        if isinstance(event, Ended):
                            schedule.end(event.job, done=False)
                        yield event
                    yield None
        finally:
            for reference in running:
                self._ray.cancel(reference, force=True)

    def _submit(self, job: Job, title: str, place: Allocation, store: Store, images: Any, memory: int) -> Any:
        if place.workers or job.copy_of:
            # With workers of its own, Train asks for what they need; the task that waits for them holds nothing.
            # Neither does one that only copies.
            task, holds = self._task, {"num_cpus": 0.0}
        elif place.gpus:
            task, holds = self._gpu_task, {"num_cpus": place.cpus, "num_gpus": place.gpus}
        else:
            task, holds = self._task, {"num_cpus": place.cpus}
        if memory:
            holds["memory"] = memory
        task = task.options(name=title, label_selector=place.label_selector, **holds)
        return task.remote(job, store, [images], place, self.control)

    def _failure(self, reference: Any, job: Job, title: str) -> failures.Failure | None:
        """Why a job that has ended failed; None if it did not."""
        try:
            self._ray.get(reference)
        except Exception as error:  # of any class: Ray raises what the job raised
            hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in self._ray.nodes()}
            return failures.failure(error, job, title, hosts)
        return None

    def _outcome(
        self,
        reference: Any,
        job: Job,
        failure: failures.Failure | None,
        attempts: failures.Attempts,
        store: Store,
        stopping: bool,
    ) -> Ended:
        if failure is None:
            return Ended(job, "done" if self._ray.get(reference) else "stopped")
        if stopping:
            return Ended(job, "stopped")
        count = attempts.count(job)
        tried = f"; tried {count} times" if count > 1 else ""
        return Ended(job, "failed", f"{failure.reason}{tried}{self._keep_log(reference, job, failure, store)}")

    def _keep_log(self, reference: Any, job: Job, failure: failures.Failure, store: Store) -> str:
        """See that the log of a failed job is in the store; returns what to add to the reason."""
        name = failures.log_name(job.file)
        try:
            if failure.killed:  # it could not write its log itself
                store.write(name, failures.log(failure.text, _worker_log(failure, reference)))
            elif store.size(name) is None:
                return "; no log: the job could not write it"
        except (StorageFailed, LockLost) as error:
            return f"; no log: {error}"
        return f"; log: {store.path(name)}"

    def _release(self, job: Job) -> None:
        """Forget the claims of a job, or of its last attempt."""
        key = job.folder, job.name
        self._claims = {worker: claim for worker, claim in self._claims.items() if claim.job != key}
        self._ask("release", key)

    def _news(self, running: Iterable[Job]) -> list[Claim]:
        """The claims since the last call; those of running jobs are kept.

        The driver tells the control actor what it knows, as that may have been started again. Should it be
        starting now, its answer comes with a later call.
        """
        self._asked = self._asked or self._ask("news", self._stopped, list(self._claims.values()))
        claims = self._answer(self._asked, 1)
        if claims is None:
            return []
        self._asked = None
        keys = {(job.folder, job.name) for job in running}
        self._claims |= {(claim.job, claim.worker): claim for claim in claims if claim.job in keys}
        return list(claims)

    def _ask(self, method: str, *arguments: Any) -> Any:
        # Without Ray's retries, each of which would be told to the user: what is lost here is said again.
        return getattr(self.control, method).options(max_task_retries=0).remote(*arguments)

    def _answer(self, reference: Any, seconds: float) -> Any:
        """What the control actor answers; None if it does not in time."""
        try:
            return self._ray.get(reference, timeout=seconds)
        except self._ray.exceptions.GetTimeoutError:
            return None
        except self._ray.exceptions.RayError:  # its node was lost with it
            self._asked = None
            return None

    def _node_memory(self) -> int:
        """Bytes that tasks can reserve on every node."""
        nodes = (node["Resources"] for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
        return int(min((node.get("memory", 0) for node in nodes), default=0))

    def _stranded(
        self,
        running: dict[Any, Job],
        since: dict[Any, float],
        allocations: Mapping[Job, Allocation],
        title: Callable[[Job], str],
    ) -> Iterator[Ended | Note]:
        """Give up jobs that no node that is left could hold, after `failures.NODE_PATIENCE`."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for reference, job in list(running.items()):
            if fits(allocations[job], nodes):
                since.pop(reference, None)
                continue
            lacking = f"{failures.NODE_LOST.name}: no nodes are left that can hold {allocations[job]}"
            if reference not in since:
                since[reference] = time.monotonic()
                yield Note(f"{title(job)}: {lacking}; it waits for them for {failures.NODE_PATIENCE:g} s")
            if time.monotonic() >= since[reference] + failures.NODE_PATIENCE:
                del running[reference], since[reference]
                self._ray.cancel(reference, force=True)
                yield Ended(job, "failed", lacking)

    def _stop(self, running: Mapping[Any, Job]) -> None:
        self.stop(job.folder for job in running.values())
        for reference, job in running.items():
            if not job.is_training:
                self._ray.cancel(reference, force=True)


def _run_job(job: Job, store: Store, images: list[Any], place: Allocation, control: Any) -> bool:
    # Imports torch only in the worker. The reference comes in a list, so that Ray does not resolve it here.
    from dwf_cluster.cluster.tasks import run_job

    return run_job(job, store, images[0], place, control)


def fits(place: Allocation, nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether nodes with these resources can hold a job, if nothing else runs on them."""
    wanted = {"CPU": place.cpus, "GPU": place.gpus}
    slots = (min(int(node.get(kind, 0) / share + 1e-9) for kind, share in wanted.items() if share) for node in nodes)
    return sum(slots) >= max(1, place.workers)


def _worker_log(failure: failures.Failure, reference: Any) -> Iterator[str]:
    """What the process of a job that was killed had written, as far as Ray's dashboard can tell."""
    from ray.util import state

    try:
        node, pid = failure.node, failure.pid
        if pid is None:
            task = state.get_task(reference.task_id().hex())
            task = task[-1] if isinstance(task, list) else task
            node, pid = (task.node_id, task.worker_pid) if task else ("", None)
        for suffix in ("out", "err") if pid else ():
            yield from state.get_log(node_id=node, pid=pid, suffix=suffix, tail=-1, timeout=10)
    except Exception as error:  # of any class: requests', the dashboard's, Ray's
        yield f"(its output cannot be had: {failures.last_line(str(error))})"


@contextmanager
def local(resources: Resources) -> Iterator[Cluster]:
    """Start Ray on this machine, for this process alone, and stop it again.

    Its files, and the token that its services ask for, lie in a temporary folder that only the user can read.

    Raises:
        InvalidInput: if the temporary folder cannot be used.
        RayNotStarted: if Ray does not start.
    """
    with temporary.folder(for_sockets=True) as folder:
        temporary.write_token(folder, secrets.token_hex(32))
        temporary.set_environment(folder)
        # Off, as on laptops by default: no Ray across machines, so all that Ray starts listens on 127.0.0.1.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        import ray

        try:
            with temporary.used_by_children(folder):
                context = _start(
                    address="local",
                    num_cpus=resources.cpus,
                    num_gpus=resources.gpus,
                    include_dashboard=True,
                    dashboard_host="127.0.0.1",
                    _temp_dir=f"{folder}/ray",  # Ray opens its own folder to everyone, ours stays closed
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            yield Cluster(resources, f"http://{context.dashboard_url}", f"{folder}/token")
        finally:
            ray.shutdown()


def _start(**options: Any) -> Any:
    """`ray.init`, tried again as a driver is: Ray gives its parts fixed times to start, too short on a busy machine.

    Raises:
        RayNotStarted: if the last attempt fails too.
    """
    import ray

    attempts = 1 + (failures.DRIVER.retries or 0)
    for _ in range(attempts):
        try:
            return ray.init(**options)
        except Exception as error:  # Ray raises this very class, with the last lines of a log
            reason = failures.last_line(failures.clean(str(error)))
            ray.shutdown()
    raise RayNotStarted(f"Ray did not start in {attempts} attempts: {reason}")


@contextmanager
def attached(address: str, limits: Limits) -> Iterator[Cluster]:
    """Connect to a Ray that is running, and leave it running.

    Of its nodes it uses the largest set that is alike, as `placement.alike_nodes` says, and prints what it leaves out.

    Args:
        address: `auto`, `HOST:PORT` or `ray://HOST:PORT`.
        limits: of what jobs get.

    Raises:
        InvalidInput: if there is no Ray at that address, or it has no room for the workers.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"--address: {address!r} cannot be reached: {reason}") from None
    try:
        resources, line = alike_nodes(ray.nodes(), limits)
        if line:
            print(line, flush=True)
        dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        yield Cluster(resources, dashboard, os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"))
    finally:
        ray.shutdown()
