"""Mahalanobis, kNN and ViM against loops in float64, scikit-learn's estimators, and what they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.covariance import EmpiricalCovariance, LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from qatlab.metrics.features import fit_knn, fit_mahalanobis, fit_vim, knn, mahalanobis, vim

WIDTH = 12


def clusters(n: int, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit features around one direction per class, with an ellipse for noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    noise = torch.randn(n, WIDTH, generator=generator) * torch.linspace(0.02, 0.3, WIDTH)
    return normalize(torch.eye(WIDTH)[labels] + noise, dim=-1), labels


def elsewhere(n: int) -> Tensor:
    return normalize(torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(9)), dim=-1)


def loop(features: Tensor, labels: Tensor, images: Tensor, precision: np.ndarray) -> list[float]:
    means = [features[labels == k].double().mean(0).numpy() for k in labels.unique()]
    return [-min(float((x - m) @ precision @ (x - m)) for m in means) for x in images.double().numpy()]


def within(features: Tensor, labels: Tensor) -> np.ndarray:
    x = features.double()
    return torch.cat([x[labels == k] - x[labels == k].mean(0) for k in labels.unique()]).numpy()


@pytest.mark.parametrize("n", [20, 600])
def test_mahalanobis_is_the_distance_to_the_nearest_class(n: int) -> None:
    features, labels = clusters(n)
    images = torch.cat([clusters(530, seed=1)[0], elsewhere(20)])
    witness = LedoitWolf(assume_centered=True).fit(within(features, labels))
    scores = mahalanobis(images, fit_mahalanobis(features, labels))
    expected = loop(features, labels, images, np.linalg.inv(witness.covariance_))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_with_many_images_mahalanobis_is_that_of_the_empirical_covariance() -> None:
    features, labels = clusters(40_000)
    images = torch.cat([clusters(30, seed=1)[0], elsewhere(30)])
    plain = EmpiricalCovariance(assume_centered=True).fit(within(features, labels))
    expected = loop(features, labels, images, plain.precision_)
    torch.testing.assert_close(
        mahalanobis(images, fit_mahalanobis(features, labels)), torch.tensor(expected).double(), rtol=2e-2, atol=0
    )


def test_mahalanobis_ignores_where_the_classes_lie_and_which_are_missing() -> None:
    features, labels = clusters(200)
    images, moved = elsewhere(40), 7.0
    scores = mahalanobis(images, fit_mahalanobis(features, labels))
    torch.testing.assert_close(
        mahalanobis(images + moved, fit_mahalanobis(features + moved, labels)), scores, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(mahalanobis(images, fit_mahalanobis(features, 10 * labels + 3)), scores)


@pytest.mark.parametrize("k", [1, 10, 60])
def test_knn_is_the_distance_to_the_kth_neighbour(k: int) -> None:
    features, _ = clusters(60)
    images = torch.cat([clusters(520, seed=1)[0], elsewhere(20), features[:1]])
    witness = NearestNeighbors(n_neighbors=k).fit(features.double().numpy())
    expected = -witness.kneighbors(images.double().numpy())[0][:, -1]
    scores = knn(images, fit_knn(3 * features, k))  # features are made unit
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-6 if k > 1 else 1e-3)
    if k > 1:
        assert torch.equal(scores.argsort(), torch.tensor(expected).argsort())


@pytest.mark.parametrize("dimension", [None, 3, 11])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_vim_is_energy_minus_the_virtual_logit(dimension: int | None, scale: float) -> None:
    features, _ = clusters(80)
    classes = torch.eye(WIDTH)[:4]
    images = torch.cat([clusters(520, seed=1)[0], elsewhere(20)])
    kept = dimension or WIDTH // 2
    # as the authors write it: the eigenvectors of the smaller eigenvalues of the uncentred covariance
    train, head = features.double().numpy(), scale * classes.double().numpy()
    values, vectors = np.linalg.eigh(EmpiricalCovariance(assume_centered=True).fit(train).covariance_)
    null = vectors[:, np.argsort(-values)[kept:]]
    alpha = (train @ head.T).max(1).mean() / np.linalg.norm(train @ null, axis=1).mean()
    x = images.double().numpy()
    expected = logsumexp(x @ head.T, axis=1) - alpha * np.linalg.norm(x @ null, axis=1)
    scores = vim(images, images @ classes.T, scale, fit_vim(features, classes, dimension))
    torch.testing.assert_close(scores * scale, torch.tensor(expected), rtol=1e-6, atol=1e-6 * scale)


def test_all_three_tell_images_of_no_class() -> None:
    features, labels = clusters(200)
    classes, inside, outside = torch.eye(WIDTH)[:4], clusters(100, seed=1)[0], elsewhere(100)
    images = torch.cat([inside, outside])
    truth = np.r_[np.ones(100), np.zeros(100)]
    found = [
        mahalanobis(images, fit_mahalanobis(features, labels)),
        knn(images, fit_knn(features)),
        vim(images, images @ classes.T, 20.0, fit_vim(features, classes)),
    ]
    assert all(roc_auc_score(truth, scores) > 0.9 for scores in found)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_extreme_features_are_finite(scale: float) -> None:
    features, labels = clusters(40)
    classes = torch.eye(WIDTH)[:4]
    images = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH), features])
    assert torch.isfinite(mahalanobis(images, fit_mahalanobis(features, labels))).all()
    assert torch.isfinite(knn(images, fit_knn(features))).all()
    assert torch.isfinite(vim(images, images @ classes.T, scale, fit_vim(features, classes))).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    features, labels = clusters(40)
    with pytest.raises(ValueError, match="the 4 images of 4 classes hold no two different images of a class"):
        fit_mahalanobis(features[:4], labels[:4])
    with pytest.raises(ValueError, match=r"label -1 is outside 0\.\.3"):
        fit_mahalanobis(features, torch.cat([labels[:-1], torch.tensor([-1])]))
    with pytest.raises(ValueError, match=r"features \(N, D\) and labels \(N,\)"):
        fit_mahalanobis(features, labels[:-1])
    with pytest.raises(ValueError, match="no 10-th neighbour among 9 images"):
        fit_knn(features[:9])
    with pytest.raises(ValueError, match="12 dimensions leaves no residual of 12"):
        fit_vim(features, torch.eye(WIDTH), WIDTH)
    with pytest.raises(ValueError, match="5 images span no more than 6 dimensions"):
        fit_vim(features[:5], torch.eye(WIDTH))
    assert math.isfinite(fit_vim(features, torch.eye(WIDTH)).alpha)
