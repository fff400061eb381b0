"""Every option, with a sentence under each."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Annotated, Any

from qatlab.core.domains import (
    AtLeast,
    Between,
    Block,
    Count,
    Dotted,
    Kind,
    OneOf,
    Place,
    Seed,
    Some,
    Takes,
    hints_of,
    require,
)
from qatlab.core.errors import UserError
from qatlab.core.limits import Limits

EMBEDDED = "embedded:"
"""What the path of an image set begins with that is rendered on the spot."""


# Choices that other packages make something of: each has a test that it knows them all.
FORMATS = ("csv", "parquet", "latex", "markdown")
EXPORTS = ("onnx", "openvino", "torch")
KERNELS = ("auto", "eager", "compiled")
LAYOUTS = ("auto", "folders", "imglist", "manifest", "webdataset", "cifar", "npy", "tiny_imagenet")
LOGGERS = ("csv", "wandb", "tensorboard")
MATMULS = ("float", "int8", "bf16")
NUMBERS = ("auto", "own", "larger")
# Lightning's own names; an alias such as bf16 is the same precision under another run id.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
ROLES = ("id", "shifted", "near_ood", "far_ood", "common", "counter", "calibration")
SCHEDULES = ("constant", "cosine")
THRESHOLD_SCORES = ("msp", "energy", "max_logit", "mcm", "entropy")
TOWERS = ("visual", "text", "both")
ZERO_SHOT = ("softmax", "sigmoid")
WANDB_MODES = ("auto", "online", "offline", "disabled")

Names = Annotated[Any, Takes(Place | Annotated[list[Any], Some()] | dict[Any, Any] | None)]
Rate = Annotated[float, Between(0, 1)]
Weight = Annotated[float, AtLeast(0)]
Steps = Annotated[int, AtLeast(0)]
Moment = Annotated[float, Between(0, 1, below=True)]
Corruption = Annotated[dict[str, Any], Some()]
Slot = Annotated[Any, Takes(Block | None)]
_Logger = Annotated[str, OneOf(*LOGGERS)] | Block
# Python's slices: whole numbers around one or two colons, the last of them not 0.
Slice = Annotated[str, Kind("a slice such as 0::2", r" *(-?\d+)? *: *(-?\d+)? *(: *(-?(?!0+ *$)\d+)? *)?")]


def later(default: Any) -> Any:
    """Return a field for an option that came after runs were made without it: at its default it changes no id."""
    if isinstance(default, (dict, list)):  # a dataclass takes no default that its objects would share
        return field(default_factory=lambda: copy(default), metadata={"later": True})
    return field(default=default, metadata={"later": True})


def earlier(name: str, default: Any) -> Any:
    """Return a field for an option that runs know under another name, which ids go on hashing."""
    return field(default=default, metadata={"earlier": name})


def deciding(options: Any) -> dict[str, Any]:
    """Return the options of a dataclass as plain values, as ids hash them: without those of ``later`` at their defaults."""
    return dict(_deciding(options)) if is_dataclass(options) else options


def _deciding(options: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, plain value) of the options that an id hashes."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        # A run that was made before this option existed would get another id, and be made again, for the same numbers.
        if entry.metadata.get("later") and value == _default(entry):
            continue
        name = entry.metadata.get("earlier", entry.name)
        if isinstance(value, dict):
            yield name, {key: deciding(part) for key, part in value.items()}
        else:
            yield name, deciding(value)


def _default(entry: Field[Any]) -> Any:
    """Return the default of an option, made anew where it is a mapping or a list."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def flat(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested options: ("a.b", 1) for {"a": {"b": 1}}."""
    # An empty mapping is a value of its own: it would vanish if only its entries were given.
    if isinstance(options, dict) and options:
        for key, value in options.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, options


@dataclass
class ModelConfig:
    """Which CLIP, and where its weights come from."""

    name: str = "tiny"
    """open_clip architecture (ViT-B-32, ViT-L-14, ...), or 'tiny', the embedded model."""
    pretrained: str | None = None
    """open_clip weight tag (openai, laion400m_e32, ...); it also decides the activation function."""
    checkpoint: Place | None = None
    """Local weights instead of a download: .safetensors or weights-only .pt, a full CLIP or its image tower (visual.*) alone."""
    quick_gelu: bool | None = None
    """Activation of a checkpoint whose tag does not tell it: true for QuickGELU, false for GELU."""
    text_features: Annotated[str, Kind("FILE.safetensors:TABLE")] | None = None
    """FILE.safetensors:TABLE of class embeddings that stand in for the text tower, with the class names beside it."""
    gelu_tanh: bool = later(False)
    """GELU by its tanh approximation, as SigLIP was trained: open_clip has exact GELU there, and features that differ by 1e-3."""
    preprocess: Annotated[Any, Takes(str | dict[str, Any] | None)] = later(None)
    """Preprocessing of a checkpoint that no tag tells: a tag of open_clip, or {mean, std, interpolation, resize_mode}."""


