"""Classify photos with an exported integer model: numpy, Pillow and the runtime alone, no torch.

python examples/classify.py runs/<id>/export/openvino photo.jpg [more.jpg ...] [--names cat,dog] [--top 5]

Prints the most probable classes of each photo, and whether it looks like an image of these classes at all: its maximum
concept matching score (Ming et al. 2022) against the value that 95 % of the in-distribution images reached.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """Print what is in the photos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--names", help="some of the classes, separated by commas; by default all")
    parser.add_argument(
        "--table", type=Path, help="an .npz with features (C, D) and names (C,), in place of the classes"
    )
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()
    about = described(options.folder, parser)
    inside = about["in_distribution"]
    with np.load(options.folder / "classes.npz") as stored:
        usual, names = stored[inside["of"]], stored[f"{inside['of']}.names"]
    classes = usual
    if options.table:
        with np.load(options.table) as stored:
            if not {"features", "names"} <= set(stored):
                parser.error(f"{options.table} holds {', '.join(stored)}: it takes features (C, D) and names (C,)")
            classes, names = stored["features"], stored["names"]
    if classes.ndim != 2 or classes.shape[1] != about["features"] or len(classes) != len(names):
        parser.error(
            f"{options.table} holds features of shape {classes.shape} and {len(names)} names; the model gives "
            f"{about['features']} features, so it takes (C, {about['features']}) and C names"
        )
    if options.names:
        chosen = [name.strip() for name in options.names.split(",")]
        for name in chosen:
            if name not in names:
                among = f"{', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
                parser.error(f"{name!r} is none of the classes: {among}")
        rows = [list(names).index(name) for name in chosen]
        classes, names = classes[rows], names[rows]
    model = load(options.folder, about)
    for photo in options.photos:
        try:
            with Image.open(photo) as image:
                pixels = prepare(image, about["preprocess"])
        except OSError as error:  # missing, no image, or cut short
            parser.error(f"{photo} cannot be read: {error}")
        features = model(pixels[None])[0].astype(np.float64)
        features /= np.linalg.norm(features)
        # Whatever the classes asked for: the threshold is that of the cosines to the classes it was measured with.
        score = softmax(usual @ features / inside["temperature"]).max()
        print(f"{photo}: {'in' if score >= inside['threshold'] else 'out of'}-distribution for {inside['of']} "
              f"({inside['score']} {score:.6g}, threshold {inside['threshold']:.6g})")  # fmt: skip
        probabilities = softmax(about["logit_scale"] * (classes @ features))
        for place in np.argsort(-probabilities)[: options.top]:
            print(f"  {100 * probabilities[place]:5.1f} %  {names[place]}")


def described(folder: Path, parser: argparse.ArgumentParser) -> dict:  # type: ignore[type-arg]
    """Return what an exported folder says of itself, its files compared with their checksums."""
    path = folder / "export.json"
    if not path.exists():
        parser.error(f"{folder} has no export.json: give the folder that `python -m qatlab.export` made")
    about = json.loads(path.read_text())
    for name, digest in about["sha256"].items():
        file = folder / name
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            parser.error(f"{file} is missing, cut short or changed: export again")
    return about


def load(folder: Path, about: dict) -> Callable[[np.ndarray], np.ndarray]:  # type: ignore[type-arg]
    """Return what maps prepared images (B, 3, S, S) float32 to features (B, D)."""
    file = str(folder / about["file"])
    if about["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]
    if about["format"] == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: compiled(images)[0]
    raise SystemExit(f"{folder} holds a model for torch: export with format=onnx or format=openvino.")


def prepare(image: Image.Image, how: dict) -> np.ndarray:  # type: ignore[type-arg]
    """Return the pixels (3, S, S) float32 that the model takes: resized, cropped in the centre, normalised."""
    size, image = how["size"], image.convert("RGB")
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    width, height = image.size
    if how["resize_mode"] == "squash":
        shape = (size, size)
    elif how["resize_mode"] == "shortest":
        short = min(width, height)
        shape = (int(size * width / short), int(size * height / short))
    else:
        raise SystemExit(f"resize_mode {how['resize_mode']} is not known here.")
    image = image.resize(shape, filters[how["interpolation"]])
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    normalised = (pixels - np.array(how["mean"], np.float32)) / np.array(how["std"], np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def softmax(values: np.ndarray) -> np.ndarray:
    """Return exp(values) / Σ exp(values)."""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


if __name__ == "__main__":
    main()
