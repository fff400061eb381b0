"""The files that options name, identified by their content, because a file may change under the same path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qatlab.config import QUANT_BLOCKS, Config, SuiteConfig
from qatlab.config.weight_files import files_of_model
from qatlab.core.contents import file_hashes, file_stamp
from qatlab.core.files import expanded, user_path

# All files that options name share one table of qatlab.core.contents: a start asks for some of them several times, and weights
# have gigabytes. The table of the folder that a file lies in would not do: it may be that of a million images.
_TABLE = Path("files that options name")
Contents = dict[str, str]  # the sha256 of each file, by its path as it is written in the options, without a :TABLE


def of_model(config: Config) -> Contents:
    """Return the contents of the files that decide a trained model: weights, class embeddings, and those of the blocks.

    Shards are left out: they are as large as the training data, and the checkpoints of a run know which were read.
    """
    data = config.data if isinstance(config.data, Mapping) else {}
    quant = [getattr(config.quant, slot) for slot in (*QUANT_BLOCKS, "rules")]
    named = [*files_of_model(config.model), config.model.text_features]
    unsharded = {key: value for key, value in data.items() if key != "shards"}
    return of_files_in([*named, unsharded, *quant, config.objective.extra])


def of_evaluation(config: Config) -> Contents:
    """Return the contents of the files that decide what a model is scored on, images apart.

    These are the files of class names, the word lists of the negatives, and the files that callbacks name.
    """
    return {**_of_suite(config.suite), **of_files_in(config.callbacks)}


def earlier(config: Config) -> Contents:
    """Return the part of ``of_model`` that earlier releases hashed for ids: the model's own two files, if written without ~.

    With it the run of an earlier release is found under its id.
    """
    named = (config.model.checkpoint, (config.model.text_features or "").partition(":")[0])
    known = of_model(config)
    return {file: known[file] for file in named if file in known and Path(file).is_file()}


def _of_suite(suite: SuiteConfig) -> Contents:
    """Return the contents of the files of class names and, where ``suite.negatives`` is a folder, of its word lists."""
    root = user_path(suite.root or ".")
    lists = [suite.class_names]
    for entry in suite.sets.values():
        lists += [entry.classes, entry.class_names]
    files = [root / path for path in lists if isinstance(path, str)]
    # Otherwise suite.negatives is the name of a packaged list, which changes with qatlab's version alone.
    if (words := user_path(suite.negatives)).is_dir():
        files += sorted([*words.glob("adj.*.txt"), *words.glob("noun.*.txt")])
    return of_files_in([str(file) for file in files])


def of_files_in(options: Any) -> Contents:
    """Return the contents of the regular files that texts anywhere in ``options`` name, ~ and a :TABLE understood.

    Nobody declares which options are paths: a class of the user may name files under any key.
    """
    found: dict[str, str] = {}
    for text in _texts(options):
        # "FILE:TABLE" names FILE, unless a file of that whole name exists.
        for written in (text, text.rpartition(":")[0]):
            file = expanded(written)
            if os.path.isfile(file):  # not pathlib, which raises for texts that can be no path, such as very long ones
                found[written] = os.path.abspath(file)
                break
    if not found:
        return {}
    paths = list(found.values())
    hashes = file_hashes(_TABLE, paths, [file_stamp(path) for path in paths])
    return {written: row.tobytes().hex() for written, row in zip(found, hashes, strict=True)}


def _texts(options: Any) -> Iterator[str]:
    """Yield every text in nested lists and mappings, except the class names under _target_."""
    if isinstance(options, str):
        yield options
    elif isinstance(options, Mapping):
        for key, value in options.items():
            if key != "_target_":
                yield from _texts(value)
    elif isinstance(options, (list, tuple)):
        for value in options:
            yield from _texts(value)
