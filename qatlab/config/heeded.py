"""The options that each program uses, and options on the command line that have no effect in a run: the user is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qatlab.config.options import EMBEDDED, Config, is_quantized
from qatlab.config.renamed import present

# A sweep sets this variable for its runs, because an option that it gives to all runs may have no effect in some of
# them.
IN_SWEEP = "QATLAB_IN_SWEEP"
PROGRAMS = ("fit", "evaluate", "export", "bench")
# The options that decide how a model is made. They have no effect on a model that already exists.
_MAKING = ("recipe", "quant", "objective", "optim", "fit", "suite.probe_sets", "suite.probe_images")
# The options that a stored run has by itself.
_OF_RUN = ("model", "data", "seed", "output", "force")
_SCORING = (
    "suite",
    "callbacks",
    "trainer",
    "limits",
    "format",
    "table",
    "file",
    "probabilities",
    "exact",
    "threshold",
)
# The options of loggers. Only a fit has curves to log; the other programs add rows to their run.
_WATCHING = ("wandb", "logger")
_UNHEEDED = {
    "fit": ("checkpoint", "suite.check", "probabilities", "exact", "threshold", "bench"),
    "evaluate": (*_MAKING, *_WATCHING, "probabilities", "exact", "threshold", "bench"),
    "export": (*_MAKING, *_OF_RUN, *_WATCHING, "suite.check", "table", "file", "bench"),
    "bench": (*_MAKING, *_OF_RUN, *_WATCHING, *_SCORING),
}
# Loading images takes processes in an evaluation too.
_HEEDED_ALL_THE_SAME = {"evaluate": ("fit.workers",), "export": ("fit.workers",)}
_INSTEAD = {"checkpoint": "weights to start from are model.checkpoint="}


def heeds(program: str, key: str, stored: bool = False) -> bool:
    """Return whether a program uses an option, or for the name of a section at least one option of it.

    ``stored`` says that ``checkpoint=`` names a run, which has its own model, data and seed.
    """
    unheeded = (*_UNHEEDED[program], *(_OF_RUN if stored else ()))
    key = key.replace("/", ".")
    if any(_is_part(part, key) or _is_part(key, part) for part in _HEEDED_ALL_THE_SAME.get(program, ())):
        return True
    return not any(_is_part(key, part) for part in unheeded)


def _is_part(key: str, of: str) -> bool:
    return key == of or key.startswith(f"{of}.")


def key_of(argument: str) -> str:
    """Return the name of the option in an override, as it is written: "quant/act" for "+quant/act@a=b"."""
    return re.split(r"[=@]", argument.lstrip("+~"))[0]


def unheeded(program: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each override that a program does not use in any run."""
    stored = program == "evaluate" and any(argument.startswith("checkpoint=") for argument in overrides)
    for argument in overrides:
        key = key_of(argument)
        if heeds(program, key, stored):
            continue
        if heeds(program, key):
            why = f"the run in checkpoint= has its own {key}"
        else:
            others = [f"`python -m qatlab.{other}`" for other in PROGRAMS if heeds(other, key)]
            why = f"it is for {' and '.join(others)}"
        instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
        yield f"{argument} has no effect in `python -m qatlab.{program}`: {why}{instead}; leave it out."


@dataclass(frozen=True)
class Rule:
    """Options that have no effect in some runs: ``why`` returns the reason, "" where they have one."""

    keys: tuple[str, ...]
    why: Callable[[Config], str]


def _untrained(config: Config) -> str:
    return "" if config.fit.steps else "fit.steps=0 trains nothing"


def _without_probes(config: Config) -> str:
    probes = config.fit.steps and config.fit.eval_every
    return "" if probes else "without fit.steps and fit.eval_every no probe is taken"


def _full_precision(config: Config) -> str:
    return "" if is_quantized(config.quant) else "quant.weight and quant.act are null, and nothing is quantized"


def _uncalibrated(config: Config) -> str:
    temperature = config.callbacks.get("temperature") or {}
    return "" if temperature.get("source") == "proxy" else _full_precision(config)


