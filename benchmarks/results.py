"""What reading the rows of many runs costs: CPU time and memory, of files as they are written now and by earlier releases.

python benchmarks/results.py [runs] [rows]        (2000 runs of 50 rows)

Rows are those of the small runs in tests/golden with other numbers. Each tree is read in a process of its own; prints the
bytes of a row, the CPU seconds after imports, and how much the peak of memory grew, beside the size of the frame.
"""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatlab.config import compose, flat
from qatlab.core.checksums import sealed
from qatlab.results.rowfile import RowFile

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "rows.json"
READ = "--read"


def drawn(value: Any, draw: random.Random) -> Any:
    """Return nested numbers with every fraction in them drawn anew."""
    if isinstance(value, dict):
        return {name: drawn(part, draw) for name, part in value.items()}
    if isinstance(value, list):
        return [drawn(part, draw) for part in value]
    return draw.random() if isinstance(value, float) else value


def rows_of(run: int, count: int, golden: list[dict[str, Any]], shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield ``count`` rows of a run, each with a key of its own."""
    draw, repeats = random.Random(run), -(-count // len(golden))
    for place, row in enumerate((golden * repeats)[:count]):
        own = {name: drawn(row[name], draw) for name in ("metrics", "intervals", "paired", "refit") if name in row}
        step = {"step": row["step"] + place // len(golden)}
        config = {**shared["config"], "seed": run}
        yield {**row, **own, **step, "run_id": f"{run:08x}", **shared, "seed": run, "config": config}


def make_tree(folder: Path, runs: int, rows: int, old: bool) -> int:
    """Write results.jsonl of some runs below ``folder``; returns the bytes of all of them."""
    options = dataclasses.asdict(compose("recipe=light_qat_lsq"))
    versions = dict.fromkeys(
        ("torch", "torchvision", "open_clip_torch", "lightning", "torchmetrics", "numpy"), "2.10.0"
    )
    shared = {"config": dict(flat(options)), "versions": versions, "commit": "0123456789ab"}
    golden = json.loads(GOLDEN.read_text())["light_qat_lsq"]
    size = 0
    for run in range(runs):
        path = folder / f"light_qat_lsq-{run:08x}" / "results.jsonl"
        path.parent.mkdir(parents=True)
        found = list(rows_of(run, rows, golden, shared))
        if old:
            path.write_text("".join(sealed(row) + "\n" for row in found))
        else:
            RowFile(path).append(found)
        size += sum(file.stat().st_size for file in path.parent.iterdir())
    return size


def read_tree(folder: str) -> dict[str, float]:
    """Return what ``qatlab.results.read`` of a folder takes, in a process that has done nothing else."""
    import qatlab.results

    qatlab.results.read([])
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    frame = qatlab.results.read(folder, every=True)
    spent, after = time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows": len(frame), "seconds": spent, "grown": (after - before) / 1024, "frame": frame.estimated_size("mb")}


def measured(folder: Path) -> dict[str, float]:
    """Return what ``read_tree`` does, of a new process."""
    command = [sys.executable, __file__, READ, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Make both trees and print what reading each takes."""
    if sys.argv[1:2] == [READ]:
        print(json.dumps(read_tree(sys.argv[2])))
        return
    runs, rows = (int(argument) for argument in [*sys.argv[1:], *("2000", "50")[len(sys.argv) - 1 :]])
    for name, old in (("now", False), ("earlier releases", True)):
        with tempfile.TemporaryDirectory() as folder:
            size = make_tree(Path(folder), runs, rows, old)
            found = measured(Path(folder))
        bound = 2.5 * found["frame"] + 50
        print(
            f"{name}: {size / runs / rows:.0f} bytes a row; {found['rows']:.0f} rows read in {found['seconds']:.2f} s of CPU "
            f"time; memory grew by {found['grown']:.0f} MB (a frame of {found['frame']:.0f} MB: at most {bound:.0f})"
        )


if __name__ == "__main__":
    main()
