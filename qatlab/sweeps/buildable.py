"""Whether the classes that options name can be built: one process checks all cells, so planning needs no torch."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qatlab.config import Config, require_objective
from qatlab.config.explain import explain
from qatlab.config.trust import blocks_of
from qatlab.core.errors import UserError


def mistakes_of(configs: Sequence[Config], config_dir: Path | None = None) -> list[str]:
    """Return for each of ``configs`` the sentence on why its blocks cannot be built, "" where they can.

    Options with the same blocks are checked once. Where torch is not loaded in this process, another process checks.
    ``config_dir`` is the folder of the user's own choices. Raises CalledProcessError where the other process fails,
    with its traceback on stderr.
    """
    # Cells that differ only in model, suite or training have the
    # same blocks, and building one of these cells is enough.
    kinds = [repr((blocks_of(config), config.quant, config.objective, config.fit.steps > 0)) for config in configs]
    distinct = dict(zip(kinds, configs, strict=True))
    look = _look if "torch" in sys.modules else _have_looked
    found = dict(zip(distinct, look(list(distinct.values()), config_dir), strict=True))
    return [found[kind] for kind in kinds]


def _have_looked(configs: Sequence[Config], config_dir: Path | None) -> list[str]:
    """Return the sentences that ``_look`` returns, from a process that can import the same modules."""
    if not configs:
        return []
    # The other process gets this sys.path, because a class of the user may come from the folder of this process.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "qatlab.sweeps.buildable"]
    done = subprocess.run(
        command, input=pickle.dumps((configs, config_dir)), stdout=subprocess.PIPE, env=environment, check=True
    )
    found: list[str] = pickle.loads(done.stdout)
    return found


def _look(configs: Sequence[Config], config_dir: Path | None) -> list[str]:
    """Return for each of ``configs`` the sentence on why its blocks cannot be built, "" where they can; loads torch."""
    return [_mistake(config, config_dir) for config in configs]


def _mistake(config: Config, config_dir: Path | None) -> str:
    # The imports are local, because both load torch, which the planning process must not need.
    from qatlab.config.blocks import check_blocks
    from qatlab.models.quantized import check_quantizers

    try:
        check_blocks(config)
        check_quantizers(config.quant)
        if config.fit.steps:
            require_objective(config.objective)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return explain(error, config_dir) or str(error)
    return ""


def main() -> None:
    """Read pickled options from stdin and write the pickled list of sentences to stdout."""
    # The answer goes to a copy of stdout, and stdout to stderr,
    # because prints of a user's module would spoil the pickle.
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    found = _look(*pickle.load(sys.stdin.buffer))
    with os.fdopen(answer, "wb") as file:
        pickle.dump(found, file)


if __name__ == "__main__":
    main()