@dataclass
class SetConfig:
    """One labelled or OOD image set of a suite."""

    path: Annotated[Any, Takes(Place | Annotated[list[Place], Some()])] = "???"
    """Folder or file below suite.root, or 'embedded:<kind>'; of a list the first that is there is read."""
    role: Annotated[str, OneOf(*ROLES)] = "???"
    """What the set is for; common and counter are the sides of a spurious cue, calibration fits the temperature, never scored."""
    reference: str | None = None
    """ID set whose classes and scores this set is measured against; default: the suite's first id set."""
    pick: Slice = "0::1"
    """Slice of the images in sorted file order, as Python writes it: '0::2' takes every second."""
    exclude: list[str] = field(default_factory=list)
    """Class folders to leave out."""
    classes: str | None = None
    """A class list that comes with qatlab (imagenet_r, dtd_clean, ...), or a file that maps class folders to class names."""
    class_names: Names = later(None)
    """Names of the set's own classes, a list or a file (.txt, .json), of its class list, the suite's or others; folders | all."""
    numbers: Annotated[str, OneOf(*NUMBERS)] = later("auto")
    """What labels that are numbers count in: the set's own class list, the larger one it is a part of; auto, where certain."""
    layout: Annotated[str, OneOf(*LAYOUTS)] | Dotted = "auto"
    """How it lies on disk; auto looks."""
    folder: Place | None = None
    """Folder below suite.root that the paths in an imglist or manifest start from; default: the file's own."""
    corruption: Annotated[Any, Takes(Corruption | None)] = None
    """Corrupt the images as they are read: {name: fog, severity: 3}, with seed, order, table or textures (docs/CORRUPTIONS.md)."""
    images: Count | None = None
    """Published number of images, which suite.check compares with."""
    prompts: str | None = None
    """Template set of an id set's classes by name, or 'own' for those that lie beside it; default: suite.templates."""
    ood_prompts: str | None = None
    """Template set of the OOD scores of an id set; default: its prompts."""
    outside: bool = later(False)
    """The paths in an imglist or manifest may lead out of its folder (absolute, or by ../)."""


@dataclass
class SuiteConfig:
    """The image sets a model is scored on."""

    root: Place | None = None
    """Folder that the sets' paths start from."""
    sets: dict[str, Any] = field(default_factory=dict)
    """The sets by name, each a SetConfig: "+suite.sets.products={path: products, role: id}" adds one."""
    class_names: Names = None
    """Class names in label order, as a list or a file (.txt, .json); default: of model.text_features, else of the folders."""
    templates: Annotated[Any, Takes(str | Annotated[list[str], Some()])] = field(
        default_factory=lambda: ["a photo of a {}"]
    )
    """Prompt templates, averaged per class."""
    images: Count = 512
    """Images per embedded set."""
    seed: Seed = 0
    """Seed of the embedded world's evaluation images."""
    probe_sets: Annotated[list[str], Some()] | None = None
    """Sets scored every fit.eval_every steps; default: all."""
    probe_images: Count = 128
    """Images per set in a probe."""
    batch_size: Count = 64
    """Images per forward of an evaluation, per device."""
    cache: bool = False
    """Keep decoded images on disk, 147 KiB each at 224 pixels, for the models to come; qatlab.sweep sets it."""
    check: bool = False
    """evaluate only: say which sets are there, which are missing and where they were looked for, and end."""
    resamples: Annotated[int, AtLeast(0)] = 1000
    """Bootstrap resamples behind every interval and paired test; 0: none."""
    negatives: str = "imagenet1k"
    """NegLabel's words: imagenet1k (the authors' list) | embedded | a folder with noun.*.txt and adj.*.txt to mine."""
    zeroshot: Annotated[str, OneOf(*ZERO_SHOT)] = later("softmax")
    """Probabilities of the classes: softmax over them, or sigmoid, each class by itself with the model's logit bias (SigLIP)."""
    skip_missing: bool = False
    """Leave out sets that are not there, and name them, instead of ending."""


# What the entries of a mapping are, by its dotted name. The annotation is dict[str, Any], since Hydra adds no mapping to a
# dict[str, SetConfig].
ENTRIES = {"suite.sets": SetConfig}


