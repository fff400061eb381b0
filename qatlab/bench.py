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
from qatlab.core.errors import UserError


def bench(config: Config, recipe: str) -> Path:
    """Return the table of times, ``bench.csv`` in the folder of the run in ``checkpoint=``."""
    # Torch and all are loaded here: --help, tab completion and a mistake in the options answer at once.
    import polars as pl

    from qatlab.deploy.bench.speed import TITLES, draw_times, measure, print_times, written
    from qatlab.deploy.runtimes import FORMATS
    from qatlab.models import clip
    from qatlab.models.quantized import load_quantized
    from qatlab.stages.requested import one_run

    with ExitStack() as stack:
        asked = one_run(config, recipe, "a bench")
        run = stack.enter_context(asked.run)
        run.require_writable("its times are written into it")
        _require_device(config.bench)
        loaded = clip.load(asked.config.model)
        exports, size = run.folder / "export", loaded.preprocess.size
        # Pickles of the towers for the processes that time them: in a folder that only this user can read.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sources = written(
            loaded.visual,
            load_quantized(run.folder, config.trust),
            exports,
            size,
            folder,
            config.bench.device,
            config.trust,
        )
        rows: list[dict[str, object]] = []
        if config.bench.device == "cpu" and "torch" not in sources and (exports / "torch").exists():
            print(f"  left out: {exports / 'torch'}, a program that can run code, unless trust=true")
        for kind, source in sources.items():
            print(f"  timing {TITLES[kind]}", flush=True)
            rows += measure(kind, source, sources["fp32"], size, config.bench)
            found = pl.DataFrame(rows)
            found.write_csv(run.folder / "bench.csv")  # after each form: whatever stops the rest, this much is kept
        draw_times(found, run.folder / "bench.png")
        print_times(found, config.bench)
        if not set(FORMATS) & sources.keys() and config.bench.device == "cpu":
            print(f"no integer model yet: python -m qatlab.export checkpoint={run.folder}")
        for name in ("bench.csv", "bench.png"):
            print(f"{name:22} {run.folder / name}")
    return run.folder / "bench.csv"


def _require_device(options: BenchConfig) -> None:
    """Raise UserError for a device that is not here."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench.device=cuda, and torch finds no GPU here: leave the option out to time the CPU.")


def main() -> None:
    """Run ``bench`` with the options of the command line."""
    cli.main(bench)


if __name__ == "__main__":
    main()
