"""What runs: the jobs of an experiment, which of them are pending, and what each costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from dwf_cluster.data.registry import Shape, Sizes
from dwf_cluster.defences.registry import METHODS, ModelSpec, trained_sources
from dwf_cluster.defences.settings import Training
from dwf_cluster.evaluation.check_cost import check_cost, check_transfer_cost
from dwf_cluster.evaluation.registry import CHECKS, PAPER, SUITES, TRANSFER, threat_count
from dwf_cluster.experiment import Experiment
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store, checkpoints

EXPERTS, JOINT, EVALUATE = STAGES = ("experts", "joint", "evaluate")
"""The stages of the pipeline, in order: models without parents, models with parents, evaluations."""

ADVERSARIAL = "adversarial"
"""Folder of an experiment's adversarial images: one `.npz` file for each shard of an evaluation."""

_SHARD_FLOP, _SHARD_EXAMPLES = 1e13, 8192
"""The largest evaluation task, up to a whole batch: minutes of a CPU core, and rows that fit into memory."""


@dataclass(frozen=True)
class Job:
    """One task of the pipeline: the training of a model, or one suite on a shard of the test set.

    Attributes:
        experiment: the experiment that the job belongs to.
        folder: the experiment's folder; distinguishes equal jobs of two experiments.
        spec: the model.
        stage: one of `STAGES`.
        model: the model's name.
        suite: for an evaluation, a key of `evaluation.registry.SUITES`.
        first, stop: for an evaluation, its shard of the test set.
        cost: forward passes of one image through one of the model's networks, roughly: a gradient counts as 2, a
            training step as 3.
        pass_flop: floating-point operations of such a pass: `forward_flops`.
        copy_of: folder of another experiment whose job has the same results: they are copied from there.
        until: a training stops after this epoch, as if it had been asked to stop; None: after its last.
    """

    experiment: Experiment = field(repr=False, compare=False)
    folder: str
    spec: ModelSpec = field(repr=False, compare=False)
    stage: str
    model: str
    pass_flop: float = field(compare=False)
    cost: float = field(compare=False)
    suite: str | None = None
    first: int = 0
    stop: int = 0
    copy_of: str | None = field(default=None, compare=False)
    until: int | None = field(default=None, compare=False)

    @property
    def flop(self) -> float:
        """Its cost in floating-point operations, which compares jobs of models with different networks."""
        return self.cost * self.pass_flop

    @property
    def is_training(self) -> bool:
        """Whether the job trains a model; otherwise it evaluates one."""
        return self.suite is None

    @property
    def training(self) -> Training:
        """Epochs, learning rate and so on of its model."""
        return self.spec.training

    @property
    def name(self) -> str:
        """Its name in the progress, the dashboard and the `jobs` table."""
        if self.suite is not None:
            return f"evaluate {self.model} {self.suite} {self.first}-{self.stop - 1}"
        if self.spec.parents:
            stored = checkpoints.stored_name(self.model)
            return stored if stored == JOINT else f"{JOINT} {self.model}"
        return f"expert {self.model}"

    @property
    def file(self) -> str:
        """Name of its file in the tables that hold one file a job; names sort in the order of the test set."""
        if self.is_training:
            return self.name.replace(" ", "-")
        return f"{self.evaluation_file}-{self.first:09d}"

    @property
    def images_file(self) -> str:
        """Path of its file of adversarial images, below the experiment's folder."""
        return f"{ADVERSARIAL}/{self.file}.npz"

    @property
    def evaluation_file(self) -> str:
        """Name of the file of `evaluations` that all shards of this evaluation are merged into."""
        return f"evaluate-{self.model}-{self.suite}"

    @property
    def output(self) -> tuple[str, str]:
        """Its result, as in `inputs` of other jobs: the experiment's folder, and the model or the evaluation's file."""
        return self.folder, self.model if self.is_training else self.file

    @functools.cached_property
    def inputs(self) -> frozenset[tuple[str, str]]:
        """The outputs of other jobs that must exist before it starts."""
        if self.copy_of:
            return frozenset({(self.copy_of, self.output[1])})
        if self.is_training:
            names = self.spec.parents
        else:
            models = self.experiment.models
            names = tuple(n for name in self.evaluated_with for n in trained_sources(models, name))
        return frozenset((self.folder, name) for name in names)

    @property
    def evaluated_with(self) -> tuple[str, ...]:
        """For an evaluation, the models that it needs: its own, and those that images are tested or made on."""
        if self.tests_transfer:
            return self.experiment.names
        sources = _check_sources(self.experiment, self.spec) if self.suite == CHECKS else ()
        return (self.model, *(source.name for source in sources))

    @property
    def tests_transfer(self) -> bool:
        """Whether its adversarial images are tested on all models."""
        return self.suite == PAPER and TRANSFER in self.experiment.evaluation.beyond

    @property
    def keeps_images(self) -> bool:
        """Whether it writes a file of adversarial images."""
        return self.suite not in (None, CHECKS) and self.experiment.save_adversarial is not None

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that it writes a file of, besides `jobs`."""
        if self.is_training:
            return ("metrics",)
        return (CHECKS,) if self.suite == CHECKS else ("predictions", "shards")


def jobs(experiment: Experiment, stage: str, sizes: Sizes) -> list[Job]:
    """The jobs of a stage, the longest first: they start in this order, so the last one to end is short.

    How the test set is cut into shards depends on the experiment alone, not on where it runs.

    Args:
        experiment: whose jobs.
        stage: one of `STAGES`.
        sizes: number of images, and their shape.

    Raises:
        InvalidInput: if a network of its models needs larger images.
    """
    experiment.fail_if_not_buildable(min(sizes.shape[1:]))
    listed: list[Job] = []
    *others, defended = experiment.models
    for spec in (defended, *others):  # of jobs of equal cost, the defended model's start first
        job = functools.partial(
            Job, experiment, experiment.folder, spec, stage, spec.name, forward_flops(spec, sizes.shape)
        )
        if stage == EVALUATE:
            listed += _evaluations(job, experiment, spec, sizes)
        elif METHODS[spec.method].losses is not None and stage == (JOINT if spec.parents else EXPERTS):
            # Given weights are not trained, but tested.
            listed.append(job(spec.training.epochs * sizes.train * METHODS[spec.method].passes(spec) or sizes.test))
    return sorted(listed, key=lambda job: -job.flop)


def _evaluations(job: Callable[..., Job], experiment: Experiment, spec: ModelSpec, sizes: Sizes) -> Iterator[Job]:
    for suite in experiment.suites(spec):
        cost = _passes(experiment, suite, spec, sizes.shape) * spec.networks
        test = min(sizes.test, SUITES[suite].examples(experiment.evaluation) or sizes.test)
        size = test if suite == CHECKS else _shard_size(experiment, spec, cost, sizes)
        for first in range(0, test, size):
            stop = min(first + size, test)
            yield job(cost * (stop - first), suite, first, stop)


def _check_sources(experiment: Experiment, spec: ModelSpec) -> tuple[ModelSpec, ...]:
    """The models that the checks of a model make images on: all others without parents, which need no joint stage."""
    return tuple(other for other in experiment.models if not other.parents and other.name != spec.name)


def _shard_size(experiment: Experiment, spec: ModelSpec, cost: float, sizes: Sizes) -> int:
    """Test images of one evaluation task, in whole batches."""
    evaluation = experiment.evaluation
    examples = evaluation.shard_examples or min(
        _SHARD_EXAMPLES, int(_SHARD_FLOP / (cost * forward_flops(spec, sizes.shape)))
    )
    return evaluation.batch_size * max(1, -(-examples // evaluation.batch_size))


def _passes(experiment: Experiment, suite: str, spec: ModelSpec, shape: Shape) -> float:
    """Passes through one network of a model for one image that no attack fools, divided by its networks.

    Passes through other models count by their floating-point operations.
    """
    evaluation, own = experiment.evaluation, forward_flops(spec, shape)

    def others(specs: Iterable[ModelSpec]) -> float:
        return sum(METHODS[other.method].flops(other, shape) for other in specs) / own

    if suite == CHECKS:
        sources = others(_check_sources(experiment, spec))
        return check_cost(evaluation, math.prod(shape)) + sources * check_transfer_cost(evaluation) / spec.networks
    cost = SUITES[suite].cost(evaluation, METHODS[spec.method].parts(spec, shape))
    if suite == PAPER and TRANSFER in evaluation.beyond:
        cost += others(experiment.models)
    return float(cost) * threat_count(evaluation, experiment.threats, suite)


def pending(experiment: Experiment, store: Store, sizes: Sizes) -> dict[str, list[Job]]:
    """The jobs that are not done, by stage, in the order of `STAGES`.

    An evaluation is done if the files of all its tables exist, and that of its adversarial images, if they are to be
    kept; a training if its row of `jobs` exists, its newest checkpoint is of the last epoch, and `metrics` has a row
    for each epoch.
    """
    from dwf_cluster.store import tables  # which imports pyarrow; a typing mistake and `status` do not need it

    files = {table: tables.files(store, table) for table in ("predictions", "shards", CHECKS, "jobs")}
    epochs = tables.row_counts(store, "metrics", experiment.names)
    kept = {name.removesuffix(".npz") for name in store.names(ADVERSARIAL)} if experiment.save_adversarial else set()

    def is_done(job: Job) -> bool:
        if job.file not in files["jobs"]:
            return False
        if not job.is_training:
            return all(job.file in files[table] for table in job.tables) and (not job.keeps_images or job.file in kept)
        return epochs.get(job.model) == job.training.epochs and is_trained(job.spec, store)

    return {stage: [job for job in jobs(experiment, stage, sizes) if not is_done(job)] for stage in STAGES}


def prepare_training(job: Job, store: Store) -> list[str]:
    """Make a model's checkpoints and its rows of `metrics` agree, before its training resumes from them.

    Removes damaged checkpoints. Writes rows that the table lacks from `state.json`. Removes checkpoints whose rows
    are in neither (`state.json` of earlier versions has none): only training again restores these rows.

    Returns:
        A line for each checkpoint removed.
    """
    from dwf_cluster.store import tables

    damage = checkpoints.discard_damaged(store, job.model)
    notes = [damage] if damage else []
    while state := checkpoints.latest_state(store, job.model):
        epochs = list(range(1, state["epoch"] + 1))
        written = tables.metrics_until(store, job.model, len(epochs))
        rows = state.get("metrics", written)
        if [row["epoch"] for row in rows] == epochs:
            if [row["epoch"] for row in written] != epochs:
                tables.write(store, "metrics", job.model, rows)
            break
        path = checkpoints.remove_latest(store, job.model)
        notes.append(f"rows of metrics of {job.model} are lost: checkpoint {path} removed, to train these epochs again")
    return notes


def deduplicate(waiting: Sequence[Job], done: Iterable[Job] = ()) -> list[Job]:
    """Deduplicate: of jobs with equal results, the first runs and the others copy it (`copy_of`).

    Experiments that differ only in settings that do not decide a model without parents share it and its evaluations.
    A model with parents is never shared: each trial of a sweep trains its own.

    Args:
        waiting: jobs of several experiments, in the order in which they will run.
        done: jobs that have run.

    Returns:
        The waiting jobs.
    """
    signatures: dict[tuple[str, str], str] = {}

    def signature(job: Job, model: str) -> str:
        key = job.folder, model
        if key not in signatures:
            signatures[key] = job.experiment.model_signature(model)
        return signatures[key]

    def result(job: Job) -> tuple[object, ...]:
        if job.spec.parents or job.tests_transfer:
            return job.output
        if job.is_training:
            return job.stage, signature(job, job.model)
        models = tuple(signature(job, name) for name in job.evaluated_with)
        settings = job.experiment.evaluation, job.experiment.save_adversarial
        return job.stage, models, settings, job.suite, job.first, job.stop

    first: dict[tuple[object, ...], Job] = {}
    for job in chain(done, waiting):
        first.setdefault(result(job), job)
    sources = ((job, first[result(job)]) for job in waiting)
    return [job if source == job else replace(job, copy_of=source.folder, cost=0.0) for job, source in sources]


def is_trained(spec: ModelSpec, store: Store) -> bool:
    """Whether a model's training has ended; for a model that is not trained, ask for its `trained_sources`."""
    return checkpoints.latest_epoch(store, spec.name) >= spec.training.epochs


def select(waiting: Mapping[str, list[Job]], stages: Iterable[str]) -> list[Job]:
    """The pending jobs of the selected stages.

    Args:
        waiting: the pending jobs of every stage.
        stages: the selected ones.

    Raises:
        InvalidInput: if a selected stage needs one that is neither selected nor done.
    """
    selected = set(stages)
    for stage in STAGES:
        needed = [earlier for earlier in STAGES[: STAGES.index(stage)] if earlier not in selected and waiting[earlier]]
        if stage in selected and waiting[stage] and needed:
            raise InvalidInput(
                f"--stages: {stage} cannot be run: {needed[0]} is not done ({waiting[needed[0]][0].name}); "
                f"allowed is --stages {','.join((*needed, stage))}"
            )
    return [job for stage in STAGES if stage in selected for job in waiting[stage]]


def forward_flops(spec: ModelSpec, shape: Shape) -> float:
    """Floating-point operations of one forward pass of one image through one network of a model, their mean.

    Args:
        spec: the model.
        shape: (channels, height, width) of an image.
    """
    return METHODS[spec.method].flops(spec, shape) / spec.networks
