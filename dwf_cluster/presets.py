"""Presets, and the Experiment that a command line describes: a preset, a file, assignments of fields.

Importing this module costs neither torch nor ray, so a typing mistake is reported at once.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwf_cluster.attacks.settings import Fgsm, Pgd
from dwf_cluster.data.registry import Data
from dwf_cluster.defences.settings import Experts, Gate, Given, Joint
from dwf_cluster.evaluation.settings import Evaluation
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.registry import Model
from dwf_cluster.settings import MAX_JSON_BYTES, FieldDescription, InvalidInput, describe, flat, regular_file
from dwf_cluster.store import outside

_CIFAR10 = Experiment(
    baselines=("fgsm-at", "pgd-at"),
    data=Data(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop_padding=4, flip=True),
)
_SVHN = _CIFAR10.model_copy(
    update={
        "preset": "svhn",
        "data": Data(source="svhn", mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970), crop_padding=4),
    }
)
_FASHION_MNIST = Experiment(
    preset="fashion-mnist",
    data=Data(source="fashion-mnist", padding=2, mean=(0.2860,), std=(0.3530,), crop_padding=2, flip=True),
    fgsm=Fgsm(epsilons=(0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18)),
    pgd=Pgd(epsilon=0.1, step_size=0.04, steps=(2, 3, 4)),
    experts=Experts(epochs=30),
    joint=Joint(epochs=10),
    evaluation=Evaluation(
        fgsm_epsilons=(0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18),
        pgd_steps=(5, 10),
        restart_steps=20,
        adaptive_steps=20,
        l2_epsilon=1.5,
        l2_step_size=0.3,
    ),
)
_DIGITS = Experiment(
    preset="digits",
    data=Data(source="digits"),
    model=Model(width=8),
    gate=Gate(learning_rate=0.1),  # there is only one joint epoch
    fgsm=Fgsm(epsilons=(0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.27)),
    pgd=Pgd(epsilon=0.15, step_size=0.03, steps=(2, 4, 6, 8, 10)),
    experts=Experts(epochs=4, batch_size=64),
    joint=Joint(epochs=1, batch_size=64),
    evaluation=Evaluation(
        fgsm_epsilons=(0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.27),
        pgd_steps=(5, 10, 20, 30, 40),
        restart_steps=40,
        adaptive_steps=50,
        l2_epsilon=0.75,
        l2_step_size=0.15,
        check_examples=64,
        probe_examples=128,
    ),
)

_MIXTURE_SUITES = ("pgd_gate", "pgd_expert", "pgd_route")
_COMPARED = ("soe", "advmoe", "advmoe-wide", "random-at", "controls", "pgd-ensemble", "resnet18-wide")
"""Other mixtures, and controls, of every experiment on the paper's Table 3."""


def _table3(preset: str, base: Experiment, *plain: str) -> Experiment:
    """Every row of the paper's table for a data set, its controls, and one recipe for all.

    ResNet-18 is the benign expert. What differs between the rows is their networks and what defines their methods; the
    attacks on mixtures are the same for those of soft and of hard gates, so their worst cases compare.
    """
    return base.model_copy(
        update={
            "preset": preset,
            "baselines": (*plain, "fgsm-at", "pgd-at", *_COMPARED),
            "evaluation": base.evaluation.model_copy(update={"beyond": _MIXTURE_SUITES}),
        }
    )


_CIFAR10_TABLE3 = _table3(
    "cifar10-table3",
    _CIFAR10,
    *("vgg19", "resnet50", "densenet169", "googlenet", "inception-v3", "xception", "mobilenet-v2"),
)
_SVHN_TABLE3 = _table3("svhn-table3", _SVHN, "resnet34", "resnet50", "densenet121-k12")
# VGG-19 needs 32 pixels and Inception-V3 9; GoogLeNet has one width, at which it costs as much as all other rows;
# MobileNet-V2 of width 8 does not learn the digits by the common recipe.
_TABLE3_SMALL = _table3(
    "table3-small",
    _DIGITS.model_copy(
        update={
            "experts": _DIGITS.experts.model_copy(update={"epochs": 10}),
            "joint": _DIGITS.joint.model_copy(update={"epochs": 3}),
            "evaluation": _DIGITS.evaluation.model_copy(
                update={"pgd_steps": (10, 20), "restart_steps": 20, "adaptive_steps": 20}
            ),
        }
    ),
    *("resnet34", "resnet50", "densenet121", "xception"),
)

PRESETS: Mapping[str, tuple[Experiment, str]] = {
    "digits": (_DIGITS, "scikit-learn's 1,797 digits, embedded; minutes on a laptop"),
    "fashion-mnist": (_FASHION_MNIST, "70,000 images of clothing, 28x28 padded to 32x32"),
    "cifar10": (_CIFAR10, "the paper's scale: width 64, nine experts, its ranges, its two baselines"),
    "svhn": (_SVHN, "the paper's scale on street-view house numbers"),
    "cifar10-table3": (_CIFAR10_TABLE3, "every CIFAR-10 row of the paper's Table 3, and controls"),
    "svhn-table3": (_SVHN_TABLE3, "every SVHN row of Table 3, AT and SoE, which it lacks, and controls"),
    "table3-small": (_TABLE3_SMALL, "Table 3 on the digits, rows that fit 8x8 pixels; under half an hour"),
}


