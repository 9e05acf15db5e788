"""Which jobs an experiment consists of, which of them are done, and what each costs. Needs neither torch nor ray."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import fmean

from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import MIXTURE, STAGES, Experiment, InvalidInput, Regime
from dwf_cluster.grid import CHECK_QUERIES, CHECKS, columns, families
from dwf_cluster.store import Store, checkpoints, tables

_SHARD_FLOP, _SHARD_EXAMPLES = 1e13, 8192
"""The most that one evaluation task does, whole batches aside: minutes of a CPU core, and rows that fit into memory."""

_ROW_BYTES, _FILE_BYTES = 8, 5000
"""Of a row of `predictions` without its gate, and of a file of a few rows: as measured."""


@dataclass(frozen=True)
class Job:
    """One task of the pipeline.

    Attributes:
        experiment: that it is a part of.
        folder: of the experiment, which tells equal jobs of two experiments apart.
        stage: one of `STAGES`.
        model: name of the expert, the baseline, or `mixture`.
        family: for the evaluate stage, one of `grid.families`.
        first, stop: for the evaluate stage, its slice of the test set.
        cost: forward passes of one image through one ResNet, roughly: a gradient counts as 2, a training
            step as 3.
        origin: folder of another experiment, whose job comes to the same: then it is copied from there.
    """

    experiment: Experiment = field(repr=False, compare=False)
    folder: str
    stage: str
    model: str
    cost: float = field(compare=False)
    family: str | None = None
    first: int = 0
    stop: int = 0
    origin: str | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """What people see: in the progress, the dashboard, the `jobs` table."""
        return {
            "experts": f"expert {self.model}",
            "joint": "joint",
            "evaluate": f"evaluate {self.model} {self.family} {self.first}-{self.stop - 1}",
        }[self.stage]

    @property
    def file(self) -> str:
        """Name of this job's file in the tables that hold one file a job; in the order of the test set."""
        if self.stage == "evaluate":
            return f"{self.merged_file}-{self.first:09d}"
        return self.name.replace(" ", "-")

    @property
    def merged_file(self) -> str:
        """Name of the file that holds what all slices of an evaluation come to."""
        return f"evaluate-{self.model}-{self.family}"

    @property
    def makes(self) -> tuple[str, str]:
        """What others may need: folder of the experiment, and the model that is trained or the evaluation's file."""
        return self.folder, self.file if self.stage == "evaluate" else self.model

    @property
    def needs(self) -> frozenset[tuple[str, str]]:
        """What others make (`makes`) and must be there before."""
        if self.origin:
            return frozenset({(self.origin, self.makes[1])})
        if self.stage == "experts":
            return frozenset()
        if self.stage == "joint":
            names = tuple(regime.name for regime in self.experiment.mixture_regimes)
        else:
            names = models(self.experiment) if self._is_transferred else (self.model,)
        return frozenset((self.folder, name) for name in names)

    @property
    def _is_transferred(self) -> bool:
        """Whether the images are tested on all models."""
        return self.family == "paper" and "transfer" in self.experiment.evaluation.beyond

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that it writes a file of, besides `jobs`."""
        if self.stage != "evaluate":
            return ("metrics",)
        return (CHECKS,) if self.family == CHECKS else ("predictions", "shards")


def jobs(experiment: Experiment, stage: str, sizes: Sizes) -> list[Job]:
    """The jobs of a stage, longest first: Ray starts them in this order, so the last to end is a short one.

    How the test set is sliced depends on the experiment alone, not on where it runs.

    Args:
        experiment: what to do.
        stage: one of `STAGES`.
        sizes: number of images, and their shape.
    """
    networks = len(experiment.mixture_regimes)
    job = functools.partial(Job, experiment, experiment.folder)
    if stage == "experts":
        passes = experiment.experts.epochs * sizes.train
        found = [job(stage, r.name, passes * _expert_step(r)) for r in experiment.regimes]
    elif stage == "joint":
        steps = fmean(experiment.pgd.steps)  # the first of them is FGSM's gradient too
        found = [job(stage, MIXTURE, experiment.joint.epochs * sizes.train * networks * (2 * steps + 9))]
    else:
        found = []
        for model in (MIXTURE, *(regime.name for regime in experiment.regimes)):
            for family in families(experiment, model):
                cost = _evaluation(experiment, family) * (networks if model == MIXTURE else 1)
                test = min(sizes.test, experiment.evaluation.check_examples) if family == CHECKS else sizes.test
                size = test if family == CHECKS else _slice(experiment, cost, sizes)
                for first in range(0, test, size):
                    stop = min(first + size, test)
                    found.append(job(stage, model, cost * (stop - first), family, first, stop))
    return sorted(found, key=lambda job: -job.cost)


def _slice(experiment: Experiment, cost: float, sizes: Sizes) -> int:
    """Test images of one evaluation task, in whole batches."""
    evaluation = experiment.evaluation
    wanted = evaluation.shard_examples or min(
        _SHARD_EXAMPLES, int(_SHARD_FLOP / (cost * forward_flops(experiment, sizes.shape)))
    )
    return evaluation.batch_size * max(1, -(-wanted // evaluation.batch_size))


def _expert_step(regime: Regime) -> float:
    gradients = {"benign": 0.0, "fgsm": 1.0, "pgd": fmean(regime.steps or (0,))}[regime.attack]
    return 3 + 2 * gradients * regime.fraction


def _evaluation(experiment: Experiment, family: str) -> float:
    """Passes through one network for one image that no attack fools."""
    e, most = experiment.evaluation, max(experiment.evaluation.pgd_steps)
    if family == "paper":
        run = 2 * max(most, e.restart_steps, e.adaptive_steps if e.eot == 1 else 0)
        alone = 2 * e.eot * e.adaptive_steps if e.eot > 1 else 0
        transfer = len(experiment.regimes) + len(experiment.mixture_regimes) if "transfer" in e.beyond else 0
        return run + len(e.fgsm_epsilons) + 2 * (e.restarts - 1) * e.restart_steps + alone + transfer + 1
    gradients, queries = {
        "pgd_gate": (e.adaptive_steps, 1),
        "pgd_expert": (e.adaptive_steps, len(experiment.mixture_regimes)),
        **dict.fromkeys(("pgd_momentum", "pgd_cw", "pgd_l2"), (most, 1)),
        **dict.fromkeys(("apgd", "apgd_l2"), (e.apgd_steps, 1)),
        "square": (0, e.square_queries),
        "autoattack": (1900, 900 + 5000),  # APGD on one loss and nine targets, FAB on nine, Square
        "noise": (0, 1),
        CHECKS: (7 * e.probe_steps, CHECK_QUERIES),
    }[family]
    return float(2 * gradients + queries)


def unfinished(experiment: Experiment, store: Store, sizes: Sizes) -> dict[str, list[Job]]:
    """The jobs that are not done, by stage, in the order of `STAGES`.

    An evaluation is done when the files of all its tables exist; a training when its row of `jobs` exists, its
    checkpoint is at the last epoch, and `metrics` has a row for each epoch.
    """
    files = {table: tables.files(store, table) for table in ("predictions", "shards", CHECKS, "jobs")}
    epochs = tables.row_counts(store, "metrics", models(experiment))

    def is_done(job: Job) -> bool:
        if job.file not in files["jobs"]:
            return False
        if job.stage == "evaluate":
            return all(job.file in files[table] for table in job.tables)
        rows = epochs.get(job.model)
        return rows == experiment.training(job.stage).epochs and is_trained(experiment, store, job.stage, job.model)

    return {stage: [job for job in jobs(experiment, stage, sizes) if not is_done(job)] for stage in STAGES}


def prepare_training(job: Job, store: Store) -> list[str]:
    """Make a model's checkpoints and its rows of `metrics` agree, before a training goes on from them.

    Removes damaged checkpoints. Writes rows that the table lacks from `state.json`. Removes checkpoints whose rows
    are in neither (`state.json` of earlier versions has none): only training again brings these rows back.

    Returns:
        A line for each thing removed, for people.
    """
    damage = checkpoints.discard_damaged(store, job.model)
    notes = [damage] if damage else []
    while state := checkpoints.latest_state(store, job.model):
        epochs = list(range(1, state["epoch"] + 1))
        written = tables.metrics_until(store, job.model, len(epochs))
        rows = state.get("metrics", written)
        if [row["epoch"] for row in rows] == epochs:
            if [row["epoch"] for row in written] != epochs:
                tables.write(store, "metrics", job.model, tables.rows_of(job.experiment, rows))
            break
        path = checkpoints.remove_latest(store, job.model)
        notes.append(f"rows of metrics of {job.model} are lost: checkpoint {path} removed, to train these epochs again")
    return notes


def shared(todo: Sequence[Job], done: Iterable[Job]) -> list[Job]:
    """Of jobs that come to the same, one is to do the work, and the others to copy: `todo` with their `origin`.

    Experts are the same in experiments that differ in other things than what trains them, and so is how they fare.

    Args:
        todo: jobs of several experiments, in the order in which they are to do the work.
        done: those whose work is done.
    """
    signatures: dict[tuple[str, str], str] = {}

    def same(job: Job) -> tuple[object, ...]:
        if job.model == MIXTURE or job._is_transferred:
            return job.makes
        key = job.folder, job.model
        if key not in signatures:
            signatures[key] = job.experiment.expert_signature(job.model)
        grid = job.experiment.evaluation if job.stage == "evaluate" else None
        return job.stage, signatures[key], grid, job.family, job.first, job.stop

    makers: dict[tuple[object, ...], Job] = {}
    for job in chain(done, todo):
        makers.setdefault(same(job), job)
    found = ((job, makers[same(job)]) for job in todo)
    return [job if maker == job else replace(job, origin=maker.folder, cost=0.0) for job, maker in found]


def models(experiment: Experiment) -> tuple[str, ...]:
    """Everything that is trained: experts, baselines, the mixture."""
    return (*(regime.name for regime in experiment.regimes), MIXTURE)


def is_trained(experiment: Experiment, store: Store, stage: str, model: str) -> bool:
    """Whether a model has come to the end of a stage."""
    return checkpoints.latest_epoch(store, model) >= experiment.training(stage).epochs


def select(todo: Mapping[str, list[Job]], stages: Iterable[str]) -> list[Job]:
    """Of the unfinished jobs of an experiment those of some stages.

    Raises:
        InvalidInput: if a given stage needs one that is neither given nor done.
    """
    wanted = set(stages)
    for stage in STAGES:
        needed = [earlier for earlier in STAGES[: STAGES.index(stage)] if earlier not in wanted and todo[earlier]]
        if stage in wanted and todo[stage] and needed:
            raise InvalidInput(
                f"--stages: {stage} cannot be run: {needed[0]} is not done ({todo[needed[0]][0].name}); "
                f"allowed is --stages {','.join((*needed, stage))}"
            )
    return [job for stage in STAGES if stage in wanted for job in todo[stage]]


def stored_bytes(experiments: Sequence[Experiment], sizes: Sizes) -> tuple[float, float]:
    """Estimate what experiments store when they are done.

    Returns:
        Bytes of checkpoints (of each trained model the newest, and the one before with its momentum; models that
        experiments share count once), and bytes of tables.
    """
    every = [job for experiment in experiments for stage in STAGES for job in jobs(experiment, stage, sizes)]
    in_checkpoints = in_tables = 0.0
    for job in shared(every, ()):
        e, networks = job.experiment, len(job.experiment.mixture_regimes) if job.model == MIXTURE else 1
        in_tables += _FILE_BYTES * (1 + len(job.tables))
        if job.stage == "evaluate":
            assert job.family is not None
            others = len(models(e)) - 1 if job._is_transferred else 0
            rows = (len(columns(e, job.family)) + others) * (job.stop - job.first)
            in_tables += rows * (_ROW_BYTES + (4 * networks if job.model == MIXTURE else 0))
        elif not job.origin:
            gate = e.gate.hidden * (math.prod(sizes.shape) + networks) if job.model == MIXTURE else 0
            numbers = networks * _weights(e, sizes.shape[0]) + gate
            in_checkpoints += 4 * numbers * (1 + 2 * (checkpoints.KEPT - 1))
    return in_checkpoints, in_tables


def _weights(experiment: Experiment, channels: int) -> int:
    """Numbers in the state of one ResNet-18 for ten classes: convolutions, four vectors a BatchNorm, the last layer."""
    w = experiment.model.width
    count = 9 * channels * w + 4 * w + 10 * (8 * w + 1)
    for inputs, outputs in ((w, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)):
        shortcut = 0 if inputs == outputs else inputs * outputs + 4 * outputs
        count += 9 * inputs * outputs + 3 * 9 * outputs * outputs + 4 * 4 * outputs + shortcut
    return count


def forward_flops(experiment: Experiment, shape: tuple[int, int, int]) -> float:
    """Floating-point operations of one forward pass of one image through one ResNet-18.

    Args:
        experiment: for the width.
        shape: (channels, height, width) of an image.
    """
    channels, height, width = shape
    w = experiment.model.width
    macs = 9 * channels * w * height * width
    for level, pairs in enumerate(((1, 1), (1, 2), (2, 4), (4, 8))):
        inputs, outputs = (pair * w for pair in pairs)
        height, width = (height, width) if level == 0 else (-(-height // 2), -(-width // 2))
        shortcut = 0 if inputs == outputs else inputs * outputs
        macs += height * width * (9 * inputs * outputs + 3 * 9 * outputs * outputs + shortcut)
    return 2.0 * macs
