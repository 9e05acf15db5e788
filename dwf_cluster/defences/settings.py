"""Settings of the defences: how models are trained, and what a defence's recipe may read."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from dwf_cluster.attacks.settings import Fgsm, Pgd
from dwf_cluster.models.registry import BACKBONES, Model
from dwf_cluster.settings import Count, CountOrNone, Decay, Name, OneOf, PerChannel, Pixels, Rate, Settings, Spreads
from dwf_cluster.store import checkpoints


class Gate(Settings):
    """The multilayer perceptron that weighs the experts, equation (2)."""

    hidden: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Units of its hidden layer. Our assumption: 128; the paper calls the gate small."""
    learning_rate: Rate = 0.01
    """Peak learning rate of its parameters. Our assumption: 0.01, in the joint stage only; the paper lists
    hyper-parameters of the gate's own, epochs among them, and does not say when they are used."""
    weight_decay: Decay = 5e-4
    """Weight decay of its parameters. Our assumption: 5e-4."""
    kind: Literal["soft", "hard"] = "soft"
    """`hard` gives each image to the one expert of the largest weight; gradients, those of attacks too, pass through
    the soft weights (straight-through estimator). That gradient is not the model's, so accuracies under attacks that
    follow it are upper bounds; `pgd_route`, which does not, measures every hard gate. The paper's is soft."""


class Training(Settings):
    """SGD with momentum and weight decay, cosine annealing over all its steps, cross-entropy."""

    epochs: Count = 200
    """Passes over the training images. Our assumption: 200 for the experts, 50 for the joint stage."""
    learning_rate: Rate = 0.1
    """Peak learning rate. Our assumption: 0.1 for the experts, 0.01 for the joint stage."""
    batch_size: Count = 128
    """Images of one step, over all workers; the joint stage trains on three versions of each.
    Our assumption: 128."""
    weight_decay: Decay = 5e-4
    """Weight decay. Our assumption: 5e-4."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum. Our assumption: 0.9."""
    accumulation: Count = 1
    """Cut each batch into n parts whose gradients are added up before the step: less memory, the same
    gradient, but BatchNorm then normalises with the statistics of a part."""
    keep: Literal["last", "best"] = "last"
    """Weights that are kept: of the last epoch, or of the one with the highest robust accuracy of the probe on the
    validation images (of equal ones the first), as Rice et al. (2020) do against robust overfitting; `best` needs
    `data.validation_examples`. Our assumption: the paper keeps the last."""
    attack_batchnorm: Literal["eval", "train"] = "eval"
    """How BatchNorm normalises while the model is attacked in training: `eval` with its running statistics, `train`
    with those of the images under attack, as in a training step; the attack changes no statistics. Our assumption:
    `eval`, the mode in which the model is evaluated."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions in training and in its attacks. Weights, momentum, pixels, linear layers, losses and the
    evaluation are float32 in any case. `bfloat16` is for GPUs. Our assumption: `float32`."""

    @property
    def of_a_model(self) -> Training:
        """These values without the fields of a subclass."""
        return Training(**{name: getattr(self, name) for name in Training.model_fields})


class Experts(Training):
    """How many experts of each kind, and how each is trained (algorithms 1 and 2)."""

    benign: CountOrNone = 1
    """Experts trained on clean images."""
    fgsm: CountOrNone = 4
    """Experts trained on FGSM examples of a random epsilon."""
    pgd: CountOrNone = 4
    """Experts trained on PGD examples of a random number of iterations."""

    @model_validator(mode="after")
    def _at_least_one(self) -> Experts:
        if self.benign + self.fgsm + self.pgd == 0:
            raise ValueError("a mixture needs at least one expert (benign, fgsm or pgd)")
        return self


class Joint(Training):
    """How experts and gate are trained together, end to end (algorithm 3)."""

    epochs: Count = 50
    """Passes over the training images. Our assumption: 50."""
    learning_rate: Rate = 0.01
    """Peak learning rate of the experts. Our assumption: 0.01."""
    freeze_experts: bool = False
    """Train the gate alone: the experts stay as they were pre-trained. The paper freezes nothing."""
    parallelism: Literal["ddp", "experts"] = "ddp"
    """What several processes divide: `ddp` each batch, `experts` the experts, of which each process trains whole ones
    on whole batches. With `experts` the number of processes changes no number, and BatchNorm sees whole batches; with
    `ddp` it sees parts. The paper's is `ddp`."""


class Soe(Settings):
    """Synergy of Experts (SoE, Cui et al. 2022): sub-models that report how sure they are; the surest one decides."""

    experts: Annotated[int, Field(ge=2, le=100)] = 3
    """Sub-models, each a whole network of `model.backbone`. The release has three ResNet-20."""
    temperature: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Factor of the confidences whose softmax weighs the sub-models' losses: 0 trains all of them alike, a large one
    only the surest. As the release."""
    confidence_weight: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Weight of the loss that teaches a sub-model its confidence. As the release."""
    attack: Literal["together", "one_by_one"] = "together"
    """What PGD attacks in training: the whole model, or each sub-model alone, which gives as many adversarial images
    per image as there are sub-models. As the release."""
    steps: Count = 10
    """Iterations of PGD in training, in steps of `pgd.step_size` within `pgd.epsilon`, from the image itself. Ten and
    no random start, as the release; its step of 0.01 and epsilon of 0.03 give way to those of all other methods."""


