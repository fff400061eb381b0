"""Every option, with a sentence under each; the recipes are registered with Hydra here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qatlab.cache import atomic
from qatlab.errors import UserError, nearest


@dataclass
class ModelConfig:
    """Which CLIP, and where its weights come from."""

    name: str = "tiny"
    """open_clip architecture (ViT-B-32, ViT-L-14, ...), or 'tiny', the embedded model."""
    pretrained: str | None = None
    """open_clip weight tag (openai, laion400m_e32, ...); it also decides the activation function."""
    checkpoint: str | None = None
    """Local weights instead of a download: .safetensors or weights-only .pt, a full CLIP or its image tower (visual.*) alone."""
    quick_gelu: bool | None = None
    """Activation of a checkpoint whose tag does not tell it: true for QuickGELU, false for GELU."""
    text_features: str | None = None
    """FILE.safetensors:TABLE of class embeddings that stand in for the text tower, with the class names beside it."""


@dataclass
class SetConfig:
    """One labelled or OOD image set of a suite."""

    path: Any = "???"
    """Folder or file below suite.root, or 'embedded:<kind>'; of a list the first that is there is read."""
    role: str = "???"
    """id | shifted | near_ood | far_ood | common | counter (spurious cues) | calibration (fits the temperature, never scored)."""
    reference: str | None = None
    """ID set whose classes and scores this set is measured against; default: the suite's first id set."""
    pick: str = "0::1"
    """Slice of the images in sorted file order, as Python writes it: '0::2' takes every second."""
    exclude: list[str] = field(default_factory=list)
    """Class folders to leave out."""
    classes: str | None = None
    """A class list that comes with qatlab (imagenet_r, dtd_clean, ...), or a file that maps class folders to class names."""
    layout: str = "auto"
    """How it lies on disk: folders | imglist | manifest | webdataset | cifar | npy | tiny_imagenet; auto looks."""
    folder: str | None = None
    """Folder below suite.root that the paths in an imglist or manifest start from; default: the file's own."""
    corruption: dict[str, Any] | None = None
    """Corrupt the images as they are read: {name: fog, severity: 3}, with seed, order, table or textures (docs/CORRUPTIONS.md)."""
    images: int | None = None
    """Published number of images, which suite.check compares with."""
    prompts: str | None = None
    """Template set of an id set's classes by name, or 'own' for those that lie beside it; default: suite.templates."""
    ood_prompts: str | None = None
    """Template set of the OOD scores of an id set; default: its prompts."""


@dataclass
class SuiteConfig:
    """The image sets a model is scored on."""

    root: str | None = None
    """Folder that the sets' paths start from."""
    sets: dict[str, SetConfig] = field(default_factory=dict)
    """The sets by name."""
    class_names: Any = None
    """Class names in label order, as a list or a file (.txt, .json); default: of model.text_features, or the embedded world's."""
    templates: Any = field(default_factory=lambda: ["a photo of a {}"])
    """Prompt templates, averaged per class."""
    images: int = 512
    """Images per embedded set."""
    seed: int = 0
    """Seed of the embedded world's evaluation images."""
    probe_sets: list[str] | None = None
    """Sets scored every fit.eval_every steps; default: all."""
    probe_images: int = 128
    """Images per set in a probe."""
    batch_size: int = 64
    """Images per forward of an evaluation, per device."""
    cache: bool = False
    """Keep decoded images on disk, 147 KiB each at 224 pixels, for the models to come; qatlab.sweep sets it."""
    check: bool = False
    """evaluate only: say which sets are there, which are missing and where they were looked for, and end."""
    resamples: int = 1000
    """Bootstrap resamples behind every interval and paired test; 0: none."""
    negatives: str = "imagenet1k"
    """NegLabel's words: imagenet1k (the authors' list) | embedded | a folder with noun.*.txt and adj.*.txt to mine."""
    skip_missing: bool = False
    """Leave out sets that are not there, and name them, instead of ending."""


@dataclass
class QuantConfig:
    """What is rounded, and how."""

    weight: Any = None
    """Weight quantizer, a _target_ block; choices in quant/weight=."""
    act: Any = None
    """Activation quantizer, a _target_ block; choices in quant/act=."""
    rewrite: Any = None
    """Exact change of the full-precision encoder before it is quantized, a _target_ block; choices in quant/rewrite=."""
    adapter: Any = None
    """Trained term beside every frozen layer, a _target_ block; choices in quant/adapter=."""
    plan: Any = None
    """Chooses the bits of every layer, a _target_ block; choices in quant/plan=."""
    tower: str = "visual"
    """visual | text | both: the text tower is calibrated on the captions and not trained, rewritten or adapted."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Exceptions by layer name pattern, first match wins: null skips a layer, {act: null} or {weight: {bits: 4}} changes it."""
    patch_conv: bool = False
    """Quantize the patch convolution too."""
    final_proj: bool = False
    """Quantize the final projection too."""
    calibration_images: int = 64
    """Images of the caption data that set the activation scales."""
    calibration_seed: int | None = None
    """Draw those images from all shards with this seed; null takes the first ones, in shard order."""
    kernels: str = "auto"
    """How rounding is computed: eager | compiled (by torch.compile, half a minute) | auto (compiled on CUDA and in long runs)."""
    matmul: str = "float"
    """Products while training: float (exact) | int8 (integer forward) | bf16 (codes in bfloat16; 0.3 % off)."""