@dataclass
class QuantConfig:
    """What is rounded, and how."""

    weight: Slot = None
    """Weight quantizer, a _target_ block; choices in quant/weight=."""
    act: Slot = None
    """Activation quantizer, a _target_ block; choices in quant/act=."""
    rewrite: Slot = None
    """Exact change of the full-precision encoder before it is quantized, a _target_ block; choices in quant/rewrite=."""
    adapter: Slot = None
    """Trained term beside every frozen layer, a _target_ block; choices in quant/adapter=."""
    plan: Slot = None
    """Chooses the bits of every layer, a _target_ block; choices in quant/plan=."""
    tower: Annotated[str, OneOf(*TOWERS)] = "visual"
    """What is quantized; the text tower is calibrated, rewritten and planned on the captions, and not trained or adapted."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Exceptions by layer name pattern, first match wins: null skips a layer, {act: null} or {weight: {bits: 4}} changes it."""
    first: bool = earlier("patch_conv", False)
    """Quantize the layers that read the image too: a ViT's patch convolution, the first one of a convolutional tower."""
    last: bool = earlier("final_proj", False)
    """Quantize the layers that give the features too: a ViT's proj, the head of a timm tower."""
    calibration_images: Count = 64
    """Images of the caption data that set the activation scales."""
    calibration_seed: Seed | None = None
    """Draw those images from all shards with this seed; null takes the first ones, in shard order."""
    kernels: Annotated[str, OneOf(*KERNELS)] = "auto"
    """How rounding is computed: compiled takes torch.compile half a minute; auto compiles on CUDA and in long runs."""
    matmul: Annotated[str, OneOf(*MATMULS)] = "float"
    """Products while training: float (exact) | int8 (integer forward) | bf16 (codes in bfloat16; 0.3 % off)."""
    partial: bool = later(False)
    """Quantize a model most of whose products qatlab leaves in full precision, as those of convolutional towers."""
    outliers: Slot = later(None)
    """Keeps some input channels of linear layers in full precision, a _target_ block; quant/rewrite=outlier_channels."""
    attention: Slot = later(None)
    """Quantizers of both products in attention, a _target_ block; choices in quant/attention=."""
    compensate: Slot = later(None)
    """Corrects weights and biases for what rounding does, a _target_ block; choices in quant/compensate=."""
    registers: Slot = later(None)
    """Takes outlier tokens out of the image tower, about and not exactly, a _target_ block; quant/rewrite=registers."""


@dataclass
class ObjectiveConfig:
    """The weighted sum that training minimises; the names are functions in qatlab/training/objectives.py."""

    contrastive: Weight = 0.0
    """Weight of the image-caption loss with frozen text features (CLIP's own)."""
    kl: Weight = 0.0
    """Weight of KL(teacher || student) on image-text logits over the batch's captions or data.text_bank."""
    feature_mse: Weight = 0.0
    """Weight of the squared distance between the unit features of student and teacher."""
    class_cross_entropy: Weight = 0.0
    """Weight of the cross-entropy against class prompts (only for data with labels: the embedded world)."""
    sigmoid: Weight = later(0.0)
    """Weight of SigLIP's image-caption loss, each pair by itself; for models with a logit bias, as SigLIP's are."""
    extra: dict[str, Any] = later({})
    """Objectives of your own by name, {_target_: my.losses.mine, weight: 1.0, ...} (docs/EXTENDING.md)."""


def require_objective(objective: ObjectiveConfig) -> None:
    """Raise UserError where no objective has a weight, so that there is nothing to train by."""
    named = [entry.name for entry in fields(objective) if entry.name != "extra"]
    own = [block for block in objective.extra.values() if block and block.get("weight")]
    if not own and not any(getattr(objective, name) for name in named):
        raise UserError(
            f"no objective: give one of {', '.join(f'objective.{name}' for name in named)} a weight, or leave fit.steps out "
            "where nothing is to be trained."
        )


@dataclass
class OptimConfig:
    """AdamW's options apart from the learning rate of the weights (fit.lr)."""

    scale_lr: Rate = 1e-3
    """Learning rate of learned quantizer scales."""
    log_scale: bool = True
    """Learn log s (a step changes s by a factor) instead of s itself."""
    weight_decay: Rate = 0.0
    """Decay of weight matrices; biases, norms and scales have none."""
    betas: tuple[Moment, Moment] = (0.9, 0.999)
    """AdamW's moment decay rates."""


