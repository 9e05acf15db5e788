"""Run on each node of a SLURM allocation: Ray, and on the first node the driver too.

This process ends when its Ray ends, its Ray ends when this process ends, and SLURM ends all nodes' processes when one
of them fails.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from dwf_cluster.cluster import allocation
from dwf_cluster.cluster.share import claim_gpus, memory_share
from dwf_cluster.cluster.temporary import make_private, set_environment

JOIN_SECONDS = float(os.environ.get("DWF_JOIN_SECONDS", "180"))
"""How long the nodes of an allocation have to find one another."""

LOSS_SECONDS = 5.0
"""How long a run that failed waits for its Ray to end, to tell a lost cluster from a failure of its own."""

_RAY = (
    "import ray.scripts.scripts as ray; "
    # Without this `ray start` opens a port for ray:// on every address, and no option forbids it.
    "ray.get_ray_client_dependency_error = lambda: ImportError('not wanted'); "
    "ray.main()"
)


class NodeMissing(RuntimeError):
    """A node of the allocation has not joined the Ray cluster in time. The message names it and its log."""


def main(arguments: Sequence[str]) -> int:
    """Run this node's part; returns the exit status."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # inherited by Ray: SLURM sends it to every process of the step
    folder, token = allocation.folder(), os.environ.pop("DWF_TOKEN")
    set_environment(str(folder))
    try:
        made = _make_folder(folder, token)
    except OSError as error:
        name = os.environ["SLURMD_NODENAME"]
        print(f"failed: node {name}: {folder}: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    try:
        return _first(arguments) if os.environ["SLURM_PROCID"] == "0" else _other()
    finally:
        if made:
            shutil.rmtree(folder, ignore_errors=True)


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


def _head() -> tuple[str, int]:
    """Address and port of Ray's head, on the first node."""
    host = os.environ.get("DWF_HEAD_ADDRESS") or os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    return host, int(os.environ["DWF_HEAD_PORT"])


def _url(host: str, port: int) -> str:
    """`HOST:PORT`, as Ray reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _first(arguments: Sequence[str]) -> int:
    host, port = _head()
    dashboard, node, again = os.environ["DWF_DASHBOARD_PORT"], os.environ["SLURMD_NODENAME"], os.environ["DWF_AGAIN"]
    options = ["--head", f"--port={port}", f"--temp-dir={allocation.folder()}/ray", "--include-dashboard=true"]
    ray = _start_ray([*options, "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"])
    over = threading.Event()
    threading.Thread(target=_end_with, args=(ray, over), daemon=True).start()
    signals: list[int] = []

    def on_warning(signum: int, frame: object) -> None:
        """The time is over soon: stop as at Ctrl-C, then have the job run again."""
        signals.append(signum)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGUSR2, on_warning)
    status = 1
    try:
        _join(_url(host, port))
        allocation.status_file().write_text(allocation.JOINED)
        print(
            f"Ray dashboard: http://127.0.0.1:{dashboard} after `ssh -N -L {dashboard}:127.0.0.1:{dashboard} "
            f"{node}` (token: `ssh {node} cat {allocation.folder()}/token`)",
            flush=True,
        )
        from dwf_cluster.launch import main as launch

        status = launch(["--address", _url(host, port), *arguments], again)
    except NodeMissing as error:
        print(f"failed: {error}\nresume: {again}", file=sys.stderr)
    except KeyboardInterrupt:  # while it was starting
        status = 130
    except SystemExit as end:  # --help
        status = end.code if isinstance(end.code, int) else 1
    except Exception:  # a fault of the program's own would come back: it must not count as a lost cluster
        traceback.print_exc()
        print(f"resume: {again}", file=sys.stderr)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if status == 1 and _has_ended(ray):
        return 1
    over.set()
    _stop_ray(ray)
    allocation.status_file().write_text(str(allocation.REQUEUE if signals and status == 130 else status))
    return 0


def _other() -> int:
    _wait_for_head()
    ray = _start_ray([f"--address={_url(*_head())}"])
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
    try:
        while ray.poll() is None:
            time.sleep(1)
            try:
                _connect()
            except ConnectionRefusedError:
                return 0  # the head has ended; Ray itself would wait for another for a minute
            except OSError:
                continue  # a network that is slow for a moment
        return 1
    finally:
        _stop_ray(ray)


def _connect() -> None:
    """Open and close a connection to Ray's head.

    Raises:
        OSError: if it does not answer.
    """
    socket.create_connection(_head(), timeout=5).close()


def _wait_for_head() -> None:
    """Return when Ray's head can be reached, or after `JOIN_SECONDS`."""
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        try:
            return _connect()
        except OSError:
            time.sleep(0.1)


def _start_ray(options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start Ray with what the allocation has on this node, never what the node has."""
    address = _own_address(_head()[0])
    if interface := _interface(address):
        # By itself gloo takes the address of the host's name, which Debian gives as 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    cpus = int(os.environ["SLURM_CPUS_ON_NODE"])
    gpus = claim_gpus(cpus)
    memory = memory_share(cpus, gpus)
    store = max(100 << 20, memory // 5)
    command = [sys.executable, "-c", _RAY, "start", "--block", "--disable-usage-stats"]
    command += ["--log-style=record", "--log-color=false"]
    command += [f"--node-ip-address={address}", f"--node-name={os.environ['SLURMD_NODENAME']}"]
    command += [f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
    command += [f"--memory={memory - store}", f"--object-store-memory={store}"]
    # 0: any free port. Only its own node needs to know it.
    command += [f"--{what}-port=0" for what in ("min-worker", "max-worker", "dashboard-agent-listen")]
    libc = ctypes.CDLL(None)
    with open(allocation.log_file(os.environ["SLURMD_NODENAME"]), "ab") as file:
        return subprocess.Popen(
            [*command, *options],
            stdout=file,
            stderr=file,
            # PR_SET_PDEATHSIG: should this process be killed, Ray ends.
            preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),  # noqa: PLW1509, no other thread has begun
        )


def _own_address(host: str) -> str:
    """The address of this node on its way to another one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect((host, 9))
        address: str = probe.getsockname()[0]
    return address


def _interface(address: str) -> str | None:
    """Name of the network interface that has this address; None if none is found."""
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


def _join(head: str) -> None:
    """Connect to the Ray of this allocation and wait for all its nodes.

    Raises:
        NodeMissing: if they are not there within `JOIN_SECONDS`.
    """
    import ray

    deadline = time.monotonic() + JOIN_SECONDS
    missing = allocation.hostnames()
    _wait_for_head()
    ray.init(address=head, log_to_driver=False, logging_level="ERROR")
    while missing:
        for node in ray.nodes():
            if node["Alive"]:
                missing = [name for name in missing if name != node["NodeName"]]
        if missing and time.monotonic() > deadline:
            log = allocation.log_file(missing[0])
            raise NodeMissing(f"node {missing[0]} has not joined within {JOIN_SECONDS:g} s; its log: {log}")
        time.sleep(0.1)


def _end_with(ray: subprocess.Popen[bytes], over: threading.Event) -> None:
    """End this process when its Ray has ended: the driver would only wait."""
    ray.wait()
    if not over.is_set():
        print("Ray on the first node has ended", file=sys.stderr, flush=True)
        os._exit(1)


def _has_ended(ray: subprocess.Popen[bytes]) -> bool:
    """Whether Ray ends within `LOSS_SECONDS`: it looks after its own processes once a second."""
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
