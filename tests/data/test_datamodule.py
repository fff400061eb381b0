"""Training batches: a pure function of (seed, step), shared by the ranks without overlap, in order on resume."""

import hashlib
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import webdataset as wds

from qatlab.core.errors import UserError
from qatlab.data.captions.batches import CaptionModule, caption_ids, looped_indices
from qatlab.data.captions.samples import SkipCounter
from qatlab.data.captions.source import CaptionShards
from qatlab.data.preprocess import Preprocess

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
    """The samples of each batch, read from pixels, and checked against caption ids, rows and tokens."""
    batches = []
    for batch in made.train_dataloader():
        values = batch["images"][:, 0, 0, 0].tolist()
        assert torch.equal(batch["caption_ids"], caption_ids([str(value) for value in values]))
        assert batch["images"].dtype == torch.uint8
        assert batch["images"].shape == (len(values), 3, 8, 8)
        if made.looped:
            assert torch.equal(made.looped.images[batch["rows"]], batch["images"])
            assert [made.looped.captions[row] for row in batch["rows"]] == [str(value) for value in values]
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


def test_without_tokenizer_no_tokens(folder):
    batch = next(iter(module(folder, tokenizer=None).train_dataloader()))
    assert set(batch) == {"images", "caption_ids", "rows", "skipped"}
    streamed = next(iter(module(folder, tokenizer=None, unique_samples=None).train_dataloader()))
    assert set(streamed) == {"images", "caption_ids", "skipped"}


def test_caption_ids_are_the_leading_bits_of_sha256_without_a_sign():
    texts = [*(f"text {number}" for number in range(50)), "ü", "text 7"]
    ids = caption_ids(texts)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids[7] == ids[-1]
    assert len(set(ids.tolist())) == 51
    bits = [f"{int(hashlib.sha256(text.encode()).hexdigest()[:16], 16):064b}" for text in texts]
    assert ids.tolist() == [int(row[1:], 2) for row in bits]
    assert any(row[0] == "1" for row in bits)


def test_looped_samples_are_there_after_setup(folder):
    made = module(folder)
    assert made.looped is None
    made.setup("fit")
    assert made.looped.captions == [str(value) for value in range(20)]
    streamed = module(folder, unique_samples=None)
    streamed.setup("fit")
    assert streamed.looped is None


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_streamed_batches_do_not_depend_on_workers_nor_on_where_a_run_begins(folder, workers, start):
    whole = rows(module(folder, unique_samples=None, steps=13))
    assert [len(batch) for batch in whole] == [8] * 13
    made = module(folder, unique_samples=None, steps=13, workers=workers, start_step=start)
    assert made.train_dataloader().num_workers == workers
    assert rows(made) == whole[start:]
    assert len({value for batch in whole for value in batch}) == 64
    assert whole != rows(module(folder, unique_samples=None, steps=13, seed=1))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_divide_each_streamed_batch(folder, world):
    whole = rows(module(folder, unique_samples=None, steps=5))
    parts = [rows(module(folder, rank, world, unique_samples=None, steps=5, workers=1)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert [parts[row % world][step][row // world] for row in range(8)] == batch


@pytest.mark.slow
def test_a_spawned_worker_reads_the_same(folder):
    made = module(folder, unique_samples=None)
    made.data.first(3, PREPROCESS)
    expected = [batch["images"] for batch in made.train_dataloader()]
    loader = made.train_dataloader()
    loader.dataset.tokenizer = None
    spawned = torch.utils.data.DataLoader(
        loader.dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    assert all(torch.equal(one, other["images"]) for one, other in zip(expected, spawned, strict=True))


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
    data = CaptionShards(str(folder), "test")
    met = SkipCounter.summed(data.batch(step, 8, 0, 1, PREPROCESS, 0).skipped for step in range(40))
    assert made.skipped == ({"corrupt image": 3} if unique else met)
    assert met["corrupt image"] >= 4 * 4  # four damaged images in each of more than four epochs
    assert made.skipped.gathered() == made.skipped


def test_a_mistake_that_a_worker_meets_ends_training_in_its_own_words(folder):
    made = module(folder, unique_samples=None, workers=2, steps=40)
    made.data = CaptionShards(str(folder), "test", caption_key="text")
    trainer = L.Trainer(max_steps=40, max_epochs=-1, accelerator="cpu", logger=False, barebones=True)
    with pytest.raises(UserError, match=r"^data=test: 1000 samples in a row are unusable.*caption_key=text\.$"):
        trainer.fit(Model(), made)
