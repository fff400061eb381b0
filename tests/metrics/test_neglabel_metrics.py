"""NegLabel against loops over words, groups and images; what it allocates; generic negatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from qatlab.metrics.neglabel import NegLabels, generic_negative, grouped, mine, neglabel


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def mass(inside: list[float], outside: list[float], scale: float) -> float:
    """The softmax mass on the first list, for one image."""
    top = max(inside + outside)
    own, others = (math.fsum(math.exp(scale * (c - top)) for c in values) for values in (inside, outside))
    return own / (own + others)


@pytest.mark.parametrize(("classes", "fraction"), [(10, 0.15), (21, 0.15), (1, 0.5), (100, 0.01)])
def test_mining_keeps_the_words_least_like_any_class(classes: int, fraction: float) -> None:
    words, inside = unit(300, 16), unit(classes, 16, seed=1)
    likeness = []
    for word in words.double().tolist():
        cosines = sorted(math.fsum(a * b for a, b in zip(word, row, strict=True)) for row in inside.double().tolist())
        place = 0.95 * (classes - 1)  # linear interpolation between order statistics, as torch.quantile documents
        low, high = cosines[math.floor(place)], cosines[math.ceil(place)]
        likeness.append(low + (place - math.floor(place)) * (high - low))
    expected = sorted(range(300), key=likeness.__getitem__)[: math.floor(300 * fraction)]
    assert mine(words, inside, fraction).tolist() == expected


def test_mining_is_the_same_in_any_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    words, inside = unit(200, 8), unit(7, 8, seed=1)
    whole = mine(words, inside)
    monkeypatch.setattr("qatlab.metrics.neglabel._CANDIDATES", 3)
    assert torch.equal(mine(words, inside), whole)
    assert mine(words.flip(0), inside).tolist() == [199 - row for row in whole.tolist()]


def test_groups_are_a_permutation_of_all_but_the_remainder() -> None:
    words = torch.arange(1057.0)[:, None].expand(-1, 4)
    groups = grouped(words, 100, seed=0)
    assert groups.shape == (100, 10, 4)
    flat = groups[..., 0].flatten()
    assert sorted(flat.tolist()) == list(range(1000))  # the last 57 are dropped before the permutation
    assert flat.tolist() != list(range(1000))
    assert torch.equal(grouped(words, 100, seed=0), groups)
    assert not torch.equal(grouped(words, 100, seed=1), groups)
    # the rule of the authors' code: torch.manual_seed(0), torch.randperm
    assert torch.equal(flat.long(), torch.randperm(1000, generator=torch.Generator().manual_seed(0)))


def test_too_few_words_are_refused() -> None:
    with pytest.raises(ValueError, match="3 negative labels do not fill 100 groups"):
        grouped(unit(3, 4))
    with pytest.raises(ValueError, match=r"0\.15 of 6 candidates is none"):
        mine(unit(6, 4), unit(2, 4))


@pytest.mark.parametrize("groups", [1, 7, 40])
def test_neglabel_is_the_mean_over_groups_of_the_mass_on_the_classes(groups: int) -> None:
    images, inside, words = unit(137, 32, seed=2), unit(11, 32, seed=3), unit(83, 32, seed=4)
    images = normalize(images + 0.5 * inside[0], dim=-1)
    kept = len(words) - len(words) % groups
    order = torch.randperm(kept, generator=torch.Generator().manual_seed(5)).tolist()
    parts = np.array_split(order, groups)
    expected = []
    for image in images.double():
        own, others = ((texts.double() @ image).tolist() for texts in (inside, words))
        found = [mass(own, [others[i] for i in part], 100.0) for part in parts]
        expected.append(math.fsum(found) / groups)
    scores = neglabel(images, NegLabels(inside, grouped(words, groups, seed=5)))
    assert scores.dtype == torch.float64
    brute = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(scores, brute, rtol=2e-5, atol=1e-12)
    assert torch.equal(scores.argsort(), brute.argsort())


def test_near_certain_images_do_not_tie() -> None:
    """Their masses are 1 in float32."""
    inside, words = torch.eye(8)[:1], torch.eye(8)[1:]
    angles = torch.linspace(0.77, 0.82, 50)
    images = torch.stack([angles, (1 - angles**2).clamp(min=0).sqrt(), *torch.zeros(6, 50)], dim=1)
    scores = neglabel(images, NegLabels(inside, grouped(words, 7)))
    assert len(scores.float().unique()) < len(scores.unique())
    assert (scores.diff() > 0).all()


@pytest.mark.parametrize("cosine", [-1.0, 0.0, 1.0])
def test_extreme_cosines_are_finite(cosine: float) -> None:
    images = torch.eye(4)[:1].expand(300, -1)
    opposite = NegLabels(cosine * torch.eye(4)[:1], grouped(-cosine * torch.eye(4)[:1].expand(10, -1), 5))
    scores = neglabel(images, opposite)
    assert torch.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    for scale in (1e-6, 1.0, 100.0, 1e6):
        generic = generic_negative(cosine * torch.ones(2, 3), images[:2], -cosine * torch.eye(4), scale)
        assert torch.isfinite(generic).all()


def test_the_same_bits_from_the_same_set_whatever_follows_it() -> None:
    images, negatives = unit(500, 32), NegLabels(unit(10, 32, seed=1), grouped(unit(400, 32, seed=2), 20))
    whole = neglabel(images, negatives)
    assert torch.equal(neglabel(images[:256], negatives), whole[:256])
    torch.testing.assert_close(
        torch.cat([neglabel(part, negatives) for part in images.split(7)]), whole, rtol=1e-5, atol=0
    )


def peak_bytes(call: Any) -> int:
    """The most bytes that the CPU allocator held at once beyond those before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_memory_of_imagenet_and_its_negatives_is_that_of_a_chunk() -> None:
    """1000 classes and 10,499 negatives, whatever the number of images: their logits would be 2.2 GiB at 50k."""
    negatives = NegLabels(unit(1000, 64), grouped(unit(10_499, 64, seed=1)))
    few, many = unit(256, 64, seed=2), unit(1024, 64, seed=2)
    peaks = [peak_bytes(lambda images=images: neglabel(images, negatives)) for images in (few, many)]
    assert 4 * 128 * 10_400 < peaks[0] <= 32 * 2**20
    # 8 bytes of result per image, held twice where the chunks are joined
    assert peaks[1] - peaks[0] <= 16 * (len(many) - len(few)) + 2**16


def test_generic_negatives_take_mass_from_the_classes() -> None:
    images, inside, generic = unit(200, 16), unit(9, 16, seed=1), unit(4, 16, seed=2)
    cosines = images @ inside.T
    for scale in (1.0, 20.0, 100.0):
        scores = generic_negative(cosines, images, generic, scale)
        others = (images @ generic.T).tolist()
        expected = [mass(own, other, scale) for own, other in zip(cosines.tolist(), others, strict=True)]
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
