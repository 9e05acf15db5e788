"""Kinds of failure: how often a job is retried after each, and the line that the user reads. Needs neither torch nor
ray. docs/failures.md has the same table for readers.

Ray and Ray Train retry nothing (`BY_RAY`): the driver submits a failed job again. So every attempt is counted here, on
an existing Ray cluster too.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dwf_cluster.plan.jobs import Job
from dwf_cluster.store import LockLost, StorageFailed, Store

BY_RAY = 0
"""`max_retries` of tasks and `max_failures` of Ray Train's runs. 0 also turns off Ray's own retries at low memory."""

NODE_PATIENCE = 300.0
"""Seconds that a job waits for a node that can hold it, after a node was lost: an autoscaler may replace the node."""

LOG_BYTES = 1_000_000
"""Size limit of a process's output in a job's log; the end of the output is kept."""


@dataclass(frozen=True)
class Kind:
    """One kind of failure.

    Attributes:
        name: in docs/failures.md and in the line that the user reads.
        retries: how often the same job is retried after failures of this kind; None: every time.
    """

    name: str
    retries: int | None


PREEMPTION = Kind("preemption", None)
NODE_LOST = Kind("node lost", 5)
OUT_OF_GPU_MEMORY = Kind("out of GPU memory", 0)
OUT_OF_MEMORY = Kind("out of memory", 2)
WORKER_DIED = Kind("worker died", 2)
STORE = Kind("store", 0)
BAD_DATA = Kind("bad data", 0)
CODE = Kind("code", 0)
DRIVER = Kind("driver", 2)
"""The driver or its Ray cluster failed: a SLURM allocation starts it again; elsewhere, the user does."""

KINDS = (PREEMPTION, NODE_LOST, OUT_OF_GPU_MEMORY, OUT_OF_MEMORY, WORKER_DIED, STORE, BAD_DATA, CODE, DRIVER)
"""By priority, for a job whose workers failed in several ways: when one worker dies, the others fail with broken
connections, which look like errors in the code."""

_BY_CLASS: Mapping[str, Kind] = {
    "ray.exceptions.OutOfMemoryError": OUT_OF_MEMORY,
    "ray.exceptions.ObjectStoreFullError": OUT_OF_MEMORY,
    "builtins.MemoryError": OUT_OF_MEMORY,
    "torch.OutOfMemoryError": OUT_OF_GPU_MEMORY,
    "ray.exceptions.NodeDiedError": NODE_LOST,
    "ray.exceptions.LocalRayletDiedError": NODE_LOST,
    "ray.exceptions.ObjectLostError": NODE_LOST,
    "ray.exceptions.TaskUnschedulableError": NODE_LOST,
    "ray.exceptions.ActorUnschedulableError": NODE_LOST,
    "ray.exceptions.WorkerCrashedError": WORKER_DIED,
    "ray.exceptions.RayActorError": WORKER_DIED,
    "dwf_cluster.store.retry.StorageFailed": STORE,
    "dwf_cluster.store.files.LockLost": STORE,
    "dwf_cluster.settings.InvalidInput": BAD_DATA,
    "dwf_cluster.data.sources.DataUnavailable": BAD_DATA,
    "builtins.FileNotFoundError": BAD_DATA,
}
"""By the name of the exception's class, or of a base class: names need neither torch nor ray."""

_INNER = ("cause", "health_check_failure", "controller_failure")
"""Attributes of Ray's exceptions that hold the exception which caused them."""

_POINTLESS = re.compile(
    r"For debugging consider|Compile with|CUDA kernel errors might|Search for|For (?:further|more) information"
    r"|If reserved but unallocated|See documentation|Last error:$|[\s^~-]*$"
)
"""Last lines of an exception's text that say nothing about its cause."""