@dataclass
class ObjectiveConfig:
    """The weighted sum that training minimises; the names are functions in qatlab/objectives.py."""

    contrastive: float = 0.0
    """Weight of the image-caption loss with frozen text features (CLIP's own)."""
    kl: float = 0.0
    """Weight of KL(teacher || student) on image-text logits over the batch's captions or data.text_bank."""
    feature_mse: float = 0.0
    """Weight of the squared distance between the unit features of student and teacher."""
    class_cross_entropy: float = 0.0
    """Weight of the cross-entropy against class prompts (only for data with labels: the embedded world)."""


@dataclass
class OptimConfig:
    """AdamW's options apart from the learning rate of the weights (fit.lr)."""

    scale_lr: float = 1e-3
    """Learning rate of learned quantizer scales."""
    log_scale: bool = True
    """Learn log s (a step changes s by a factor) instead of s itself."""
    weight_decay: float = 0.0
    """Decay of weight matrices; biases, norms and scales have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""


@dataclass
class FitConfig:
    """How long and on what the student is trained."""

    steps: int = 0
    """Optimizer steps; 0 only quantizes."""
    batch_size: int = 100
    """Global batch: images per step over all devices."""
    unique_samples: int | None = None
    """Loop over this many caption samples (light QAT: 100); null streams the shards."""
    lr: float = 1e-6
    """Learning rate of the weights."""
    schedule: str = "constant"
    """constant | cosine."""
    warmup: int = 0
    """Steps of linear warm-up."""
    grad_clip: float | None = None
    """Largest norm of the gradient."""
    from_scratch: bool = False
    """Train both towers from random weights instead of adapting a pretrained image tower."""
    eval_every: int = 50
    """Steps between probes on the small suite; 0: none."""
    checkpoint_every: int = 50
    """Steps between training checkpoints; one lies before each probe too, the last two are kept."""
    workers: int = 2
    """Data-loading processes per device."""
    micro_batch: int | None = None
    """Images per forward and backward on each device; the loss stays that of the whole batch. null: what fits into free memory."""
    teacher_bf16: bool = False
    """Run the unquantized teacher in bfloat16 (autocast)."""
    profile: bool = False
    """Write a profiler trace of a few steps and print where the time of training went."""


@dataclass
class TrainerConfig:
    """Where it runs: passed to lightning.Trainer."""

    accelerator: str = "auto"
    """cpu | gpu | auto (CUDA where there is one, else the CPU)."""
    devices: int = 1
    """Devices per node."""
    num_nodes: int = 1
    """Nodes."""
    precision: str = "32-true"
    """32-true | bf16-mixed | 16-mixed."""
    strategy: str = "auto"
    """Lightning strategy; auto: ddp where there is more than one device."""


@dataclass
class WandbConfig:
    """Curves in Weights & Biases; CSV is always written."""

    mode: str = "auto"
    """auto (online when a key is configured, else offline) | online | offline | disabled."""
    project: str = "qatlab"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""
    group: str | None = None
    """Name that W&B shows runs together under; a sweep's own by default."""


_SCORES = ("msp", "energy", "max_logit", "mcm")


def default_callbacks() -> dict[str, Any]:
    """Return the evaluations of every run; what can be set on the command line is written out."""
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
class BenchConfig:
    """qatlab.bench only."""

    batches: list[int] = field(default_factory=lambda: [1, 8, 32])
    """Numbers of images in a call."""
    threads: int = 1
    """CPU threads."""
    rounds: int = 5
    """Timed calls of each encoder, of which the median counts."""
    device: str = "cpu"
    """cpu: torch and the integer runtimes | cuda: torch and bitsandbytes."""