def _embedded_model(config: Config) -> str:
    tiny = config.model.name == "tiny"
    return "the embedded model (model=tiny) has its own activation and preprocessing" if tiny else ""


def _random_weights(config: Config) -> str:
    return "fit.from_scratch=true starts from random weights" if config.fit.from_scratch else ""


def _is_rendered(config: Config) -> list[bool]:
    return [isinstance(entry.path, str) and entry.path.startswith(EMBEDDED) for entry in config.suite.sets.values()]


def _no_rendered_set(config: Config) -> str:
    return "" if any(_is_rendered(config)) else "it is about rendered sets, of which this suite has none"


def _no_set_on_disk(config: Config) -> str:
    on_disk = not all(_is_rendered(config)) or isinstance(config.suite.class_names, str)
    return "" if on_disk else "all sets of this suite are rendered"


def _unread(block: str, *scores: str) -> Callable[[Config], str]:
    """Return the ``why`` of an option that only these scores read, of those that an evaluation, or "" for any, asks for."""

    def why(config: Config) -> str:
        asked: list[str] = []
        for name in [block] if block else ["ood", "predictions"]:
            given = (config.callbacks.get(name) or {}).get("scores", [])
            asked += [given] if isinstance(given, str) else given
        # A class of the user's own, under its dotted name, may read whatever it likes.
        reading = [name for name in asked if name in ("all", *scores) or "." in name]
        owner = f"callbacks.{block or 'ood'}.scores"
        return "" if reading else f"no score that is asked for ({owner}) reads it, as {' and '.join(scores)} would"

    return why


_STEPS = ("batch_size", "unique_samples", "lr", "schedule", "warmup", "grad_clip", "eval_every", "checkpoint_every")
_BESIDE = ("outliers", "attention", "compensate", "registers")
_TOWERS = ("tower", "rules", "first", "last", "kernels", "matmul", "partial", "rewrite", "adapter", "plan", *_BESIDE)
_RULES = (
    Rule((*(f"fit.{name}" for name in (*_STEPS, "micro_batch", "teacher_bf16", "profile")), "objective"), _untrained),
    # optim.log_scale is left out: quantizers that learn nothing store their scales by it all the same.
    Rule(("optim.scale_lr", "optim.weight_decay", "optim.betas", "quant.matmul"), _untrained),
    Rule(("suite.probe_sets", "suite.probe_images"), _without_probes),
    Rule(tuple(f"quant.{name}" for name in _TOWERS), _full_precision),
    Rule(("quant.calibration_images", "quant.calibration_seed"), _uncalibrated),
    Rule(("model.pretrained", "model.quick_gelu", "model.gelu_tanh", "model.preprocess"), _embedded_model),
    Rule(("model.checkpoint",), _random_weights),
    Rule(("suite.images", "suite.seed"), _no_rendered_set),
    Rule(("suite.root",), _no_set_on_disk),
    Rule(("suite.negatives",), _unread("", "neglabel")),
    Rule(("callbacks.ood.mcm_temperature",), _unread("ood", "mcm", "gl_mcm")),
    Rule(("callbacks.predictions.mcm_temperature",), _unread("predictions", "mcm", "gl_mcm")),
    Rule(("hydra.run", "hydra.output_subdir"), lambda config: "output= says where the folders of runs lie"),
)


def without_effect(config: Config, overrides: Sequence[str]) -> dict[str, str]:
    """Return {override: why it changes nothing} of those overrides that have no effect in a run with these options."""
    found = {}
    for argument in overrides:
        if argument.startswith("~"):  # what is taken out is not there to have an effect
            continue
        key, _, value = argument.partition("=")
        if value.replace(" ", "") == "{}":
            found[argument] = "a mapping is joined to what is there, so that an empty one changes nothing"
        option = present(key_of(key).replace("/", "."))
        for rule in _RULES:
            if any(_is_part(option, part) for part in rule.keys) and (why := rule.why(config)):
                found.setdefault(argument, why)
    return found
