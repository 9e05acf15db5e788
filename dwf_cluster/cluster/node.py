"""What runs on each node of a SLURM allocation: Ray, and on the first node the driver too.

It ends when its Ray ends, its Ray ends when it ends, and SLURM ends them all when one of them does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dwf_cluster.cluster import allocation
from dwf_cluster.cluster.temporary import make_private, set_environment

JOIN_SECONDS = float(os.environ.get("DWF_JOIN_SECONDS", "180"))
"""How long the nodes of an allocation have to find one another."""


class NodeMissing(RuntimeError):
    """A node of the allocation has not joined the Ray cluster in time. Its text names it and its log."""


def main(arguments: Sequence[str]) -> int:
    """Run this node's part; returns the exit status."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # inherited by Ray: SLURM sends it to every process of the step
    set_environment(str(allocation.folder()))
    head = f"{os.environ['SLURM_LAUNCH_NODE_IPADDR']}:{os.environ['DWF_HEAD_PORT']}"
    first = os.environ["SLURM_PROCID"] == "0"
    with _token(allocation.folder()):
        return _first(arguments, head) if first else _other(head)


@contextmanager
def _token(folder: Path) -> Iterator[None]:
    """The job's private folder on this node, for as long as the body runs."""
    token = os.environ.pop("DWF_TOKEN")
    try:
        shared = (folder / "token").read_text() == token  # two nodes of a test cluster may be one machine
    except OSError:
        shared = False
    if not shared:
        make_private(str(folder), token)
    try:
        yield
    finally:
        if not shared:
            shutil.rmtree(folder, ignore_errors=True)


def _first(arguments: Sequence[str], head: str) -> int:
    ports = {name: os.environ[f"DWF_{name}_PORT"] for name in ("HEAD", "DASHBOARD", "CLIENT")}
    options = ["--head", f"--port={ports['HEAD']}", f"--temp-dir={allocation.folder()}/ray", "--include-dashboard=true"]
    options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports['DASHBOARD']}"]
    ray = _start_ray([*options, f"--ray-client-server-port={ports['CLIENT']}"], head)
    over = threading.Event()
    threading.Thread(target=_end_with, args=(ray, over), daemon=True).start()
    told: list[int] = []

    def tell(signum: int, frame: object) -> None:
        """The time is over soon: stop as at Ctrl-C, then have the job run again."""
        told.append(signum)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGUSR2, tell)
    try:
        try:
            _join(head)
        except NodeMissing as error:
            print(f"failed: {error}\nresume: {os.environ['DWF_AGAIN']}", file=sys.stderr)
            status = 1
        else:
            dashboard, node = ports["DASHBOARD"], os.environ["SLURMD_NODENAME"]
            print(
                f"Ray dashboard: http://127.0.0.1:{dashboard} after `ssh -N -L {dashboard}:127.0.0.1:{dashboard} "
                f"{node}` (token: `ssh {node} cat {allocation.folder()}/token`)",
                flush=True,
            )
            from dwf_cluster.launch import main as launch

            status = launch(["--address", head, *arguments], os.environ["DWF_AGAIN"])
    except KeyboardInterrupt:  # while it was starting
        status = 130
    finally:
        over.set()
        _stop_ray(ray)
    Path(os.environ["DWF_STATUS"]).write_text(str(allocation.REQUEUE if told and status == 130 else status))
    return 0


def _other(head: str) -> int:
    _wait_for(head)
    ray = _start_ray([f"--address={head}"], head)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
    try:
        while ray.poll() is None:
            time.sleep(1)
            try:
                _knock(head)
            except ConnectionRefusedError:
                return 0  # the head has ended; Ray itself would wait for another for a minute
            except OSError:
                continue  # a network that is slow for a moment
        return 1
    finally:
        _stop_ray(ray)


def _knock(head: str) -> None:
    host, _, port = head.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()


def _wait_for(head: str) -> None:
    """Return when Ray's head can be reached, or after `JOIN_SECONDS`."""
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        try:
            return _knock(head)
        except OSError:
            time.sleep(0.1)


def _start_ray(options: Sequence[str], head: str) -> subprocess.Popen[bytes]:
    """Start Ray with what the allocation has on this node, never what the node has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: finds the way to the head
        probe.connect((head.rpartition(":")[0], 9))
        address = probe.getsockname()[0]
    cpus, gpus, memory = _share()
    store = max(100 << 20, memory // 5)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += ["--log-style=record", "--log-color=false"]
    command += [f"--node-ip-address={address}", f"--node-name={os.environ['SLURMD_NODENAME']}"]
    command += [f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
    command += [f"--memory={memory - store}", f"--object-store-memory={store}"]
    # 0: any free port. Only its own node needs to know it.
    command += [f"--{what}-port=0" for what in ("min-worker", "max-worker", "dashboard-agent-listen")]
    names = allocation.log_files()
    log = next(name for name in names if name.endswith(f"-{os.environ['SLURMD_NODENAME']}.log"))
    libc = ctypes.CDLL(None)
    with open(log, "ab") as file:
        return subprocess.Popen(
            [*command, *options],
            stdout=file,
            stderr=file,
            # PR_SET_PDEATHSIG: should this process be killed, Ray ends.
            preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),  # noqa: PLW1509, no other thread has begun
        )


def _share() -> tuple[int, int, int]:
    """CPUs, GPUs and bytes of memory that the allocation has on this node."""
    cpus = int(os.environ["SLURM_CPUS_ON_NODE"])
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a site that does not hide other people's
    megabytes = int(os.environ.get("SLURM_MEM_PER_NODE", "0")) or cpus * int(os.environ.get("SLURM_MEM_PER_CPU", "0"))
    if megabytes:
        return cpus, gpus, megabytes << 20
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return cpus, gpus, machine * cpus // max(cpus, os.cpu_count() or 1)


def _join(head: str) -> None:
    """Connect to the Ray of this allocation and wait for all its nodes.

    Raises:
        NodeMissing: if they are not there within `JOIN_SECONDS`.
    """
    import ray

    deadline = time.monotonic() + JOIN_SECONDS
    missing = dict(zip(allocation.hostnames(), allocation.log_files(), strict=True))
    _wait_for(head)
    ray.init(address=head, log_to_driver=False, logging_level="ERROR")
    while missing:
        for node in ray.nodes():
            if node["Alive"]:
                missing.pop(node["NodeName"], None)
        if missing and time.monotonic() > deadline:
            name, log = next(iter(missing.items()))
            raise NodeMissing(f"node {name} has not joined within {JOIN_SECONDS:g} s; its log: {log}")
        time.sleep(0.1)


def _end_with(ray: subprocess.Popen[bytes], over: threading.Event) -> None:
    """End this process when its Ray has ended: what the driver would do is wait."""
    ray.wait()
    if not over.is_set():
        print("Ray on the first node has ended", file=sys.stderr, flush=True)
        os._exit(1)


def _stop_ray(ray: subprocess.Popen[bytes]) -> None:
    ray.terminate()
    try:
        ray.wait(15)
    except subprocess.TimeoutExpired:
        ray.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
