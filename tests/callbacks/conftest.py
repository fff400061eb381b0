"""A made-up suite, and a pass over it by hand; run as a script, this file is one rank of such a pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import qatlab
from qatlab.callbacks import OOD, Calibration
from qatlab.evaluation.evaluation import ALWAYS, Evaluation, Pass
from qatlab.evaluation.prediction import Prediction
from qatlab.suites.source import Source, View

VIEWS = [View("adapted", 100.0), View("temperature", 31.25)]
CLASSES = {"birds": 12, "tools": 5}
SIZES = {
    Source("birds", "id", "birds"): 41,
    Source("tools", "id", "tools"): 15,
    Source("held_out", "calibration", "birds"): 9,
    Source("insects", "near_ood", "birds"): 23,
    Source("textures", "far_ood", "birds"): 17,
    Source("textures", "far_ood", "tools"): 17,
    Source("lonely", "far_ood", "tools"): 1,
    Source("sketches", "shifted", "birds"): 12,
}


@dataclass
class World:
    """Cosines and labels of every set, and a pass over them in which rank ``rank`` of ``ranks`` sees its share."""

    cosines: dict[Source, torch.Tensor]
    labels: dict[Source, torch.Tensor]
    views: list[View]

    def drive(
        self,
        evaluation: Evaluation,
        folder: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        batch: int = 7,
        resamples: int = 0,
        of_views: dict[View, dict[Source, torch.Tensor]] | None = None,
    ) -> list[dict]:
        """The rows of a pass; ``of_views`` gives every view cosines of its own, as of several encoders."""
        scored = [source for source in self.cosines if source.role != "calibration"]
        device, available = torch.device("cpu"), dict.fromkeys(CLASSES, ALWAYS)
        encoders = (
            [([view], cosines) for view, cosines in of_views.items()] if of_views else [(self.views, self.cosines)]
        )
        views = [view for of_encoder, _ in encoders for view in of_encoder]
        evaluation.start(Pass(views, scored, device, folder, ranks > 1, resamples, available))
        for of_encoder, cosines in encoders:
            for source in scored:
                share = self._share(source, rank, ranks)
                for index in share.split(batch) if len(share) else ():  # a split of nothing is one empty batch
                    features, labels = torch.empty(len(index), 2), self.labels[source][index]
                    evaluation.update(Prediction(source, features, cosines[source][index], labels, index, of_encoder))
        return evaluation.compute()

    def _share(self, source: Source, rank: int, ranks: int) -> torch.Tensor:
        order = torch.randperm(len(self.labels[source]), generator=torch.Generator().manual_seed(ranks))
        if ranks > 1 and source.role == "shifted":  # only the last rank sees any of them
            return order if rank == ranks - 1 else order[:0]
        return order[rank::ranks]


def make_world() -> World:
    generator = torch.Generator().manual_seed(0)
    cosines, labels = {}, {}
    for source, n in SIZES.items():
        classes = CLASSES[source.reference]
        values = 0.2 + 0.03 * torch.randn(n, classes, generator=generator)
        truth = torch.randint(classes, (n,), generator=generator)
        if source.role in ("id", "shifted", "calibration"):
            values[torch.arange(n), truth] += 0.05
        cosines[source] = (values * 200).round() / 200  # coarse, so that MaxLogit ties
        labels[source] = truth if source.role != "far_ood" else torch.full((n,), -1)
    return World(cosines, labels, VIEWS)


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture(scope="session")
def two_ranks(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two gloo processes left their rows (``rank<r>.json``) of one shared pass."""
    folder = tmp_path_factory.mktemp("two_ranks")
    root = str(Path(qatlab.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ranks = [
        subprocess.Popen([python, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    assert "before the ``update``" not in "".join(errors)
    return folder


def main(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    world = make_world()
    rows = {
        "calibration": world.drive(Calibration(), rank=rank, ranks=2, batch=4),
        "ood": world.drive(OOD(), rank=rank, ranks=2, batch=4),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