_SECRETS = re.compile(
    r"(?<=://)[^\s/@:]*:[^\s/@]*(?=@)"  # user and password of a URL
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|(?<=Bearer )\S+"
    r"|(?i:(?<=signature=)|(?<=credential=)|(?<=security-token=)|(?<=token=))[^\s&\"']+"
)
_SECRET_NAME = re.compile("KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)
_OTHERS_COMMANDS = re.compile(r"^Top \d+ memory users:.*?(?=^Refer to |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Failure:
    """Why one attempt of a job failed.

    Attributes:
        kind: one of `KINDS`.
        reason: one line.
        text: the whole traceback, or Ray's whole message.
        pid, node: process that was killed, and Ray's ID of its node, if Ray's message has them.
    """

    kind: Kind
    reason: str
    text: str
    pid: int | None = None
    node: str = ""

    @property
    def killed(self) -> bool:
        """Whether the process had no chance to write its own log."""
        return self.kind in (PREEMPTION, NODE_LOST, OUT_OF_MEMORY, WORKER_DIED)


class Attempts:
    """Counts the failures of each job, by kind."""

    def __init__(self) -> None:
        self._failures: Counter[tuple[Job, Kind]] = Counter()

    def may_retry(self, job: Job, kind: Kind) -> bool:
        """Count a failure; returns whether the job may be retried."""
        self._failures[job, kind] += 1
        return kind.retries is None or self._failures[job, kind] <= kind.retries

    def count(self, job: Job) -> int:
        """Number of failed attempts of a job."""
        return sum(count for (failed, _), count in self._failures.items() if failed == job)


def failure(error: BaseException, job: Job, title: str, hosts: Mapping[str, str]) -> Failure:
    """Kind, line and text of a job's failure.

    Args:
        error: that `ray.get` has raised.
        job: that failed.
        title: the job's name in Ray.
        hosts: host name of each node, by Ray's ID.
    """
    cause = min(_leaves(error), key=lambda leaf: KINDS.index(kind_of(leaf)))
    kind = kind_of(cause)
    text = clean(str(error))
    if kind is OUT_OF_MEMORY:
        return _out_of_memory(cause, job, title, hosts, text)
    message = last_line(clean(str(cause)))
    reason = error_summary(cause)
    if kind is OUT_OF_GPU_MEMORY:
        reason = f"{kind.name}: {_sentences(message)}; set {_fields(job)}"
    elif kind is WORKER_DIED:
        reason = f"{kind.name}: its process ended without a message (killed or crashed; perhaps out of memory)"
    elif kind in (NODE_LOST, PREEMPTION, STORE):
        reason = f"{kind.name}: {message}"
    return Failure(kind, reason, text)


def kind_of(error: BaseException) -> Kind:
    """The kind of failure that an exception means."""
    text = str(error)
    if getattr(error, "preempted", False):
        return PREEMPTION
    if "its node has died" in text:
        return NODE_LOST
    if "running low on memory" in text or "DefaultCPUAllocator" in text:
        return OUT_OF_MEMORY
    if re.search("CUDA.*out of memory|out of memory.*CUDA|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED", text):
        return OUT_OF_GPU_MEMORY
    names = (f"{parent.__module__}.{parent.__qualname__}" for parent in type(error).__mro__)
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), CODE)


def error_summary(error: BaseException) -> str:
    """Class and last useful line of an exception, without credentials."""
    return f"{type(error).__name__}: {last_line(clean(str(error)))}"


def last_line(text: str) -> str:
    """The last useful line of an exception's text, of 500 characters at most."""
    lines = [line.strip() for line in text.splitlines() if not _POINTLESS.match(line.strip())]
    return lines[-1][:500] if lines else "no message"