@dataclass
class FitConfig:
    """How long and on what the student is trained."""

    steps: Steps = 0
    """Optimizer steps; 0 only quantizes."""
    batch_size: Count = 100
    """Global batch: images per step over all devices."""
    unique_samples: Count | None = None
    """Loop over this many caption samples (light QAT: 100); null streams the shards."""
    lr: Rate = 1e-6
    """Learning rate of the weights."""
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "constant"
    """How the learning rate goes after the warm-up; cosine ends at 0."""
    warmup: Steps = 0
    """Steps of linear warm-up."""
    grad_clip: Annotated[float, AtLeast(0)] | None = None
    """Largest norm of the gradient; 0 and null: any."""
    from_scratch: bool = False
    """Train both towers from random weights instead of adapting a pretrained image tower."""
    eval_every: Steps = 50
    """Steps between probes on the small suite; 0: none."""
    checkpoint_every: Count = 50
    """Steps between training checkpoints; one lies before each probe too, the last two are kept."""
    workers: Annotated[int, AtLeast(0)] = 2
    """Data-loading processes per device."""
    micro_batch: Count | None = None
    """Images per forward and backward on each device; the loss stays that of the whole batch. null: what fits into free memory."""
    teacher_bf16: bool = False
    """Run the unquantized teacher in bfloat16 (autocast)."""
    profile: bool = False
    """Write a profiler trace of a few steps and print where the time of training went."""


@dataclass
class TrainerConfig:
    """Where it runs: passed to lightning.Trainer."""

    accelerator: Annotated[str, OneOf("auto", "cpu", "gpu", "cuda")] = "auto"
    """auto: CUDA where there is one, else the CPU."""
    devices: Count = 1
    """Devices per node."""
    num_nodes: Count = 1
    """Nodes."""
    precision: Annotated[str, OneOf(*PRECISIONS)] = "32-true"
    """Of the arithmetic; 16-mixed on CUDA only."""
    strategy: str = "auto"
    """Lightning strategy; auto: ddp where there is more than one device."""


@dataclass
class WandbConfig:
    """Weights & Biases, where logger= has it; CSV is always written."""

    mode: Annotated[str, OneOf(*WANDB_MODES)] = "auto"
    """auto: online when a key is configured, else offline."""
    project: str = "qatlab"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""
    group: str | None = None
    """Name that W&B shows runs together under; a sweep's own by default."""
    name: str | None = later(None)
    """Name of the run at W&B; default: <recipe>-<run id>."""
    notes: str | None = later(None)
    """A text that W&B shows beside the run."""
    tags: list[str] = later([])
    """Tags beside those that a run has by itself: model, weights, bits and seed."""


# OOD scores that need nothing but the class cosines: no negative words, no patches.
_SCORES = ("msp", "energy", "max_logit", "mcm")


def default_callbacks() -> dict[str, Any]:
    """Return {name: _target_ block} of the evaluations of every run."""
    # Defaults of the classes that stand here too can be set on the command line without a plus, and are in --help.
    return {
        "calibration": {"_target_": "qatlab.callbacks.Calibration"},
        "ood": {"_target_": "qatlab.callbacks.OOD", "scores": list(_SCORES), "mcm_temperature": 1.0},
        "spurious": {"_target_": "qatlab.callbacks.Spurious"},
        "refits": {
            "_target_": "qatlab.callbacks.Refits",
            "kinds": ["temperature", "isotonic"],
            "images": 5000,
        },
        "predictions": {"_target_": "qatlab.callbacks.Predictions", "scores": list(_SCORES), "mcm_temperature": 1.0},
        "temperature": {"_target_": "qatlab.callbacks.Temperature", "source": "calibration"},
    }


@dataclass
class LimitsConfig:
    """How much a file may ask for; what is above is refused, or counted as unreadable, before memory is taken for it."""

    pixels: Count = later(Limits.pixels)
    """Pixels of an image, by its header and after resizing: Pillow's own limit."""
    member_bytes: Count = later(Limits.member_bytes)
    """Bytes of an image file, or of a part of a sample in a tar."""
    names: Count = later(Limits.names)
    """Names that a pattern with braces may stand for."""


@dataclass
class ThresholdConfig:
    """qatlab.export only: the value that an image has to reach to count as in-distribution."""

    score: Annotated[str, OneOf(*THRESHOLD_SCORES)] = later("mcm")
    """What the value is: a score of the cosines to the classes."""
    tpr: Annotated[float, Between(0, 1, above=True, below=True)] = later(0.95)
    """Share of the images of threshold.set that reach it."""
    set: str | None = later(None)
    """export: ID set whose classes and images decide it; default: the suite's first."""


