"""Zero-shot classification by a sigmoid for each class, as SigLIP was trained, instead of a softmax over the classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qatlab.metrics.calibration import ZeroShot, blocks, score_zero_shot


def score_sigmoid(cosines: Tensor, labels: Tensor, logit_scale: float, logit_bias: float) -> ZeroShot:
    """Return the ZeroShot numbers of p_k = sigmoid(s c_k + b) for every image and its label, (N,) each.

    ``cosines`` (N, C), ``labels`` (N,) int64 in 0..C-1, ``logit_scale`` s > 0, ``logit_bias`` b. The classes are independent
    yes-or-no questions, whose probabilities need not sum to 1: the confidence is the largest p_k, the NLL is that of all
    C answers, −log p_label − Σ_other log(1 − p_k) in nats, which is SigLIP's loss (Zhai et al. 2023, algorithm 1), and the
    Brier score Σ_k (p_k − y_k)² lies in 0..C. Predictions and ranks are those of the cosines, as under a softmax. Raises
    ValueError as ``score_zero_shot``.
    """
    ranked = score_zero_shot(cosines, labels, logit_scale)
    nll, brier = [], []
    for rows in blocks(cosines):
        # With the label's sign changed, each logit is that of the wrong answer, since 1 − sigmoid(x) = sigmoid(−x). No
        # difference of two nearly equal numbers is then taken.
        wrong = cosines[rows].double() * logit_scale + logit_bias
        wrong[torch.arange(len(wrong)), labels[rows]] *= -1
        nll.append(-logsigmoid(-wrong).sum(dim=1))
        brier.append(wrong.sigmoid().square().sum(dim=1))
    top = cosines.gather(1, ranked.prediction[:, None]).squeeze(1)
    confidence = top_sigmoid(top, logit_scale, logit_bias)
    return ranked._replace(confidence=confidence, nll=torch.cat(nll), brier=torch.cat(brier))


def top_sigmoid(cosine: Tensor, logit_scale: float, logit_bias: float) -> Tensor:
    """Return the confidence sigmoid(s c + b), (N,) float64, of the ``cosine`` (N,) to the top class."""
    return torch.sigmoid(cosine.double() * logit_scale + logit_bias)
