"""A real S3 server on this machine, with real authentication: SeaweedFS, from PyPI."""

from __future__ import annotations

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
    """The server, which can be stopped and started again with all that it holds."""

    BUCKET = "bucket"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
        self.key, self.secret = secrets.token_hex(8), secrets.token_hex(20)
        self.port, *self._others = _free_ports(11)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a user has in their environment."""
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
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "weed.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "weed.log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop the server, as a power cut would."""
        assert self._process is not None
        parts = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        for part in parts:
            part.kill()
        self._process.wait()

    def remove(self) -> None:
        """Stop it for good."""
        self.stop()
        shutil.rmtree(self.folder)

    def _answers(self) -> bool:
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
            files.pipe_file(f"{self.BUCKET}/here", b"1")  # the bucket is there only when the volume server is
        except OSError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
