"""Which jobs an experiment consists of, which of them are done, and what each costs. Needs neither torch nor ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from dwf_cluster.experiment import MIXTURE, STAGES, Experiment, InvalidInput, Regime
from dwf_cluster.grid import FAMILIES, columns
from dwf_cluster.store import Store, checkpoints, tables


@dataclass(frozen=True)
class Job:
    """One task of the pipeline.

    Attributes:
        stage: one of `STAGES`.
        model: name of the expert, the baseline, or `mixture`.
        family: for the evaluate stage, one of `grid.FAMILIES`.
        cost: forward passes of one image through one ResNet, roughly: a gradient counts as 2, a training
            step as 3.
    """

    stage: str
    model: str
    family: str | None
    cost: float

    @property
    def name(self) -> str:
        """What people see: in the progress, the dashboard, the `jobs` table."""
        return {
            "experts": f"expert {self.model}",
            "joint": "joint",
            "evaluate": f"evaluate {self.model} {self.family}",
        }[self.stage]

    @property
    def file(self) -> str:
        """Name of this job's file in the tables that hold one file a job."""
        return self.name.replace(" ", "-")

    def is_done(self, experiment: Experiment, store: Store) -> bool:
        """Whether the store holds what this job makes."""
        if self.stage == "evaluate":
            return tables.exists(store, "predictions", self.file)  # written last
        return checkpoints.latest_epoch(store, self.model) >= experiment.training(self.stage).epochs


def jobs(experiment: Experiment, stage: str, train: int, test: int) -> list[Job]:
    """The jobs of a stage, longest first: Ray starts them in this order, so the last to end is a short one.

    Args:
        experiment: what to do.
        stage: one of `STAGES`.
        train, test: number of training and of test images.
    """
    size = len(experiment.mixture_regimes)
    if stage == "experts":
        passes = experiment.experts.epochs * train
        found = [Job(stage, r.name, None, passes * _expert_step(r)) for r in experiment.regimes]
    elif stage == "joint":
        steps = fmean(experiment.pgd.steps)  # the first of them is FGSM's gradient too
        found = [Job(stage, MIXTURE, None, experiment.joint.epochs * train * size * (2 * steps + 9))]
    else:
        models = [MIXTURE, *(regime.name for regime in experiment.regimes)]
        found = [
            Job(stage, model, family, test * _evaluation(experiment, family) * (size if model == MIXTURE else 1))
            for model in models
            for family in FAMILIES
        ]
    return sorted(found, key=lambda job: -job.cost)


def _expert_step(regime: Regime) -> float:
    gradients = {"benign": 0.0, "fgsm": 1.0, "pgd": fmean(regime.steps or (0,))}[regime.attack]
    return 3 + 2 * gradients * regime.fraction


def _evaluation(experiment: Experiment, family: str) -> float:
    grid = columns(experiment, family)
    gradients = {
        "fgsm": 1,
        "pgd": grid[-1].steps,
        "pgd_restarts": experiment.evaluation.restarts * experiment.evaluation.restart_steps,
        "pgd_adaptive": experiment.evaluation.adaptive_steps * experiment.evaluation.eot,
    }[family]
    return 2 * (gradients or 0) + len(grid)


def unfinished(
    experiment: Experiment, store: Store, stages: Iterable[str], train: int, test: int
) -> dict[str, list[Job]]:
    """The jobs of the given stages that the store does not hold yet, by stage, in the order of `STAGES`.

    Raises:
        InvalidInput: if a given stage needs one that is neither given nor done.
    """
    todo = {
        stage: [job for job in jobs(experiment, stage, train, test) if not job.is_done(experiment, store)]
        for stage in STAGES
    }
    wanted = set(stages)
    for stage in STAGES:
        needed = [earlier for earlier in STAGES[: STAGES.index(stage)] if earlier not in wanted and todo[earlier]]
        if stage in wanted and todo[stage] and needed:
            raise InvalidInput(
                f"--stages: {stage} cannot be run: {needed[0]} is not done ({todo[needed[0]][0].name}); "
                f"allowed is --stages {','.join((*needed, stage))}"
            )
    return {stage: todo[stage] for stage in STAGES if stage in wanted}


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
