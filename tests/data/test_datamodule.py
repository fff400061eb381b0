"""Training batches: a pure function of (seed, step), shared by the ranks without overlap, in order on resume."""

import itertools
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import webdataset as wds

from qatlab.data.captions import CaptionShards
from qatlab.data.module import CaptionModule, looped_indices
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError

PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)


def tokenizer(captions):
    return torch.tensor([[int(caption), 1] for caption in captions])


@pytest.fixture
def folder(tmp_path):
    """Four shards of 16 samples: sample i has pixels i and the caption "i"; one image in each shard is damaged."""
    for shard in range(4):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for value in range(16 * shard, 16 * shard + 16):
                pixels = np.full((8, 8, 3), value, dtype="uint8")
                writer.write({"__key__": f"{value:03d}", "png": pixels, "txt": str(value)})
            writer.write({"__key__": f"damaged{shard}", "jpg": b"damaged", "txt": "0"})
    return tmp_path


def module(folder, rank=0, world=1, **options):
    settings = {
        "batch_size": 8,
        "unique_samples": 20,
        "workers": 0,
        "seed": 0,
        "steps": 6,
        "tokenizer": tokenizer,
        **options,
    }
    made = CaptionModule(CaptionShards(str(folder), "test"), PREPROCESS, **settings)
    made.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return made


def rows(made):
    """The samples of each batch, read from pixels, and checked against captions and tokens."""
    batches = []
    for batch in made.train_dataloader():
        values = batch["images"][:, 0, 0, 0].tolist()
        assert [int(caption) for caption in batch["captions"]] == values
        assert batch["tokens"][:, 0].tolist() == values
        batches.append(values)
    return batches


def test_looped_indices_are_permutations_cut_into_batches():
    order = np.concatenate([looped_indices(3, step, 8, 20) for step in range(10)])
    for epoch in range(4):
        part = order[20 * epoch : 20 * epoch + 20]
        assert sorted(part) == list(range(20))
    assert not np.array_equal(order[:20], order[20:40])
    assert np.array_equal(looped_indices(3, 7, 8, 20), order[56:64])
    assert not np.array_equal(looped_indices(4, 7, 8, 20), order[56:64])
    assert len(looped_indices(0, 2, 50, 20)) == 50


def test_looped_batches_repeat_and_resume(folder):
    whole = rows(module(folder))
    assert len(whole) == 6
    assert whole == rows(module(folder))
    assert rows(module(folder, start_step=4)) == whole[4:]
    assert whole != rows(module(folder, seed=1))


def test_ranks_divide_each_global_batch(folder):
    whole = rows(module(folder))
    parts = [rows(module(folder, rank, 4)) for rank in range(4)]
    for step, batch in enumerate(whole):
        assert [parts[position % 4][step][position // 4] for position in range(8)] == batch


def test_batch_that_the_processes_cannot_share(folder):
    with pytest.raises(UserError, match=r"fit.batch_size=8 .* 3 processes .* multiple of 3"):
        module(folder, 0, 3).setup("fit")
    with pytest.raises(UserError, match="at least 1, or null"):
        module(folder, unique_samples=0).setup("fit")


def test_without_tokenizer_no_tokens(folder):
    batch = next(iter(module(folder, tokenizer=None).train_dataloader()))
    assert set(batch) == {"images", "captions", "skipped"}


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_repeats_and_ends(folder, workers):
    options = {"unique_samples": None, "workers": workers, "steps": 9}
    whole = rows(module(folder, **options))
    assert [len(batch) for batch in whole] == [8] * 9
    assert whole == rows(module(folder, **options))
    assert len(rows(module(folder, start_step=7, **options))) == 2
    assert len({value for batch in whole for value in batch}) > 40


def test_fewer_shards_than_readers(folder):
    made = module(folder / "0.tar", rank=1, world=2, unique_samples=None, workers=4)
    assert made.train_dataloader().num_workers == 1
    assert [len(batch) for batch in rows(made)] == [4] * 6


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, _):
        return self.weight * batch["images"].float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("unique", [None, 60])
def test_skipped_samples_reach_the_main_process(folder, unique):
    made = module(folder, unique_samples=unique, workers=2, steps=40)
    trainer = L.Trainer(
        max_steps=40, max_epochs=-1, accelerator="cpu", logger=False, barebones=True,
    )  # fmt: skip
    trainer.fit(Model(), made)
    assert trainer.global_step == 40
    expected = range(3, 4) if unique else range(8, 40)
    assert made.skipped["corrupt image"] in expected
    assert made.skipped.gathered() == made.skipped
    assert list(itertools.chain(made.skipped)) == ["corrupt image"]
