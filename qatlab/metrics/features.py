"""Scores from the image features alone, fitted on labelled ID images that are not scored: Mahalanobis, kNN, ViM."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qatlab.metrics.calibration import check_labels, softmax_peak

# Images per block: the largest float64 block, images by classes or by images of the bank, then has some megabytes.
_IMAGES = 512


class Gaussian(NamedTuple):
    """One Gaussian per class with a common covariance Σ, as the map that makes its distances Euclidean (float64).

    ``whitening`` W (D, D) has W Wᵀ = Σ⁻¹; ``means`` (C', D) of the classes seen are (μ − ``centre``) W.
    """

    centre: Tensor
    means: Tensor
    whitening: Tensor


def fit_mahalanobis(features: Tensor, labels: Tensor) -> Gaussian:
    """Return the class means and the tied covariance of ID ``features`` (N, D) with ``labels`` (N,) int64.

    Lee et al. 2018, except for the covariance: the few images of a calibration split make the empirical covariance
    singular, so it is shrunk towards the identity (Ledoit & Wolf 2004), by less and less as N grows. Raises ValueError
    where no class has two different images, because there is then no covariance within classes.
    """
    _check(features, labels)
    seen, member = labels.unique(return_inverse=True)
    # float64 is needed, because a covariance of hundreds of dimensions
    # is close to singular, and its inverse multiplies rounding errors.
    x = features.double()
    means = torch.zeros(len(seen), x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, member, x)
    means /= torch.bincount(member)[:, None]
    within = x - means[member]
    # A squared difference of 1e-12 is about the rounding of float32 features, so equal images differ by less.
    if not (within.square().sum(dim=1) > 1e-12 * x.square().sum(dim=1)).any():
        raise ValueError(f"the {len(x)} images of {len(seen)} classes hold no two different images of a class")
    # Σ = L Lᵀ, so W = L⁻ᵀ has W Wᵀ = Σ⁻¹, and the distance after x → x W is Euclidean.
    factor = torch.linalg.cholesky(_ledoit_wolf(within))
    whitening = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False).T
    # Distances do not depend on the origin, and with the centre as origin |x|² − 2 x·μ + |μ|² loses fewer digits.
    centre = means.mean(dim=0)
    return Gaussian(centre, (means - centre) @ whitening, whitening)


def mahalanobis(features: Tensor, gaussian: Gaussian) -> Tensor:
    """Return minus the squared Mahalanobis distance of ``features`` (B, D) to the nearest class mean, (B,) float64.

    Lee et al. 2018, the score of one layer without input preprocessing.
    """
    lengths = gaussian.means.square().sum(dim=1)
    distances = []
    for rows in features.split(_IMAGES):
        x = (rows.double() - gaussian.centre) @ gaussian.whitening
        # |x|² is the same for every class, so only the two terms with μ are minimised over classes.
        distances.append(x.square().sum(dim=1) + (lengths - 2 * x @ gaussian.means.T).amin(dim=1))
    return -torch.cat(distances)


class Neighbours(NamedTuple):
    """The unit features ``bank`` (N, D) float32 of the ID images, and ``k``: the k-th neighbour counts."""

    bank: Tensor
    k: int


def fit_knn(features: Tensor, k: int = 10) -> Neighbours:
    """Return the bank of ID ``features`` (N, D), made unit.

    Sun et al. 2022 take k = 1000 of all of ImageNet's training images and k = 10 of every hundredth image; a
    calibration split is nearer to the latter. Raises ValueError where there are fewer than k images.
    """
    if not 1 <= k <= len(features):
        raise ValueError(f"there is no {k}-th neighbour among {len(features)} images")
    return Neighbours(_unit(features), k)


def knn(features: Tensor, neighbours: Neighbours) -> Tensor:
    """Return minus the distance of ``features`` (B, D), made unit, to their k-th neighbour, (B,) float64 in −2..0.

    Euclidean, computed in float64. Sun et al. 2022.
    """
    bank = neighbours.bank.double().T
    # Between unit vectors the distance is √(2 − 2 cos), so the k-th nearest neighbour has the k-th largest cosine.
    kth = [(_unit(rows).double() @ bank).topk(neighbours.k, dim=1).values[:, -1] for rows in features.split(_IMAGES)]
    # An image of the bank itself has a cosine of 1 up to rounding, and the clamp keeps the root real.
    return -(2 - 2 * torch.cat(kth)).clamp(min=0).sqrt()


class Subspace(NamedTuple):
    """``residual`` (D, D − d) float64, a basis of the space that ID features hardly use, and the ``alpha`` of ViM."""

    residual: Tensor
    alpha: float


def fit_vim(features: Tensor, classes: Tensor, dimension: int | None = None) -> Subspace:
    """Return the residual space of ID ``features`` (N, D), and alpha: mean largest cosine over mean residual.

    ``classes`` (C, D) is the zero-shot head; it has no bias, so the origin of the features stays where it is.
    ``dimension`` d of the principal space: half of D by default. Raises ValueError for a d outside 1..D−1, and for
    features that span no more than d dimensions. Wang et al. 2022 (ViM).
    """
    width = features.shape[1]
    # Half of the dimensions is near the choice of ViM's code, which keeps 1000 of 2048 dimensions and 512 of fewer.
    kept = width // 2 if dimension is None else dimension
    if not 0 < kept < width:
        raise ValueError(f"a principal space of {kept} dimensions leaves no residual of {width}")
    x = features.double()
    # eigh sorts the eigenvalues upwards, so the first columns span the space that the features use least.
    residual = torch.linalg.eigh(x.T @ x).eigenvectors[:, : width - kept]
    length = float((x @ residual).norm(dim=1).mean())
    # Alpha divides by this length: for features within the principal space alpha would be nothing but rounding error.
    if not length > 1e-6 * float(x.norm(dim=1).mean()):
        raise ValueError(
            f"{len(x)} images span no more than {kept} dimensions: give more images, or a smaller principal space"
        )
    # Alpha brings the residual to the scale of the largest cosine, as in ViM's code.
    top = torch.cat([(rows @ classes.double().T).amax(dim=1) for rows in x.split(_IMAGES)])
    return Subspace(residual, float(top.mean()) / length)


def vim(features: Tensor, cosines: Tensor, logit_scale: float, subspace: Subspace) -> Tensor:
    """Return logsumexp(s c) / s − alpha ‖residual of the features‖, (B,) float64 in units of a cosine.

    ``features`` (B, D), ``cosines`` (B, C), ``logit_scale`` s > 0. This is the energy minus ViM's virtual logit, both
    over s, which ranks images in the reverse order of the virtual class's softmax probability. Wang et al. 2022 (ViM).
    """
    # log Σ exp(s c) = s max c + log mass, without the overflow of a large scale.
    peak = softmax_peak(cosines, logit_scale)
    residual = torch.cat([(rows.double() @ subspace.residual).norm(dim=1) for rows in features.split(_IMAGES)])
    return peak.cosine + peak.mass.log() / logit_scale - subspace.alpha * residual


def _ledoit_wolf(centred: Tensor) -> Tensor:
    """Return the shrunk covariance (D, D) of ``centred`` (N, D): (1 − δ) S + δ tr(S)/D I. Ledoit & Wolf 2004."""
    n, width = centred.shape
    covariance = centred.T @ centred / n
    mean = covariance.diagonal().mean()
    squares = centred.square()
    # The scatter of the products x_i x_j of single images about the covariance is the error of the estimate.
    spread = (squares.T @ squares).sum() / n - covariance.square().sum()
    distance = (covariance.square().sum() - width * mean**2).clamp(min=0)
    # For a covariance that is a multiple of the identity any weight gives the same result, but the formula gives 0/0.
    shrinkage = 1.0 if distance == 0 else float((spread / n / distance).clamp(0, 1))
    return (1 - shrinkage) * covariance + shrinkage * mean * torch.eye(width).to(covariance)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


def _check(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"features (N, D) and labels (N,) of at least one image are needed, not {shapes}")
    # The number of classes is unknown here; with any upper bound the check finds negative labels, which mark no class.
    check_labels(labels, int(labels.max()) + 1)
