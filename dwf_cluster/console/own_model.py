"""The command `dwf evaluate`: measure a model of the user's own, and write tables that `analysis` reads."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwf_cluster.console.command import CommandFailed, Parser, exit_status
from dwf_cluster.defences.names import STORED_OWN_MODEL
from dwf_cluster.defences.registry import OWN_MODEL
from dwf_cluster.evaluation.registry import CHECKS, PAPER, SUITES
from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput, one_line, printable, regular_file
from dwf_cluster.store import Store, check_url, tables

if TYPE_CHECKING:
    from torch import nn

    from dwf_cluster.api import Rows


def evaluate_command(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Args:
        arguments: those after `evaluate`.
    """
    return exit_status(lambda: _run(_parser().parse_args(list(arguments))), after_interrupt="nothing was written")


def _parser() -> Parser:
    parser = Parser(
        prog="dwf evaluate",
        description="Attack a model of your own on test images, and print its accuracy under each attack. Iterations "
        "and strengths are those of the preset.",
        epilog="exit status: 0 measured; 1 a data set or a storage that does not answer; 2 bad input, or a model that "
        "cannot be attacked; 130 interrupted",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, metavar="FILE.py:FUNCTION", help="a function without arguments that returns the model"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="its state dict, as torch.save or safetensors has written it"
    )
    parser.add_argument("--preset", required=True, help="a preset, an .npz or a .json file: the test images")
    parser.add_argument("--suites", default=f"{PAPER},{CHECKS}", help=f"of {','.join(SUITES)} (default: %(default)s)")
    parser.add_argument("--norm", default="linf", help="norm of the threat model: linf, l2 or l1 (default: linf)")
    parser.add_argument("--epsilon", type=float, help="radius of the ball, pixels in [0, 1] (default: the preset's)")
    parser.add_argument("--step-size", type=float, help="length of a step, pixels in [0, 1] (default: the preset's)")
    parser.add_argument("--seed", type=int, help="seed of the random starts (default: 0)")
    parser.add_argument("--batch-size", type=int, help="images attacked at once (default: 512)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the model's own)")
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="attack N test images: the first ones, of an .npz file a class-balanced draw (default: all)",
    )
    parser.add_argument(
        "--data-folder", type=Path, default=Path("data"), metavar="FOLDER", help="where data sets are (default: ./data)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="write the tables of an experiment below this path or URL")
    parser.add_argument(
        "--save-adversarial",
        choices=("float", "uint8"),
        help="with --out: keep the adversarial images, as they are or rounded to uint8 within the ball",
    )
    parser.add_argument(
        "--from",
        dest="saved",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="attack nothing: verify these files of adversarial images, and test the model on them",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.out:
        check_url(options.out)
    _refuse_combinations(options)
    file, _, function = options.model.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise InvalidInput(f"--model: {options.model!r} cannot be used: allowed is FILE.py:FUNCTION")
    experiment = _experiment(options)
    regular_file(file, "--model")
    # Not before the input is known to be good: a typing mistake must not wait for torch.
    from dwf_cluster.api import check_suites, measure
    from dwf_cluster.attacks.gradient import NotLogits
    from dwf_cluster.data import subsets
    from dwf_cluster.data.sources import DataUnavailable, load
    from dwf_cluster.evaluation.subject import isolated, prepare, with_route, without_gradient

    suites = check_suites(options.suites.split(","), options.norm)
    try:
        images = load(experiment.data, options.data_folder)
    except DataUnavailable as error:
        raise CommandFailed(str(error)) from None
    if experiment.corruption_files:
        raise InvalidInput(
            "evaluation.corruptions: 'files' cannot be used for a model of your own: allowed is generated"
        )
    model = _model(Path(file), function, options.weights)
    if options.saved:
        from dwf_cluster.console.saved_images import show_accuracies

        show_accuracies(options.saved, model, images, options.device, experiment.evaluation.batch_size)
        return 0
    pixels = images.x_test.transpose(0, 2, 3, 1)
    evaluation, threats, seed = experiment.evaluation, experiment.threats, experiment.seed
    try:
        with isolated(seed):
            subject = prepare(model, pixels, images.y_test, options.device, evaluation.batch_size)
            if warning := without_gradient(subject):
                print(f"warning: {warning}", file=sys.stderr)
            suites, added = with_route(subject, suites)
            if added:
                print(f"warning: {added}", file=sys.stderr)
                experiment = _measured_by(experiment, suites)
            checked = subsets.checked(experiment.data.source, images.y_test, evaluation.check_examples)
            shown, kept = sys.stderr.isatty(), options.save_adversarial
            rows = measure(subject, suites, evaluation, threats, seed, shown, checked, kept)
    except NotLogits as error:
        raise InvalidInput(f"--model: {options.model!r} cannot be used: {error}") from None
    with tempfile.TemporaryDirectory() as temporary:
        store = experiment.store(options.out or temporary)
        _write(store, experiment, rows)
        _show(store, experiment)
    if options.out:
        print(store.root)
    return 0


def _refuse_combinations(options: argparse.Namespace) -> None:
    """Refuse options that have no meaning together."""
    if options.save_adversarial and not options.out:
        raise InvalidInput("--save-adversarial: cannot be used without --out")
    for name in ("out", "epsilon", "step_size", "examples", "seed"):
        if options.saved and getattr(options, name) is not None:
            raise InvalidInput(f"--{name.replace('_', '-')}: cannot be used with --from, which attacks nothing")


def _experiment(options: argparse.Namespace) -> Experiment:
    """The preset, with the user's model in the place of its models."""
    suites = options.suites.split(",")
    if unknown := next((name for name in suites if name not in SUITES), None):
        raise InvalidInput(f"--suites: {unknown!r} cannot be used: allowed are {', '.join(SUITES)}")
    prefix = "pgd." if options.norm == "linf" else f"evaluation.{options.norm}_"
    fields = {
        "evaluation.norm": options.norm,
        "evaluation.epsilon": None if options.epsilon is None else "null",  # of a .json file
        "evaluation.step_size": None if options.step_size is None else "null",
        f"{prefix}epsilon": options.epsilon,
        f"{prefix}step_size": options.step_size,
        "evaluation.batch_size": options.batch_size,
        "data.test_examples": options.examples,
        "evaluation.beyond": ",".join(name for name in suites if name not in (PAPER, CHECKS)),
        "baselines": "",
        "given": "",
        "defence": OWN_MODEL,
        "preset": _name(options),
    }
    return build(
        options.preset, options.seed, [f"{name}={value}" for name, value in fields.items() if value is not None]
    )


def _measured_by(experiment: Experiment, suites: Sequence[str]) -> Experiment:
    """The experiment with these suites; their columns are those of its result table."""
    beyond = tuple(name for name in suites if name not in (PAPER, CHECKS))
    return experiment.model_copy(update={"evaluation": experiment.evaluation.model_copy(update={"beyond": beyond})})


def _name(options: argparse.Namespace) -> str:
    """Name of the experiment: file, function and weights; the same command again replaces its rows."""
    file, _, function = options.model.rpartition(":")
    parts = (Path(file).stem, function, *((options.weights.stem,) if options.weights else ()))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._")[:64] or STORED_OWN_MODEL


def _model(file: Path, function: str, weights: Path | None) -> nn.Module:
    """Call the user's function, and load the weights.

    Raises:
        InvalidInput: if there is no such function, it fails, or the weights are not the model's.
    """
    from torch import nn

    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    sys.path.insert(0, str(file.parent))  # for the files that it imports from beside it
    name = f"{file}:{function}"
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise InvalidInput(f"--model: {name!r} cannot be used: {file} has no function {function}")
        model = getattr(module, function)()
    except InvalidInput:
        raise
    except Exception as error:  # of any class: it is the user's code
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InvalidInput(f"--model: {name!r} cannot be used: {reason}") from None
    finally:
        sys.path.remove(str(file.parent))
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"--model: {name!r} cannot be used: it returns {type(model).__name__}, allowed is nn.Module")
    if weights is not None:
        _load_weights(model, weights)
    return model


def _load_weights(model: nn.Module, file: Path) -> None:
    import torch
    from safetensors.torch import load_file

    regular_file(str(file), "--weights")
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    # What unpickling and deserializing raise on a file of another kind is written down nowhere.
    except Exception as error:
        raise InvalidInput(f"--weights: {str(file)!r} cannot be used: {one_line(error)}") from None


def _write(store: Store, experiment: Experiment, rows: Rows) -> None:
    """The tables of an experiment with one model; `evaluations` last, as in a run."""
    from dwf_cluster.evaluation.merge import forget, merge
    from dwf_cluster.evaluation.worst_case import WorstCaseFile
    from dwf_cluster.plan.jobs import EVALUATE, Job

    store.write("experiment.json", experiment.to_json().encode())
    spec = experiment.defended

    def job(suite: str, examples: int) -> Job:
        return Job(experiment, experiment.folder, spec, EVALUATE, spec.name, 0.0, 0.0, suite, 0, examples)

    shards: dict[str, list[str]] = {}
    for suite in dict.fromkeys([row["family"] for row in rows.shards]):
        own = [row for row in rows.shards if row["family"] == suite]
        written = job(suite, own[0]["examples"])
        attacks = {row["attack"] for row in own}
        if suite in rows.adversarial:
            store.write(written.images_file, rows.adversarial[suite].to_npz())
        else:
            store.remove(written.images_file)  # of an earlier run of the same command
        tables.write(store, "predictions", written.file, [row for row in rows.predictions if row["attack"] in attacks])
        tables.write(store, "shards", written.file, own)
        shards[written.evaluation_file] = [written.file]
    if rows.checks:
        tables.write(store, CHECKS, job(CHECKS, rows.checks[0]["examples"]).file, rows.checks)
    files = tables.files(store, "shards")  # those of other suites that an earlier command has measured, too
    worst = WorstCaseFile(
        spec.name, experiment.threats, tuple(file for suite in SUITES if (file := job(suite, 0).file) in files)
    )
    if shards:
        forget(store, (*shards, worst.file))  # of an earlier run of the same command
        merge(store, shards, [worst])


def _show(store: Store, experiment: Experiment) -> None:
    from rich.console import Console

    from dwf_cluster.console.tables import result_table, show, warnings

    if tables.files(store, "evaluations"):
        show(Console(), result_table(experiment, store))
    for line in warnings(experiment, store) if tables.files(store, CHECKS) else ():
        print(printable(line))
