"""Time a run's encoder in full precision, simulated, and as the integer models that it was exported to, on this machine.

python -m qatlab.bench checkpoint=runs/<id>
python -m qatlab.bench checkpoint=runs/<id> bench.threads=4 bench.batches=[1,8]
python -m qatlab.bench checkpoint=runs/<id> bench.device=cuda        # beside bitsandbytes, where it is installed
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from qatlab import cli
from qatlab.config import BenchConfig, Config
from qatlab.errors import UserError


def bench(config: Config, recipe: str) -> Path:
    """Return the table of times, ``bench.csv`` in the folder of the run in ``checkpoint=``."""
    import polars as pl

    from qatlab import clip
    from qatlab.deploy.runtimes import FORMATS
    from qatlab.deploy.speed import TITLES, draw, measure, show, written
    from qatlab.finished import one_run
    from qatlab.quantized import load_quantized

    with ExitStack() as stack:
        asked = one_run(config, recipe, "a bench")
        run = stack.enter_context(asked.run)
        _check(config.bench)
        loaded = clip.load(asked.config.model)
        exports, size = run.folder / "export", loaded.preprocess.size
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sources = written(loaded.visual, load_quantized(run.folder), exports, size, folder, config.bench.device)
        rows: list[dict[str, object]] = []
        for kind, source in sources.items():
            print(f"  timing {TITLES[kind]}", flush=True)
            rows += measure(kind, source, sources["fp32"], size, config.bench)
            found = pl.DataFrame(rows)
            found.write_csv(run.folder / "bench.csv")  # what is measured stays, whatever stops the rest
        draw(found, run.folder / "bench.png")
        show(found, config.bench)
        if not set(FORMATS) & sources.keys() and config.bench.device == "cpu":
            print(f"no integer model yet: python -m qatlab.export checkpoint={run.folder}")
        for name in ("bench.csv", "bench.png"):
            print(f"{name:22} {run.folder / name}")
    return run.folder / "bench.csv"


def _check(options: BenchConfig) -> None:
    import torch

    if options.device not in ("cpu", "cuda"):
        raise UserError(f"bench.device={options.device} is not known: give cpu or cuda.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench.device=cuda, and torch finds no GPU here: leave the option out to time the CPU.")
    if not options.batches or min([*options.batches, options.threads, options.rounds]) < 1:
        raise UserError("bench.batches, bench.threads and bench.rounds take whole numbers of at least 1.")


def main() -> None:
    """Run ``bench`` with the options of the command line."""
    cli.main(bench, needs_recipe=False)


if __name__ == "__main__":
    main()
