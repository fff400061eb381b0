"""What a sweep of 24 runs costs beside them: planning, starting them and keeping account, in CPU time.

python benchmarks/sweep.py [option=value ...]

The options go to every run. Prints the CPU seconds of the sweep itself, imports apart, those of its runs, and their ratio.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

from qatlab.sweeps import local
from qatlab.sweeps.grid import cells_of
from qatlab.sweeps.state import LEFT, show, state_of

BITS = ",".join(
    f"{{weight:{{bits:{w}}},act:{{bits:{a}}}}}" for w, a in ((8, 8), (6, 8), (6, 6), (4, 8), (4, 6), (4, 4))
)
SWEEP = f"grids: [{{recipe: 'ptq,smoothquant,light_qat,light_qat_lsq', quant: '{BITS}'}}]"


def spent(who: int) -> float:
    """Return the CPU seconds of this process, or of those that it waited for."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run the sweep in a folder of its own and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        (own / "sweep").mkdir()
        (own / "sweep" / "measured.yaml").write_text(SWEEP)
        begun = spent(resource.RUSAGE_SELF)
        cells = cells_of("measured", [f"output={own / 'runs'}", "wandb.mode=disabled", *sys.argv[1:]], own)
        planning = spent(resource.RUSAGE_CHILDREN)  # what composed the cells beside this process
        local.run(cells, LEFT, 2, own, gpus=0)
        runs = spent(resource.RUSAGE_CHILDREN) - planning
        states = [state_of(cell) for cell in cells]
        show(cells, states, 2)
        itself = spent(resource.RUSAGE_SELF) - begun + planning
    assert all(state.kind == "finished" for state in states)
    print(f"{len(cells)} runs: {runs:.0f} s of CPU time; the sweep itself {itself:.1f} s: {itself / runs:.1%}")


if __name__ == "__main__":
    main()
