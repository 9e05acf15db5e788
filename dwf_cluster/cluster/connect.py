"""Connect to Ray: to one that is started on this machine for the run alone, or to an existing one."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dwf_cluster.cluster import environment, failures, temporary
from dwf_cluster.cluster.driver import Cluster
from dwf_cluster.plan.resources import Limits, Resources, alike_nodes
from dwf_cluster.settings import InvalidInput, one_line


class RayNotStarted(RuntimeError):
    """Ray did not start on this machine, or on all nodes of the allocation. Its text is one line."""


@contextmanager
def local(resources: Resources) -> Iterator[Cluster]:
    """Start Ray on this machine for this process alone, and stop it at the end.

    Ray's files, and the token that its services ask for, lie in a temporary folder that only the user can read.

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
                    _temp_dir=f"{folder}/ray",  # Ray makes its own folder readable for everyone; ours stays private
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            yield Cluster(resources, f"http://{context.dashboard_url}", f"{folder}/token")
        finally:
            ray.shutdown()


def _start(**options: Any) -> Any:
    """`ray.init`, retried as a driver is: Ray gives its parts fixed times to start, too short on a busy machine.

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
    """Connect to a running Ray, and leave it running at the end.

    Of its nodes the run uses the largest set of equal ones, as `resources.alike_nodes` says; a printed line names the
    others. In an allocation of SLURM the run first waits until Ray has started on all nodes.

    Args:
        address: `auto`, `HOST:PORT` or `ray://HOST:PORT`.
        limits: of the resources of jobs.

    Raises:
        InvalidInput: if there is no Ray at that address, or its nodes cannot hold the workers.
        RayNotStarted: if a node of the allocation is missing.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    in_allocation = environment.private_folder() is not None
    deadline = time.monotonic() + environment.join_seconds()
    if in_allocation:
        wait_for_head(deadline)
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        if in_allocation:
            raise RayNotStarted(f"Ray on the first node cannot be reached: {reason}") from None
        raise InvalidInput(f"--address: {address!r} cannot be reached: {reason}") from None
    try:
        if in_allocation:
            _wait_for_nodes(deadline)
        resources, line = alike_nodes(ray.nodes(), limits)
        if line:
            print(line, flush=True)
        dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        yield Cluster(resources, dashboard, os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"))
    finally:
        ray.shutdown()


def reach_head() -> None:
    """Open and close a connection to the head of the allocation's Ray.

    Raises:
        OSError: if the head does not answer.
    """
    socket.create_connection(environment.head_address(), timeout=5).close()


def wait_for_head(deadline: float) -> None:
    """Return when the head of the allocation's Ray can be reached, or at `deadline` of the monotonic clock."""
    while time.monotonic() < deadline:
        try:
            return reach_head()
        except OSError:
            time.sleep(0.1)


def _wait_for_nodes(deadline: float) -> None:
    """Wait until Ray runs on all nodes of the allocation, and note that in the status file.

    Raises:
        RayNotStarted: if a node is missing at `deadline`. The message names the node and its log.
    """
    import ray

    missing = environment.hostnames()
    while missing:
        names = {node["NodeName"] for node in ray.nodes() if node["Alive"]}
        missing = [name for name in missing if name not in names]
        if missing and time.monotonic() > deadline:
            log = environment.log_file(missing[0])
            raise RayNotStarted(
                f"node {missing[0]} has not joined within {environment.join_seconds():g} s; its log: {log}"
            )
        time.sleep(0.1)
    environment.status_file().write_text(environment.JOINED)
