"""Run jobs on the Ray cluster that this process is connected to (`connect.py` connects it)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dwf_cluster.cluster import failures
from dwf_cluster.cluster.control import Claim, Control
from dwf_cluster.cluster.events import Ended, Note, Started
from dwf_cluster.cluster.memory import Memory
from dwf_cluster.plan.jobs import Job
from dwf_cluster.plan.resources import Resources
from dwf_cluster.plan.schedule import Allocation, Schedule
from dwf_cluster.store import LockLost, StorageFailed, Store

STOP_SECONDS = 60.0
"""How long a run that was asked to stop waits for trainings to save what they have."""

_CONTROL_SECONDS = 10.0
"""How long the driver waits for an answer of the control actor, which may be restarting."""


class Cluster:
    """Runs jobs on the Ray cluster that this process is connected to.

    Attributes:
        resources: of the cluster.
        dashboard: URL of Ray's dashboard; empty if it has none.
        token_file: holds the token that the dashboard asks for.
        control: the `Control` actor of the run.
    """

    def __init__(self, resources: Resources, dashboard: str = "", token_file: str = "", control: Any = None) -> None:
        import ray

        # Ray prints the error of a job whose result nobody reads, as of those that end after the run has failed.
        # Each job stores its log, and the run prints why it failed.
        os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
        self._ray = ray
        # A trial of a sweep has a placement group without resources to compute with; jobs run outside of it.
        anywhere = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placement_group=None)
        options: dict[str, Any] = {"max_retries": failures.BY_RAY, "scheduling_strategy": anywhere}
        # Ray reuses the processes of this function, which never compute on a GPU.
        self._task = ray.remote(**options)(_run_job)
        # A process reads CUDA_VISIBLE_DEVICES only once, so each call has a process of its own, and runs several jobs.
        # `options` cannot set `max_calls`. Each result can be read as soon as it is yielded.
        self._gpu_task = ray.remote(max_calls=1, num_gpus=1, num_returns="streaming", **options)(_run_jobs)
        # On this node: the run must not lose the actor together with another node.
        on_this_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        # Without task events: several calls a second would bury the jobs in the dashboard.
        quiet = {"enable_task_events": False, "num_cpus": 0, "scheduling_strategy": on_this_node}
        # Ray may kill the actor at low memory. It restarts, and `_new_claims` restores its state.
        lasting = {"max_restarts": -1, "max_task_retries": -1}
        self.control = control or ray.remote(Control).options(**quiet, **lasting).remote()
        self._stopped: set[str] = set()
        self._claims: dict[tuple[tuple[str, str], int], Claim] = {}
        self._pending_news: Any = None
        self.resources = resources
        self.dashboard = dashboard
        self.token_file = token_file

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickled in another process of the same Ray, it is a connection of the same run."""
        return Cluster, (self.resources, self.dashboard, self.token_file, self.control)

    def stop(self, folders: Iterable[str]) -> None:
        """Ask all processes to stop working on these experiments; trainings save what they have."""
        self._stopped |= set(folders)
        self._answer(self._call("stop", self._stopped), _CONTROL_SECONDS)

    def is_stopped(self, folder: str) -> bool:
        """Whether an experiment was asked to stop."""
        self._stopped |= self._answer(self._call("stopped"), _CONTROL_SECONDS) or set()
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
        """Run jobs in the order of `Schedule`; retry those that fail as `failures` says.

        Args:
            jobs: to run.
            allocations: of the jobs.
            stores: that the jobs write to, by the folder of their experiment.
            images: reference to a `data.sources.Images`.
            title: returns a job's name in the dashboard.
            stopping: says whether the run was asked to stop. Then no job is started, trainings save what they have,
                at the same step on all their workers, and evaluations are cancelled.

        Yields:
            The events, and None about once a second. If the caller stops early, running jobs are cancelled.
        """
        schedule = Schedule(jobs, allocations, self.resources.slots)
        running = _RunningJobs(self, allocations, stores, images, title)
        deadline, checked = float("inf"), time.monotonic()
        try:
            while time.monotonic() < deadline:
                if stopping() and deadline == float("inf"):
                    deadline = time.monotonic() + STOP_SECONDS
                    running.stop()
                while not stopping() and (job := schedule.start()):
                    running.submit([job, *schedule.start_after(job)])
                    yield Started(job)
                if not running.jobs:
                    return
                ended, _ = self._ray.wait(list(running.jobs), timeout=0.2)
                yield from self._new_claims(job for jobs in running.jobs.values() for job in jobs)
                events: list[Ended | Note | None] = [running.end(task, stopping()) for task in ended]
                if time.monotonic() > checked + 1:
                    checked = time.monotonic()
                    events += [*running.give_up_stranded(), None]
                for event in events:
                    yield event
                    following = schedule.end(event.job, event.state == "done") if isinstance(event, Ended) else None
                    if following and not stopping():
                        yield Started(following)
        finally:
            running.cancel()

    def submit(
        self, jobs: list[Job], title: str, allocation: Allocation, memory: int, *, store: Store, images: Any
    ) -> Any:
        """Submit jobs that one process runs; returns a reference to the result or, with a GPU, a generator of them.

        Args:
            jobs: of one experiment (`Schedule.start_after`).
            title: of the first job, for the dashboard.
            allocation: of each job.
            memory: bytes to reserve; 0: none.
            store, images: as for `run`.
        """
        job, *others = jobs
        argument: Any
        if allocation.workers or job.copy_of:
            # Ray Train requests the resources of its workers; the task that waits for them needs none. Neither does a
            # task that only copies.
            task, argument, resources = self._task, job, {"num_cpus": 0.0}
        elif allocation.gpus:
            task, argument, resources = self._gpu_task, jobs, {"num_cpus": allocation.cpus, "num_gpus": allocation.gpus}
        else:
            task, argument, resources = self._task, job, {"num_cpus": allocation.cpus}
        if memory:
            resources["memory"] = memory
        name = f"{title} and {len(others)} more" if others else title
        task = task.options(name=name, label_selector=allocation.label_selector, **resources)
        return task.remote(argument, store, [images], allocation, self.control)

    def release(self, job: Job) -> None:
        """Forget the claims of a job, or of its last attempt."""
        key = job.folder, job.name
        self._claims = {worker: claim for worker, claim in self._claims.items() if claim.job != key}
        self._call("release", key)

    def _new_claims(self, running: Iterable[Job]) -> list[Claim]:
        """The claims since the last call; those of running jobs are kept.

        With each call the driver sends the control actor its own state, because the actor may have restarted. If the
        actor is restarting now, its answer arrives in a later call.
        """
        self._pending_news = self._pending_news or self._call("news", self._stopped, list(self._claims.values()))
        claims = self._answer(self._pending_news, 1)
        if claims is None:
            return []
        self._pending_news = None
        keys = {(job.folder, job.name) for job in running}
        self._claims |= {(claim.job, claim.worker): claim for claim in claims if claim.job in keys}
        return list(claims)

    def _call(self, method: str, *arguments: Any) -> Any:
        # Without Ray's retries, each of which would be printed: a later call repeats a lost one.
        return getattr(self.control, method).options(max_task_retries=0).remote(*arguments)

    def _answer(self, reference: Any, seconds: float) -> Any:
        """The answer of the control actor; None if it does not arrive in time."""
        try:
            return self._ray.get(reference, timeout=seconds)
        except self._ray.exceptions.GetTimeoutError:
            return None
        except self._ray.exceptions.RayError:  # the actor's node was lost
            self._pending_news = None
            return None

    def node_memory(self) -> int:
        """Bytes that tasks can reserve on every node."""
        nodes = (node["Resources"] for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
        return int(min((node.get("memory", 0) for node in nodes), default=0))


class _RunningJobs:
    """The running jobs of one call of `Cluster.run`, and what is known of their earlier attempts.

    Attributes:
        jobs: by what Ray has returned for them: the running job, and those that its process runs afterwards.
    """

    def __init__(
        self,
        cluster: Cluster,
        allocations: Mapping[Job, Allocation],
        stores: Mapping[str, Store],
        images: Any,
        title: Callable[[Job], str],
    ) -> None:
        import ray

        self._ray, self._cluster = ray, cluster
        self._allocations, self._stores, self._images, self._title = allocations, stores, images, title
        self._attempts, self._memory = failures.Attempts(), Memory(cluster.node_memory())
        self._stranded_since: dict[Any, float] = {}
        self.jobs: dict[Any, list[Job]] = {}

    def submit(self, jobs: list[Job]) -> None:
        """Start jobs that one process runs in turn, or the next attempt of the first of them."""
        job = jobs[0]
        allocation, store = self._allocations[job], self._stores[job.folder]
        memory = max(self._memory.need(job, allocation) for job in jobs)
        reference = self._cluster.submit(jobs, self._title(job), allocation, memory, store=store, images=self._images)
        self.jobs[reference] = jobs

    def end(self, task: Any, stopping: bool) -> Ended | Note:
        """Retry a job that has ended, or return how it ended; the process goes on with the next job, if it has one.

        Args:
            task: key of `jobs`; the first of these jobs has ended.
            stopping: whether the run was asked to stop.
        """
        job, *following = jobs = self.jobs.pop(task)
        reference = next(task) if isinstance(task, self._ray.ObjectRefGenerator) else task
        self._cluster.release(job)
        failure = self._failure(reference, job)
        if failure and not stopping and self._attempts.may_retry(job, failure.kind):
            self._memory.failed(job, failure.kind)
            self.submit(jobs)
            return Note(f"{self._title(job)}: {failure.reason}; tried again")
        if following and failure is None:
            self.jobs[task] = following
        elif following and not stopping:
            self.submit(following)  # the failure has ended their process too
        if failure is None:
            ended = Ended(job, "done" if self._ray.get(reference) else "stopped")
        elif stopping:
            ended = Ended(job, "stopped")
        else:
            count = self._attempts.count(job)
            attempts = f"; tried {count} times" if count > 1 else ""
            ended = Ended(job, "failed", f"{failure.reason}{attempts}{self._keep_log(reference, job, failure)}")
        self._memory.learn(job, ended.state == "done", self._stores[job.folder])
        return ended

    def give_up_stranded(self) -> list[Ended | Note]:
        """Cancel jobs that no remaining node can hold, after `failures.NODE_PATIENCE`; returns the events."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        events: list[Ended | Note] = []
        for reference, (job, *following) in list(self.jobs.items()):
            if fits(self._allocations[job], nodes):
                self._stranded_since.pop(reference, None)
                continue
            reason = f"{failures.NODE_LOST.name}: no nodes are left that can hold {self._allocations[job]}"
            if reference not in self._stranded_since:
                self._stranded_since[reference] = time.monotonic()
                wait = f"it waits for them for {failures.NODE_PATIENCE:g} s"
                events.append(Note(f"{self._title(job)}: {reason}; {wait}"))
            if time.monotonic() >= self._stranded_since[reference] + failures.NODE_PATIENCE:
                del self.jobs[reference], self._stranded_since[reference]
                self._ray.cancel(reference, force=True)
                events += [Ended(failed, "failed", reason) for failed in (job, *following)]
        return events

    def stop(self) -> None:
        """Ask trainings to save what they have; cancel evaluations."""
        self._cluster.stop(job.folder for job, *_ in self.jobs.values())
        for reference, (job, *_) in self.jobs.items():
            if not job.is_training:
                self._ray.cancel(reference, force=True)

    def cancel(self) -> None:
        """Cancel all jobs."""
        for reference in self.jobs:
            self._ray.cancel(reference, force=True)

    def _failure(self, reference: Any, job: Job) -> failures.Failure | None:
        """Why a job that has ended failed; None if it did not."""
        try:
            self._ray.get(reference)
        except Exception as error:  # of any class: Ray raises what the job raised
            hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in self._ray.nodes()}
            return failures.failure(error, job, self._title(job), hosts)
        return None

    def _keep_log(self, reference: Any, job: Job, failure: failures.Failure) -> str:
        """Store the log of a failed job, unless the job has done so; returns what to add to the reason."""
        name, store = failures.log_name(job.file), self._stores[job.folder]
        try:
            if failure.killed:  # it could not write its log itself
                store.write(name, failures.log(failure.text, _worker_log(failure, reference)))
            elif store.size(name) is None:
                return "; no log: the job could not write it"
        except (StorageFailed, LockLost) as error:
            return f"; no log: {error}"
        return f"; log: {store.path(name)}"


def _run_job(job: Job, store: Store, images: list[Any], allocation: Allocation, control: Any) -> bool:
    # Imports torch only in the worker. The reference comes in a list, so that Ray does not resolve it here.
    from dwf_cluster.cluster.tasks import run_job

    return run_job(job, store, images[0], allocation, control)


def _run_jobs(jobs: list[Job], *arguments: Any) -> Iterator[bool]:
    for job in jobs:
        yield _run_job(job, *arguments)


def fits(allocation: Allocation, nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether nodes with these resources can hold a job, if nothing else runs on them."""
    needed = {"CPU": allocation.cpus, "GPU": allocation.gpus}
    slots = (min(int(node.get(kind, 0) / share + 1e-9) for kind, share in needed.items() if share) for node in nodes)
    return sum(slots) >= max(1, allocation.workers)


def _worker_log(failure: failures.Failure, reference: Any) -> Iterator[str]:
    """The output of a job's killed process, as far as Ray's dashboard has it."""
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
        yield f"(its output cannot be read: {failures.last_line(str(error))})"
