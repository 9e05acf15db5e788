"""What the methods of `registry.METHODS` take of the settings: options of a ModelSpec, by name. Imports no torch."""

from __future__ import annotations

from typing import Any

from dwf_cluster.defences.settings import DefenceSettings


def fgsm(settings: DefenceSettings) -> dict[str, Any]:
    """The strengths of FGSM."""
    return {"epsilons": settings.fgsm.epsilons, "epsilon_draw": settings.fgsm.draw}


def pgd(settings: DefenceSettings) -> dict[str, Any]:
    """The strengths of PGD."""
    pgd = settings.pgd
    return {
        "epsilon": pgd.epsilon,
        "step_sizes": pgd.step_sizes or (pgd.step_size,),
        "steps": pgd.steps,
        "random_start": pgd.random_start,
    }


def free(settings: DefenceSettings) -> dict[str, Any]:
    """The strength and replays of Free adversarial training."""
    return {"epsilon": settings.pgd.epsilon, "replays": settings.free.replays}


def fgsm_rs(settings: DefenceSettings) -> dict[str, Any]:
    """The strength of FGSM-RS."""
    return {"epsilon": settings.pgd.epsilon}


def n_fgsm(settings: DefenceSettings) -> dict[str, Any]:
    """The strength and noise of N-FGSM."""
    return {"epsilon": settings.pgd.epsilon, "noise": settings.n_fgsm.noise}


def random_at(settings: DefenceSettings) -> dict[str, Any]:
    """The strengths of the joint stage's FGSM and PGD."""
    return {**fgsm(settings), **pgd(settings)}


def dwf(settings: DefenceSettings) -> dict[str, Any]:
    """The strengths of the joint stage, the gate's form, whether the experts are trained, and by which processes."""
    return {
        **random_at(settings),
        "gate_hidden": settings.gate.hidden,
        "gate_kind": settings.gate.kind,
        "freeze_experts": settings.joint.freeze_experts,
        # Left out by default, so that the training stays the one of results published before there was a choice.
        **({} if settings.joint.parallelism == "ddp" else {"parallelism": settings.joint.parallelism}),
    }


def advmoe(settings: DefenceSettings) -> dict[str, Any]:
    """ADVMoE's form, router and attack."""
    own = settings.advmoe
    return {
        "experts": own.experts,
        "ratio": own.ratio,
        "router": own.router,
        "router_objective": own.router_objective,
        "beta": own.beta,
        "epsilon": settings.pgd.epsilon,
        "steps": own.steps,
        "step_size": own.step_size or settings.pgd.epsilon * 5 / 8,
    }


def trades(settings: DefenceSettings) -> dict[str, Any]:
    """TRADES' weight and attack."""
    trades, pgd = settings.trades, settings.pgd
    return {"beta": trades.beta, "epsilon": pgd.epsilon, "step_size": pgd.step_size, "steps": trades.steps}


def soe(settings: DefenceSettings) -> dict[str, Any]:
    """SoE's sub-models and attack."""
    soe, pgd = settings.soe, settings.pgd
    return {**soe.model_dump(), "epsilon": pgd.epsilon, "step_size": pgd.step_size}