def build(preset: str, seed: int | None = None, assignments: Sequence[str] = ()) -> Experiment:
    """The Experiment of a command line.

    Args:
        preset: a name of `PRESETS`, the path of an `.npz` file (then with the paper's values, the images' own size,
            and mean and std measured), or the path of an `experiment.json`.
        seed: replaces the preset's seed.
        assignments: `dotted.field=value`, value as JSON, a bare word, or numbers with commas between.

    Raises:
        InvalidInput: for the first value that cannot be used.
    """
    experiment = _with_weights(assemble(preset, seed, assignments))
    if not experiment.data.source.endswith(".npz"):
        return experiment
    status = regular_file(experiment.data.source, "data.source")
    try:
        sha256 = _sha256(experiment.data.source, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise InvalidInput(f"data.source: {experiment.data.source!r} cannot be read: {error.strerror}") from None
    data = experiment.data.model_copy(update={"sha256": sha256})
    return experiment.model_copy(update={"data": data})


def assemble(preset: str, seed: int | None, assignments: Sequence[str]) -> Experiment:
    """As `build`, but an `.npz` file and files of given weights are not read and have no digests."""
    if preset in PRESETS:
        fields = PRESETS[preset][0].model_dump(mode="json")
    elif preset.endswith(".npz"):
        fields = _own_images(preset).model_dump(mode="json")
    elif preset.endswith(".json"):
        fields = _read_json(preset)
    else:
        raise InvalidInput(f"preset: {preset!r} is none of {', '.join(PRESETS)}, nor the path of an .npz or .json file")
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise InvalidInput(f"--set: {assignment!r} is not of the form dotted.field=value")
        _assign(fields, name.strip(), text.strip())
    if seed is not None:
        fields["seed"] = seed
    fields["data"]["sha256"] = None
    experiment = Experiment.from_json(json.dumps(fields))
    given = tuple(entry.model_copy(update={"sha256": None}) for entry in experiment.given)
    return experiment.model_copy(update={"given": given})


def _with_weights(experiment: Experiment) -> Experiment:
    """The experiment with the digests of the files of given weights, and paths that are valid in every folder."""

    def digested(number: int, entry: Given) -> Given:
        digest = outside.sha256(entry.file, f"given.{number}.file")
        return entry.model_copy(update={"file": outside.absolute(entry.file), "sha256": digest})

    given = tuple(digested(number, entry) for number, entry in enumerate(experiment.given))
    return experiment.model_copy(update={"given": given})


def invocation(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """The values of `--preset` and `--set` that, with `--seed`, give an experiment.

    Returns:
        The value of `--preset`, and by its dotted name each field that differs from that preset.
    """
    source = experiment.data.source
    if experiment.preset in PRESETS:
        preset, base = experiment.preset, PRESETS[experiment.preset][0]
    elif source.endswith(".npz"):
        preset, base = source, _own_images(source)
    else:  # a .json file of the user's, which may be gone
        preset, base = "cifar10", PRESETS["cifar10"][0]
    known = flat(base.model_dump(mode="json"))
    fields = flat(experiment.model_dump(mode="json"))
    fields["given"] = [{name: entry[name] for name in entry if name != "sha256"} for entry in fields["given"]]
    return preset, {n: v for n, v in fields.items() if v != known[n] and n not in ("seed", "data.sha256")}


def _own_images(source: str) -> Experiment:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem).strip("-._")[:64] or "images"
    return Experiment(preset=name, data=Data(source=source))


@functools.cache  # a sweep has a thousand experiments of one file
def _sha256(path: str, changed: int, size: int) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha256.update(block)
    return sha256.hexdigest()


def _read_json(path: str) -> dict[str, Any]:
    size = regular_file(path, "preset").st_size
    if size > MAX_JSON_BYTES:
        raise InvalidInput(f"preset: {path!r} cannot be used: it has {size} bytes, allowed are {MAX_JSON_BYTES}")
    try:
        return Experiment.from_json(Path(path).read_text(encoding="utf-8")).model_dump(mode="json")
    except OSError as error:
        raise InvalidInput(f"preset: {path!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"preset: {path!r} cannot be used: it is not text in UTF-8") from None


def _assign(fields: dict[str, Any], name: str, text: str) -> None:
    known = {field.name for field in fields_of_an_experiment()}
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {close[0]}?" if close else "--help-fields lists them all"
        raise InvalidInput(f"{name[:80]}: no such field; {hint}")
    *parents, leaf = name.split(".")
    for parent in parents:
        fields = fields[parent]
    try:
        fields[leaf] = json.loads(text)
    except (ValueError, RecursionError):  # a bare word, such as a file's name
        fields[leaf] = text


def fields_of_an_experiment() -> list[FieldDescription]:
    """Every field that `--set` takes, in order."""
    return list(describe(Experiment))
