"""The identity of a run: the options that decide the trained model, and their hash, the run id."""

from __future__ import annotations

import json
from pathlib import Path

from qatlab.config import Config, deciding, flat, is_quantized, load
from qatlab.config.named_files import Contents, of_evaluation, of_model
from qatlab.config.trust import TARGET
from qatlab.core.hashing import digest
from qatlab.core.secrets import public
from qatlab.models.architecture import has_convolutions, has_linear_head
from qatlab.models.preprocessing import told_by_files
from qatlab.models.tokenizer_files import told_by_tokenizer
from qatlab.results.rowfile import Row
from qatlab.results.rows import read_rows

# The options that decide the trained model. Devices, loggers and suites are left out, because the same run may go on
# with other devices, and new evaluations are added to it.
_IDENTITY = ["model", "data", "quant", "objective", "optim", "fit", "seed"]
_NOT_IDENTITY = {
    "fit": ["eval_every", "checkpoint_every", "workers", "micro_batch", "profile"],
    "quant": ["kernels", "partial"],
    "data": ["cache"],
}
# Options of blocks that came after runs were made without them: at these values they change no id.
_LATER = {"qatlab.quant.Rotation": {"seeds": 1}}
NOT_SCORED = ("batch_size", "cache", "check")
"""Options of a suite that do not change the numbers: they say how or whether images are read and scored."""


def run_id(config: Config) -> str:
    """Return eight hex digits: a hash of ``identity``, equal on every rank."""
    return _id_of(identity(config))


def _id_of(identity: Row) -> str:
    return digest(json.dumps(identity, sort_keys=True))[:8]


def stored_id(folder: Path) -> str:
    """Return the id of the run in ``folder``: from its config.yaml, else from its rows, else from the folder's name.

    The id is never computed again, because a later release may compute another id from the same options. Raises
    UserError when the folder holds no run.
    """
    if (known := load(folder / "config.yaml")[2]) is not None:
        return known
    rows = read_rows(folder / "results.jsonl")
    return str(rows[0]["run_id"]) if rows else folder.resolve().name.rpartition("-")[2]


def evaluation_id(config: Config) -> str:
    """Return eight hex digits: a hash of the options and files of the suite and of the callbacks."""
    suite = {key: value for key, value in deciding(config.suite).items() if key not in NOT_SCORED}
    asked: Row = {"suite": suite, "callbacks": config.callbacks}
    if contents := of_evaluation(config):
        asked["contents"] = contents
    return digest(json.dumps(asked, sort_keys=True))[:8]


def identity(config: Config, contents: Contents | None = None) -> Row:
    """Return {dotted option: value} of everything in ``config`` that decides the trained model, without signatures of URLs.

    Files are identified by hashes of their content, ``contents``, which by default are computed from the files now.
    """
    options = public(deciding(config))
    found = {name: options[name] for name in _IDENTITY} | {"precision": config.trainer.precision}
    if options["limits"]:  # only limits that are not the default; they decide which samples count as unreadable
        found["limits"] = options["limits"]
    if config.quant.rules:  # a list keeps the order, which matters because the first rule that matches wins
        found["quant"]["rules"] = list(config.quant.rules.items())
    for group, names in _NOT_IDENTITY.items():
        found[group] = {key: value for key, value in found[group].items() if key not in names}
    for slot, block in found["quant"].items():
        if isinstance(block, dict) and block.get(TARGET) in _LATER:
            later = _LATER[block[TARGET]]
            found["quant"][slot] = {key: value for key, value in block.items() if later.get(key) != value}
    if not config.fit.from_scratch:
        told = {**told_by_files(config.model), **told_by_tokenizer(config.model)}
        found |= {f"model.{name} by its file": value for name, value in told.items()}
    if is_quantized(config.quant, "visual") and not config.quant.last and has_linear_head(config.model.name):
        found["final projection"] = "full precision"  # earlier releases rounded it all the same
    if is_quantized(config.quant, "visual") and has_convolutions(config.model.name):
        found["convolutions"] = "rounded"  # earlier releases left them in full precision
    quant = config.quant
    if is_quantized(quant, "text") and (quant.rewrite or quant.plan or quant.last):
        found["text tower"] = "like the image tower"  # in earlier releases these options were not meant for it
    contents = of_model(config) if contents is None else contents
    return dict(flat({**found, **{f"content of {file}": sha256 for file, sha256 in contents.items()}}))