@dataclass
class BenchConfig:
    """qatlab.bench only."""

    batches: Annotated[list[Count], Some()] = field(default_factory=lambda: [1, 8, 32])
    """Numbers of images in a call."""
    threads: Count = 1
    """CPU threads."""
    rounds: Count = 5
    """Timed calls of each encoder, of which the median counts."""
    device: Annotated[str, OneOf("cpu", "cuda")] = "cpu"
    """cpu: torch and the integer runtimes; cuda: torch and bitsandbytes."""


@dataclass
class Config:
    """The whole of a run."""

    # _self_ comes first, because the values below would replace those of the recipe otherwise. The recipe comes last, because
    # its `override` lines may only name groups that stand before it.
    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"model": "tiny"},
            {"data": "embedded"},
            {"suite": "embedded"},
            {"trainer": "default"},
            {"optim": "default"},
            {"quant/weight": "minmax"},
            {"quant/act": "minmax"},
            {"quant/rewrite": None},
            {"quant/adapter": None},
            {"quant/plan": None},
            {"quant/attention": None},
            {"quant/compensate": None},
            {"recipe": None},
            # Hydra's default logging writes a log file into the working folder at every call.
            {"override hydra/job_logging": "none"},
            {"override hydra/hydra_logging": "none"},
        ]
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Annotated[Any, Takes(Block)] = None
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    logger: Annotated[Any, Takes(_Logger | Annotated[list[_Logger], Some()])] = later("wandb")
    """Where curves and results go beside metrics.csv: W&B by wandb.mode, csv nowhere else; a list may hold your own blocks."""
    callbacks: dict[str, Any] = field(default_factory=default_callbacks)
    """Evaluations by name, _target_ blocks; callbacks.ood=null removes one."""
    checkpoint: Annotated[Any, Takes(Place | Annotated[list[Place], Some()] | None)] = None
    """A finished run's folder (runs/<recipe>-<id>); evaluate takes its export/<format> too, or a list."""
    format: Annotated[str, OneOf(*FORMATS, *EXPORTS)] | None = None
    """The results as a file too: csv and parquet hold every number, latex and markdown the table; export: onnx, openvino, torch."""
    table: Annotated[str, OneOf("brief", "full")] = later("brief")
    """The printed table: brief has the first ID set and means over the others, full every set and score."""
    file: Place | None = later(None)
    """Where format= writes the results; default: table.<suffix> in the run's folder, of several runs in that of the first."""
    probabilities: bool = False
    """export: a second output, the probabilities of the first ID set's classes at the refitted temperature."""
    exact: bool = later(False)
    """export: weights that every CPU multiplies exactly, also one without VNNI; onnx: uint8, half as fast where there is VNNI."""
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    seed: Seed = 0
    """Seed of everything random."""
    output: Place = "runs"
    """Folder that run folders are made in."""
    force: bool = False
    """Move an existing run folder aside and start anew."""
    trust: bool = later(False)
    """Let stored files name classes and commands that are not qatlab's, and an export hold code; on the command line only."""
    hydra: Any = field(
        # Hydra writes nothing of its own: the run folder is decided in one place, qatlab.results.
        default_factory=lambda: {
            "output_subdir": None,
            "run": {"dir": "."},
            "sweep": {"dir": "${expanded:${output}}", "subdir": "."},
        }
    )


def chosen_loggers(logger: Any) -> dict[str, Any]:
    """Return {dotted key: choice} of the option ``logger``, names of ``LOGGERS`` and blocks; UserError for one named twice."""
    several = isinstance(logger, (list, tuple))
    choices = {f"logger.{i}": choice for i, choice in enumerate(logger)} if several else {"logger": logger}
    for choice in choices.values():
        if list(choices.values()).count(choice) > 1:
            raise UserError(f"logger names {choice} twice: each once is enough.")
    return choices


QUANT_SLOTS = ("weight", "act", "rewrite", "adapter", "plan", "attention", "compensate")
# Blocks of quant with a group of choices each, and all that there are: the last two are choices of the group of rewrites.
QUANT_BLOCKS = (*QUANT_SLOTS, "outliers", "registers")


def is_quantized(config: QuantConfig, tower: str = "both") -> bool:
    """Return whether anything of ``tower`` (visual, text, or both for either) is rounded; UserError for an unknown quant.tower."""
    require({"quant.tower": config.tower}, {"quant.tower": hints_of(QuantConfig)["tower"]})
    # A rewrite or an adapter alone rounds nothing: the encoder stays in full precision. The products of attention are
    # rounded only beside layers, by which a run is judged.
    return (config.weight is not None or config.act is not None) and (
        "both" in (tower, config.tower) or tower == config.tower
    )