@dataclass
class Config:
    """The whole of a run."""

    # _self_ first, else the recipe has no effect; recipe last, else its `override` lines fail.
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
            {"recipe": None},
            {"override hydra/job_logging": "none"},
            {"override hydra/hydra_logging": "none"},
        ]
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = None
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    callbacks: dict[str, Any] = field(default_factory=default_callbacks)
    """Evaluations by name, _target_ blocks; callbacks.ood=null removes one."""
    checkpoint: Any = None
    """evaluate, export, bench: a finished run's folder (runs/<recipe>-<id>); evaluate takes its export/<format> too, or a list."""
    format: str | None = None
    """The results as a file too: csv | parquet (every number) | latex | markdown (the table); export: onnx | openvino | torch."""
    probabilities: bool = False
    """export: a second output, the probabilities of the first ID set's classes at the refitted temperature."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    seed: int = 0
    """Seed of everything random."""
    output: str = "runs"
    """Folder that run folders are made in."""
    force: bool = False
    """Move an existing run folder aside and start anew."""
    hydra: Any = field(
        # Hydra writes nothing of its own: the run folder is decided in one place, qatlab.results.
        default_factory=lambda: {
            "output_subdir": None,
            "run": {"dir": "."},
            "sweep": {"dir": "${output}", "subdir": "."},
        }
    )


def recipe_files(folder: str = "", own: Path | None = None) -> dict[str, Path]:
    """Return {name: file} of the YAML choices in recipes/<folder>; "" gives the recipes themselves.

    ``own`` is a --config-dir: its choices come after, and in place of those with the same name.
    """
    paths = sorted((Path(str(files("qatlab.recipes"))) / folder).glob("*.yaml"))
    paths += sorted((own / (folder or "recipe")).glob("*.yaml")) if own else []
    return {path.stem: path for path in paths}


QUANT_SLOTS = ("weight", "act", "rewrite", "adapter", "plan")
GROUPS = ["model", "data", "suite", "trainer", "optim", *(f"quant/{slot}" for slot in QUANT_SLOTS)]


def register() -> None:
    """Make the options and every file under recipes/ known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="qatlab", node=Config)
    for name, path in recipe_files().items():
        store.store(group="recipe", name=name, node=OmegaConf.load(path), package="_global_")
    for group in GROUPS:
        for name, path in recipe_files(group).items():
            store.store(group=group, name=name, node=OmegaConf.load(path))


def as_config(composed: DictConfig) -> Config:
    """Return the composed options as typed dataclasses, interpolations resolved."""
    composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    assert isinstance(config, Config)
    _refuse_unknown(config)
    _refuse_too_small(composed)
    return config


_SMALLEST = {
    "fit.steps": 0,
    "fit.batch_size": 1,
    "fit.eval_every": 0,
    "fit.checkpoint_every": 1,
    "fit.workers": 0,
    "fit.micro_batch": 1,
    "fit.warmup": 0,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "seed": 0,
    "quant.calibration_seed": 0,
    "suite.images": 1,
    "suite.resamples": 0,
    "suite.probe_images": 1,
    "suite.batch_size": 1,
}


_NOT_NEGATIVE = ("fit.lr", "fit.grad_clip", "optim.scale_lr", "optim.weight_decay")


def _refuse_too_small(composed: DictConfig) -> None:
    """Raise UserError for a number below the least that has a meaning, and for moment decay rates outside [0, 1)."""
    for key in _NOT_NEGATIVE:
        if (rate := OmegaConf.select(composed, key)) is not None and not 0 <= rate < math.inf:
            raise UserError(f"{key}={rate}: it takes a number from 0 on.")
    for beta in OmegaConf.select(composed, "optim.betas") or ():
        if not 0 <= beta < 1:
            raise UserError(f"optim.betas holds {beta}: AdamW takes two rates from 0 to below 1, such as [0.9,0.999].")
    for key, least in _SMALLEST.items():
        if (value := OmegaConf.select(composed, key)) is not None and value < least:
            raise UserError(f"{key}={value}: it takes a whole number from {least} on.")


def _refuse_unknown(options: Any, prefix: str = "") -> None:
    """Raise UserError for an option added with '+' that nothing reads."""
    known = [f"{prefix}{entry.name}" for entry in fields(options)]
    for name, value in vars(options).items():
        if (key := f"{prefix}{name}") not in known:
            raise UserError(f"{key} is not an option{nearest(key, known)}; --help lists them.")
        for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
            if is_dataclass(entry):
                _refuse_unknown(entry, f"{prefix}{name}.{key}{'.' if key else ''}")


def compose(*overrides: str) -> Config:
    """Return the options that ``python -m qatlab.fit <overrides>`` would run with (for tests and notebooks)."""
    with initialize(config_path=None, version_base="1.3"):
        return as_config(hydra_compose("qatlab", overrides=list(overrides)))


def save(config: Config, recipe: str, path: Path) -> None:
    """Write the options and the recipe's name as YAML, atomically."""
    options = {
        key: value for key, value in asdict(config).items() if key not in ("defaults", "hydra", "force", "checkpoint")
    }
    with atomic(path) as temporary:
        OmegaConf.save(OmegaConf.create({"recipe": recipe, **options}), temporary)


def load(path: Path) -> tuple[Config, str]:
    """Return the options and recipe name that ``save`` wrote; raises UserError when the file is not there."""
    if not path.exists():
        raise UserError(
            f"{path} is not there: checkpoint= wants the folder of a run, as `python -m qatlab.fit` prints it."
        )
    stored = OmegaConf.load(path)
    assert isinstance(stored, DictConfig)
    recipe = str(stored.pop("recipe"))
    return as_config(OmegaConf.merge(OmegaConf.structured(Config), stored)), recipe  # type: ignore[arg-type]


register()
