"""An existing Ray cluster with different nodes: jobs run only on equal nodes with GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from ..conftest import TINY
from ..process import Launch

SERVER = """
import json, sys
from ray.cluster_utils import Cluster

nodes = json.loads(sys.argv[1])
cluster = Cluster()
ids = {name: cluster.add_node(dashboard_port=0, **options).node_id for name, options in nodes.items()}
print(json.dumps({"address": cluster.address, "ids": ids}), flush=True)
for _ in sys.stdin:  # each line requests the nodes of the workers
    actors = cluster.global_state.actor_table(None, None, None).values()
    ids = [actor["Address"]["NodeID"] for actor in actors if actor["ActorClassName"] == "RayTrainWorker"]
    print(json.dumps(ids), flush=True)
cluster.shutdown()
"""


class RayNodes:
    """A Ray cluster of several nodes on this machine.

    Attributes:
        address: of the head.
        ids: Ray's IDs of the nodes, by their names.
    """

    def __init__(self, nodes: dict[str, dict[str, int]]) -> None:
        command = [sys.executable, "-c", SERVER, json.dumps(nodes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = json.loads(self._line())
        self.address, self.ids = answer["address"], answer["ids"]

    def nodes_of_workers(self) -> list[str]:
        """IDs of the nodes on which Ray Train has started workers so far."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        ids: list[str] = json.loads(self._line())
        return ids

    def stop(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("{", "[")):  # Ray prints too
                return line
        raise AssertionError("no answer")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[RayNodes]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", f"{folder}/token")
        Path(folder, "token").write_text("c0ffee" * 10)
        running = RayNodes(request.param)
        try:
            yield running
        finally:
            running.stop()


DIFFERENT = {
    "head": {"num_cpus": 4, "num_gpus": 0},
    "odd": {"num_cpus": 4, "num_gpus": 1},
    "first": {"num_cpus": 2, "num_gpus": 2},
    "second": {"num_cpus": 2, "num_gpus": 2},
}


@pytest.mark.parametrize("ray", [DIFFERENT], indirect=True)
def test_jobs_run_on_equal_gpu_nodes_and_a_line_names_the_other_nodes(ray: RayNodes, launch: Launch) -> None:
    one_expert = [*TINY, "experts.fgsm=0", "experts.pgd=0", "experts.epochs=1"]
    # One job at a time: on this machine the nodes' GPUs, which do not exist, have the same names.
    wide = ["joint.batch_size=64", "joint.epochs=1"]
    result = launch("--address", ray.address, "--stages", "experts,joint", "--set", *one_expert, *wide)
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("nodes: "))
    assert line.startswith("nodes: 2 with 2 CPU, 2 GPU are used; left out: ")
    assert line.count("(4 CPU, 0 GPU)") == line.count("(4 CPU, 1 GPU)") == 1
    jobs = pd.read_parquet(Path(result.stdout.splitlines()[-1]) / "results" / "jobs").set_index("task")
    assert jobs.gpus.to_dict() == {"expert benign": 1.0, "joint": 2.0}
    nodes = ray.nodes_of_workers()
    assert len(nodes) == 1 + 2
    assert set(nodes) <= {ray.ids["first"], ray.ids["second"]}


@pytest.mark.parametrize("ray", [{"head": {"num_cpus": 0, "num_gpus": 0}}], indirect=True)
def test_a_head_node_without_cpus_is_an_error_of_one_line(ray: RayNodes, launch: Launch) -> None:
    result = launch("--address", ray.address, "--set", *TINY)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: --address: no node of that Ray has a CPU for jobs"
    assert "Traceback" not in result.stderr
    assert not (launch.folder / "runs").exists()
