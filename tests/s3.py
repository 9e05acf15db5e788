"""A real S3 server on this machine, with authentication: SeaweedFS, from PyPI."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from . import PATIENCE


class S3:
    """The server. It can be stopped, and started again with its data."""

    BUCKET = "bucket"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
        self.key, self.secret = secrets.token_hex(8), secrets.token_hex(20)
        self.port, *self._others = _free_ports(11)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with endpoint and credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }

    def start(self) -> None:
        """Start the server and wait until it answers."""
        names = ("master.port", "volume.port", "filer.port", "admin.port")
        ports = [*(f"-{n}" for n in names), *(f"-{n}.grpc" for n in names), "-s3.port.grpc"]
        command = [Path(sys.executable).with_name("weed"), "mini", f"-dir={self.folder}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", "-admin.ui=false", "-webdav=false", f"-s3.port={self.port}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-bucket={self.BUCKET}"]
        command += [f"{name}={port}" for name, port in zip(ports, self._others, strict=False)]
        with open(self.folder / "weed.log", "ab") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, cwd=self.folder, env=self.environment
            )
        deadline = time.monotonic() + PATIENCE
        while not self._is_ready():
            assert self._process.poll() is None, (self.folder / "weed.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "weed.log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Kill the server's processes, as a power cut would."""
        assert self._process is not None
        processes = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        self._process.wait()

    def remove(self) -> None:
        """Stop the server and remove its data."""
        self.stop()
        shutil.rmtree(self.folder)

    def _is_ready(self) -> bool:
        import s3fs

        try:
            files = s3fs.S3FileSystem(
                key=self.key,
                secret=self.secret,
                endpoint_url=self.environment["AWS_ENDPOINT_URL"],
                use_listings_cache=False,
                skip_instance_cache=True,
            )
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            files.pipe_file(f"{self.BUCKET}/here", b"1")  # fails until the volume server is ready
        except OSError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for unbound in sockets:
            unbound.bind(("127.0.0.1", 0))
        return [int(bound.getsockname()[1]) for bound in sockets]