class AdvMoe(Settings):
    """ADVMoE: a ResNet-18 whose residual convolutions own groups of filters, and a router that chooses among them.

    The training's other values are those of `experts`.
    """

    experts: Annotated[int, Field(ge=2, le=100)] = 2
    """Groups of filters; 2 as in the default of the authors' release."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Width of a group relative to `model.width`, rounded to whole channels; 0.5 as in the default of the release."""
    router: Literal["shared", "per-layer"] = "shared"
    """`shared`: one score vector steers all 16 convolutions, as released. `per-layer`: one vector for each, as the
    paper describes (remembered, not checked). Our reading: one network with an output for each layer, not 16
    networks. Our assumption: the release's, because the published numbers are those of the authors' code (inferred)."""
    router_objective: Literal["label-modulo", "trades"] = "label-modulo"
    """What the router is trained for. `label-modulo`: to predict the label modulo the number of experts, on clean and
    attacked images, as released; the paper does not mention it (remembered, not checked). `trades`: the TRADES loss of
    the routed network through the straight-through estimator, the lower level of the paper's bi-level problem
    (remembered, not checked). Our assumption: the release's, because the published numbers are those of the authors'
    code (inferred)."""
    router_learning_rate: Rate = 0.01
    """Peak learning rate of the router. Our assumption: 0.01. With 0.1, the release's, users report scores that become
    NaN; that the rate is the reason is inferred."""
    router_weight_decay: Decay = 5e-4
    """Weight decay of the router; as released."""
    beta: Annotated[float, Field(ge=0, le=1000)] = 6.0
    """Weight of the divergences between attacked and clean outputs; 6 as released."""
    steps: Count = 2
    """Iterations of the attack in training; 2 as released."""
    step_size: Pixels | None = None
    """Of an iteration, pixels in [0, 1]; null: 5/8 of `pgd.epsilon`, which is the release's 5/255 at 8/255."""


class Given(Settings):
    """A network whose weights the user has: a row of the result table that is not trained here."""

    name: Name
    """Of the row, in every table."""
    file: Annotated[str, Field(min_length=1)]
    """Path or URL of the checkpoint: a state dict of torch (`.pt`, `.pth`, `.bin`; itself, or below `net`, `state_dict`
    or `model`) or of safetensors, with our names, kuangliu's, torchvision's or timm's. No code in it is run. The
    signature follows its content, not its path."""
    backbone: Annotated[str, OneOf(lambda: BACKBONES)] = "resnet18"
    """Its network."""
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels of its first convolution."""
    mean: PerChannel | None = None
    """Mean of each channel that it was trained with, pixels in [0, 1]; null: the file's own, or that of the images."""
    std: Spreads | None = None
    """Standard deviation of each channel that it was trained with; null: as `mean`."""
    accuracy: Annotated[float, Field(ge=0, le=100)]
    """Its clean accuracy in percent on all test images. The model is refused before it is attacked if it differs by
    more than 0.5 points: weights may fit in all names and shapes and still be another network's. No part of the
    signature."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Digest of the file; filled in when the file is read."""

    @field_validator("name")
    @classmethod
    def _has_a_folder_of_its_own(cls, name: str) -> str:
        if checkpoints.model_name(name) != name:
            raise ValueError(f"the checkpoints of {checkpoints.model_name(name)} have this name: allowed is another")
        return name

    @model_validator(mode="after")
    def _one_std_for_each_mean(self) -> Given:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std need the same number of channels, or null for both")
        return self


class AdvTraining(Settings):
    """Adversarial training at a fixed strength: `fgsm-at`, `pgd-at`, and the rows that are made of `pgd-at`."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each batch that is attacked, rounded up to whole images; the others stay clean. The paper's is half. 1:
    all images, as most of the field trains, which gives more robust and less accurate networks."""


class Trades(Settings):
    """TRADES (Zhang et al. 2019): cross-entropy of clean images plus beta times KL(clean, adversarial)."""

    beta: Annotated[float, Field(gt=0, le=1000)] = 6.0
    """Weight of the Kullback-Leibler divergence. The authors' value for CIFAR-10; larger is more robust."""
    steps: Count = 10
    """Iterations of the attack in training, of length `pgd.step_size` within `pgd.epsilon`. The authors' value."""


class Free(Settings):
    """Free adversarial training (Shafahi et al. 2019)."""

    replays: Count = 8
    """Steps on each batch. The number of epochs is `experts.epochs` divided by it, rounded up. The authors' value for
    CIFAR-10."""


class NFgsm(Settings):
    """N-FGSM (de Jorge et al. 2022): FGSM from a noisy image, not clipped to epsilon."""

    noise: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Largest noise of a pixel, in units of `pgd.epsilon`. The authors' value for CIFAR-10."""


class DefenceSettings(Protocol):
    """The settings that a defence's recipe may read; an Experiment has them."""

    @property
    def model(self) -> Model: ...
    @property
    def gate(self) -> Gate: ...
    @property
    def fgsm(self) -> Fgsm: ...
    @property
    def pgd(self) -> Pgd: ...
    @property
    def experts(self) -> Experts: ...
    @property
    def joint(self) -> Joint: ...
    @property
    def soe(self) -> Soe: ...
    @property
    def advmoe(self) -> AdvMoe: ...
    @property
    def adversarial_training(self) -> AdvTraining: ...
    @property
    def trades(self) -> Trades: ...
    @property
    def free(self) -> Free: ...
    @property
    def n_fgsm(self) -> NFgsm: ...