def clean(text: str) -> str:
    """Remove credentials from a text, and other users' command lines, which Ray adds at low memory."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8 and not os.path.exists(value):
            text = text.replace(value, "***")
    return _SECRETS.sub("***", _OTHERS_COMMANDS.sub("", text))


def log_name(file: str, worker: int | None = None) -> str:
    """Name of a failed job's log in the experiment's folder, or of the log of one worker of its Ray Train run."""
    return f"logs/{file}{'' if worker is None else f'-worker-{worker}'}.txt"


def log(text: str, output: Iterable[str]) -> bytes:
    """Content of a log: a traceback or message, and the last `LOG_BYTES` of the process's output."""
    written = "".join(output).encode()[-LOG_BYTES:].decode(errors="replace")
    return clean(f"{text.rstrip()}\n\n--- output of the process ---\n{written}").encode()


@contextmanager
def logged(store: Store, file: str) -> Iterator[None]:
    """Store the job's log if the body, which runs the job in this process, fails."""
    sizes = _outputs()
    try:
        yield
    except Exception:
        keep_log(store, log_name(file), sizes)
        raise


def keep_log(store: Store, name: str, sizes: Mapping[str, int] | None = None) -> None:
    """Store the traceback of the exception that is being handled, and the output of this process.

    Args:
        store: to write to.
        name: as `log_name` returns it.
        sizes: of the process's output files when the job began; None: all of the output is the job's.
    """
    written = []
    for path, size in _outputs().items():
        with open(path, "rb") as file:
            file.seek(max((sizes or {}).get(path, 0), size - LOG_BYTES))
            written.append(file.read().decode(errors="replace"))
    try:
        store.write(name, log(traceback.format_exc(), written))
    except (StorageFailed, LockLost) as error:  # the job's own exception matters more
        print(f"the log of this failure cannot be stored: {error}", file=sys.stderr)


def _outputs() -> dict[str, int]:
    """Files that Ray redirects the output of this process to, and their sizes. Empty without /proc."""
    paths = {os.path.realpath(f"/proc/self/fd/{descriptor}") for descriptor in (1, 2)}
    return {path: os.path.getsize(path) for path in sorted(paths) if os.path.isfile(path)}


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that caused an exception of Ray's, one for each worker that failed; else the exception itself."""
    inner: list[Any] = [getattr(error, name, None) for name in _INNER]
    inner += getattr(error, "worker_failures", {}).values()
    inner = [cause for cause in inner if isinstance(cause, BaseException) and cause is not error]
    for cause in inner:
        yield from _leaves(cause)
    if not inner:
        yield error


def _out_of_memory(cause: BaseException, job: Job, title: str, hosts: Mapping[str, str], text: str) -> Failure:
    message = str(cause)
    node = re.search(r"\(IP: (\S+), ID: (\w+)\) was ([\d.]+)GB used / ([\d.]+)GB", message)
    if node is None:  # not Ray's message: the operating system refused memory to the process
        return Failure(OUT_OF_MEMORY, f"{OUT_OF_MEMORY.name}: {last_line(clean(message))}; {_less_memory(job)}", text)
    address, number, used, limit = node.groups()
    own = re.search(rf"task name={re.escape(title)},.*?pid=(\d+), actual memory used=([\d.]+)GB", message)
    reason = f"{OUT_OF_MEMORY.name} on {hosts.get(number, address)}: {used} of {limit} GB were in use"
    reason += f", {own[2]} GB of them by this job" if own else ""
    return Failure(OUT_OF_MEMORY, f"{reason}; {_less_memory(job)}", text, int(own[1]) if own else None, number)


def _less_memory(job: Job) -> str:
    """The settings with which fewer jobs run at once, or each job needs less memory."""
    return f"set a lower --cpus{' or' if job.stage == 'evaluate' else ','} {_fields(job)}"


def _fields(job: Job) -> str:
    """The fields with which a job needs less memory."""
    if not job.is_training:
        return "a lower evaluation.batch_size"
    return f"a higher {job.stage}.accumulation or a lower {job.stage}.batch_size"


def _sentences(text: str) -> str:
    """The first two sentences: the others are torch's advice to programmers."""
    return ". ".join(text.split(". ")[:2]).rstrip(".")
