"""Run on each node of a SLURM allocation: Ray, and on the first node the driver too. `allocation.py` starts it.

The driver is a child process. This process ends when its Ray ends; Ray and the driver end when this process ends; and
SLURM ends the processes of all nodes when one of them fails.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwf_cluster.cluster import allocation, connect, environment
from dwf_cluster.cluster.share import claim_gpus, memory_share
from dwf_cluster.cluster.temporary import make_private, remove, set_environment

LOSS_SECONDS = 5.0
"""How long a run that failed waits for its Ray to end, to distinguish a lost cluster from a failure of its own."""

_RAY = (
    "import ray.scripts.scripts as ray; "
    # Without this `ray start` opens a port for ray:// on every address, and no option forbids it.
    "ray.get_ray_client_dependency_error = lambda: ImportError('not wanted'); "
    "ray.main()"
)


def main(arguments: Sequence[str]) -> int:
    """Run this node's part; returns the exit status.

    Args:
        arguments: of `dwf_cluster.launch`, without the choice of where to run.
    """
    # Ray and the driver inherit this: SLURM sends the signal to every process of the step.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    folder, token = allocation.folder(), os.environ.pop("DWF_TOKEN")
    set_environment(str(folder))
    try:
        is_own = _make_folder(folder, token)
    except OSError as error:
        message = f"failed: node {environment.node_name()}: {folder}: {error.strerror}"
        print(message, file=sys.stderr, flush=True)
        return 1
    try:
        return _run_first_node(arguments) if environment.is_first_node() else _run_other_node()
    finally:
        if is_own:
            remove(str(folder))


def _make_folder(folder: Path, token: str) -> bool:
    """Make the private folder on this node; returns whether this process has made it, and so must remove it.

    Raises:
        OSError: if it cannot be made.
    """
    allocation.remove_old_folders(folder)
    try:
        if (folder / "token").read_text() == token:
            return False  # the batch script runs on this node too
    except OSError:
        pass  # another node, or a container with a /tmp of its own
    make_private(str(folder), token)
    return True


def _url(host: str, port: int) -> str:
    """`HOST:PORT`, as Ray reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _run_first_node(arguments: Sequence[str]) -> int:
    """Start Ray's head and the driver, and wait for the driver."""
    host, port = environment.head_address()
    folder, node, dashboard = allocation.folder(), environment.node_name(), os.environ["DWF_DASHBOARD_PORT"]
    options = ["--head", f"--port={port}", f"--temp-dir={folder}/ray", "--include-dashboard=true"]
    ray = _start_ray([*options, "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"])
    print(
        f"Ray dashboard: http://127.0.0.1:{dashboard} after `ssh -N -L {dashboard}:127.0.0.1:{dashboard} "
        f"{node}` (token: `ssh {node} cat {folder}/token`)",
        flush=True,
    )
    # The driver imports its modules while Ray starts, then waits for Ray (`connect.attached`).
    command = [sys.executable, "-m", "dwf_cluster.launch", "--address", _url(host, port), *arguments]
    driver = _start(command, signal.SIGKILL)
    # SLURM sends SIGTERM to the driver too, so the driver stops without our help.
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    threading.Thread(target=_kill_without_ray, args=(driver, ray), daemon=True).start()
    status, is_requeued = environment.wait_for_driver(driver)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    has_lost_ray = ray.poll() is not None if status != 1 else _has_ended(ray)
    if status < 0 or (status == 1 and has_lost_ray):
        cause = "Ray on the first node has ended" if has_lost_ray else f"the driver was ended by signal {-status}"
        print(cause, file=sys.stderr, flush=True)
        _stop_ray(ray)
        return 1
    _stop_ray(ray)
    environment.status_file().write_text(str(allocation.REQUEUE if is_requeued else status))
    return 0


def _run_other_node() -> int:
    """Start Ray, and wait until it or Ray's head ends."""
    connect.wait_for_head(time.monotonic() + environment.join_seconds())
    ray = _start_ray([f"--address={_url(*environment.head_address())}"])
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
    try:
        while ray.poll() is None:
            time.sleep(1)
            try:
                connect.reach_head()
            except ConnectionRefusedError:
                return 0  # the head has ended; Ray itself would wait for another for a minute
            except OSError:
                continue  # a network that is slow for a moment
        return 1
    finally:
        _stop_ray(ray)


def _start_ray(options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start Ray with what the allocation has on this node, never what the node has."""
    node, address = environment.node_name(), _own_address(environment.head_address()[0])
    if interface := _interface(address):
        # By default gloo uses the address of the host's name, which is 127.0.1.1 on Debian.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    cpus = environment.cpus()
    gpus = claim_gpus(cpus)
    memory = memory_share(cpus, gpus)
    object_store = max(100 << 20, memory // 5)
    command = [sys.executable, "-c", _RAY, "start", "--block", "--disable-usage-stats"]
    command += ["--log-style=record", "--log-color=false"]
    command += [f"--node-ip-address={address}", f"--node-name={node}"]
    command += [f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
    command += [f"--memory={memory - object_store}", f"--object-store-memory={object_store}"]
    # 0: any free port. Only its own node uses it.
    command += [f"--{name}-port=0" for name in ("min-worker", "max-worker", "dashboard-agent-listen")]
    with open(environment.log_file(node), "ab") as file:
        return _start([*command, *options], signal.SIGTERM, stdout=file, stderr=file)


def _start(command: Sequence[str], signum: int, **streams: Any) -> subprocess.Popen[bytes]:
    """Start a child process that gets a signal when this process ends, even if this process is killed."""
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        command,
        # 1: PR_SET_PDEATHSIG
        preexec_fn=lambda: libc.prctl(1, signum),  # noqa: PLW1509, no other thread has begun
        **streams,
    )


def _own_address(host: str) -> str:
    """The address of this node on its way to another one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect((host, 9))
        address: str = probe.getsockname()[0]
    return address


def _interface(address: str) -> str | None:
    """Name of the network interface that has this address; None if no interface has it."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address).hex()
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        return next((line.split()[-1] for line in lines if line.startswith(packed)), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:  # SIOCGIFADDR
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _kill_without_ray(driver: subprocess.Popen[bytes], ray: subprocess.Popen[bytes]) -> None:
    """Kill the driver when its Ray has ended: it would only wait."""
    ray.wait()
    driver.kill()


def _has_ended(ray: subprocess.Popen[bytes]) -> bool:
    """Whether Ray ends within `LOSS_SECONDS`: it checks its own processes once a second."""
    try:
        ray.wait(LOSS_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _stop_ray(ray: subprocess.Popen[bytes]) -> None:
    ray.terminate()
    try:
        ray.wait(15)
    except subprocess.TimeoutExpired:
        ray.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
