"""The constants of ImageNet-C (224 px) and CIFAR-C (32 px), one tuple per severity 1 to 5.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019);
the values are those of hendrycks/robustness@8190fe3. The comment above a row names the arguments of its function in
order.
"""

from __future__ import annotations

Constants = tuple[float, ...]
Rows = dict[str, tuple[Constants, ...]]


def _single(*values: float) -> tuple[Constants, ...]:
    """Return a tuple of one constant for each severity."""
    return tuple((value,) for value in values)


IMAGENET_C: Rows = {
    # sigma of the added noise on the [0, 1] scale
    "gaussian_noise": _single(0.08, 0.12, 0.18, 0.26, 0.38),
    # photons that a pixel of full brightness counts
    "shot_noise": _single(60, 25, 12, 5, 3),
    # amount: the share of values that become 0 or 1
    "impulse_noise": _single(0.03, 0.06, 0.09, 0.17, 0.27),
    # radius of the disk in pixels; alias: the sigma of its soft edge
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    # sigma of the smoothing, delta (the reach of a copy in pixels), passes over the image
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    # radius and sigma of the Gaussian along the line, in pixels
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    # stop and step of the factors of enlargement, which start at 1
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    # mean, sigma, zoom and threshold of the flakes, radius and sigma of their motion, mix (the share of the image kept)
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    # weight of the image, weight of the texture, shrink (5 takes every fifth pixel of the texture)
    "frost": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    # amount of the cloud; decay from each octave of the cloud to the next finer one
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    # amount added to the value of HSV
    "brightness": _single(0.1, 0.2, 0.3, 0.4, 0.5),
    # factor of each pixel's distance to the mean of its channel
    "contrast": _single(0.4, 0.3, 0.2, 0.1, 0.05),
    # alpha and sigma of the displacement, affine (how far three points
    # move), all in pixels; ImageNet-C's code writes them as multiples of 244
    "elastic_transform": (
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    ),
    # factor by which the image is shrunk before it is enlarged again
    "pixelate": _single(0.6, 0.5, 0.4, 0.3, 0.25),
    # quality of the JPEG, 1 to 95 in Pillow
    "jpeg_compression": _single(25, 18, 15, 10, 7),
    # The 15 corruptions above are the benchmark; ImageNet-C's authors call the four from here on extra.
    # sigma of the noise that the image is multiplied by
    "speckle_noise": _single(0.15, 0.2, 0.35, 0.45, 0.6),
    # sigma in pixels
    "gaussian_blur": _single(1, 2, 3, 4, 6),
    # mean and sigma of the noise, blur in pixels, threshold of a drop, strength, mud (0 for water, 1 for mud)
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
    # factor and offset of the saturation of HSV
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}

# The constants for 32 px, with the same arguments for the same functions.
CIFAR_C: Rows = {
    "gaussian_noise": _single(0.04, 0.06, 0.08, 0.09, 0.1),
    "shot_noise": _single(500, 250, 100, 75, 50),
    "impulse_noise": _single(0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": _single(0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": _single(0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    "pixelate": _single(0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": _single(80, 65, 58, 50, 40),
    "speckle_noise": _single(0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": _single(0.4, 0.6, 0.7, 0.8, 1),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}

TABLES: dict[str, Rows] = {"imagenet_c": IMAGENET_C, "cifar_c": CIFAR_C}
