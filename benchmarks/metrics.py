"""What the metrics cost, in ratios to scikit-learn and torchmetrics, and how long a bootstrap takes.

Process CPU time, one thread, both sides interleaved in one process, median over the rounds:

  detection / sklearn   AUROC and both FPR@95 of 5 scores on 50k ID and 10k OOD images (target at most 0.30 ×, |Δ| <= 1e-9)
  pass / torchmetrics   accuracy, top-5, NLL, Brier and ECE of 50k × 1000 cosines over torchmetrics' ECE alone (0.40 ×)
  bootstrap             seconds for 1000 resamples: every detection measure of 5 scores, every classification metric

python benchmarks/metrics.py [--images 50000] [--rounds 5] [--resamples 1000]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from qatlab.metrics.bootstrap import bootstrap_classification, bootstrap_detection
from qatlab.metrics.calibration import expected_calibration_error, score_zero_shot
from qatlab.metrics.detection import auroc, fpr95_id_pos, fpr95_ood_pos

DETECTION_TARGET, PASS_TARGET = 0.30, 0.40
SCORES, CLASSES, SCALE = 5, 1000, 100.0


def seconds(work: Callable[[], object]) -> float:
    """Process CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def made_cosines(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of 1000 classes of which about 60 in 100 images have their own on top."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    cosines = 0.2 + 0.03 * torch.randn(images, CLASSES, generator=generator)
    cosines[torch.arange(images), labels] += 0.11
    return cosines, labels


def sklearn_detection(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float, float]:
    truth, both = np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside]
    found = [float(roc_auc_score(truth, both))]
    for positive, values in ((truth, both), (1 - truth, -both)):
        fpr, tpr, _ = roc_curve(positive, values, drop_intermediate=False)
        found.append(float(fpr[np.argmax(tpr >= 0.95)]))
    return found[0], found[1], found[2]


def our_detection(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float, float]:
    return auroc(inside, outside), fpr95_id_pos(inside, outside), fpr95_ood_pos(inside, outside)


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both and the median of their ratio, after one round that is not counted."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return medians[0], medians[1], statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="ID images; a fifth as many are OOD")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; at least 5 for a figure to rely on")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    inside = [rng.normal(41, 1, options.images) for _ in range(SCORES)]
    outside = [rng.normal(40, 1, options.images // 5) for _ in range(SCORES)]

    def each(measure: Callable[[np.ndarray, np.ndarray], tuple[float, float, float]]) -> np.ndarray:
        return np.array([measure(ids, oods) for ids, oods in zip(inside, outside, strict=True)])

    apart = np.abs(each(our_detection) - each(sklearn_detection)).max()
    ours, theirs, share = ratio(lambda: each(our_detection), lambda: each(sklearn_detection), options.rounds)
    print(f"detection {1e3 * ours:6.1f} ms, sklearn {1e3 * theirs:6.1f} ms, apart by at most {apart:.1e}")
    print(f"{'detection / sklearn':22} {share:5.2f} × (target at most {DETECTION_TARGET:.2f} ×)")

    cosines, labels = made_cosines(options.images)
    logits = SCALE * cosines

    def one_pass() -> None:
        scored = score_zero_shot(cosines, labels, SCALE)
        expected_calibration_error(scored.confidence, scored.correct)

    ours, theirs, share = ratio(
        one_pass, lambda: multiclass_calibration_error(logits, labels, CLASSES, n_bins=15), options.rounds
    )
    print(f"pass {1e3 * ours:6.1f} ms, torchmetrics {1e3 * theirs:6.1f} ms")
    print(f"{'pass / torchmetrics':22} {share:5.2f} × (target at most {PASS_TARGET:.2f} ×)")

    named = [{str(number): values for number, values in enumerate(side)} for side in (inside, outside)]
    taken = seconds(lambda: bootstrap_detection(named[0], named[1], resamples=options.resamples))
    print(f"{'bootstrap, detection':22} {taken:5.1f} s for {options.resamples} resamples of {SCORES} scores")
    columns = score_zero_shot(cosines, labels, SCALE)._asdict()
    taken = seconds(lambda: bootstrap_classification(columns, labels, resamples=options.resamples))
    print(f"{'bootstrap, accuracy …':22} {taken:5.1f} s for {options.resamples} resamples")


if __name__ == "__main__":
    main()
