"""The run folder of an unquantized model that is scored: every suite has a folder of its own."""

from __future__ import annotations

import json
from dataclasses import asdict

from qatlab.config import Config, deciding, flat
from qatlab.core.hashing import digest
from qatlab.core.secrets import public
from qatlab.results.identity import NOT_SCORED
from qatlab.results.rowfile import Row
from qatlab.results.run import Run

# Options of a suite that say how it is scored, and not which images and classes it has: they do not change its folder.
_HOW = (*NOT_SCORED, "resamples", "negatives", "probe_sets", "probe_images")


def evaluated_run(config: Config, recipe: str) -> Run:
    """Return the run of an unquantized model on a suite, in ``<output>/<recipe>-<suite id>-<run id>``.

    In an earlier release all suites of a model had one folder, ``<output>/<recipe>-<run id>``. That folder is used
    where it holds rows of the same suite.
    """
    run, earlier = Run(config, f"{recipe}-{_suite_id(config)}"), Run(config, recipe)
    return earlier if not run.folder.exists() and _holds(earlier, config) else run


def _suite_id(config: Config) -> str:
    """Return eight hex digits: a hash of the options that say which images and classes a suite has."""
    suite = {key: value for key, value in public(deciding(config.suite)).items() if key not in _HOW}
    return digest(json.dumps(suite, sort_keys=True))[:8]


def _holds(run: Run, config: Config) -> bool:
    # Rows of one evaluation share the same options object, which is compared only once.
    stored = {id(row["config"]): row["config"] for row in run.rows() if "config" in row}
    return any(_same(options, config) for options in stored.values())


def _same(stored: Row, config: Config) -> bool:
    """Return whether the stored options of a row, by dotted name, describe the same suite as ``config``."""
    # The options go through JSON because the stored ones did: JSON turns a tuple into a list.
    options = json.loads(json.dumps(public({"suite": asdict(config.suite)})))
    now = dict(flat(options))
    # Options with default values are not compared unless they are stored: rows of an earlier release lack options that
    # were added later.
    decided = {name for name, _ in flat({"suite": deciding(config.suite)})}
    names = decided | {name for name in stored if name.startswith("suite.")}
    names -= {f"suite.{name}" for name in _HOW}
    return all(name in now and name in stored and now[name] == stored[name] for name in names)
