"""Classify photos with an exported integer model: numpy, Pillow and the runtime alone, no torch.

python examples/classify.py runs/<id>/export/openvino photo.jpg [more.jpg ...] [--names cat,dog] [--top 5]
python examples/classify.py runs/<id>/export/openvino photo.jpg threshold.score=energy threshold.tpr=0.9 threshold.set=imagenet

Prints the most probable classes of each photo, and whether it looks like an image of these classes at all: its score against
the value that a share of the in-distribution images reached, by default the export's own: 95 % of the first set's images, by
the maximum concept matching score (Ming et al. 2022). What that value accepts of each OOD set is printed first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

FILES = {"onnx": ["model.onnx"], "openvino": ["model.xml", "model.bin"]}


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
    # threshold.score= and so on are spelled as `python -m qatlab.export` has them; everything else is argparse's.
    asked = dict(word.split("=", 1) for word in sys.argv[1:] if word.startswith("threshold.") and "=" in word)
    options = parser.parse_args([word for word in sys.argv[1:] if word.partition("=")[0] not in asked])
    about = described(options.folder, parser)
    inside = chosen(options.folder, about["in_distribution"], asked, parser) if asked else about["in_distribution"]
    print(told(inside))
    with np.load(options.folder / "classes.npz") as stored:
        reference = inside.get("classes", inside["of"])
        usual, names = stored[reference], stored[f"{reference}.names"]
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
        wanted = [name.strip() for name in options.names.split(",")]
        for name in wanted:
            if name not in names:
                among = f"{', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
                parser.error(f"{name!r} is none of the classes: {among}")
        rows = [list(names).index(name) for name in wanted]
        classes, names = classes[rows], names[rows]
    model = load(options.folder / FILES[about["format"]][0], about["format"])
    if off := differing(options.folder, about, model):
        parser.error(f"{options.folder} computes something else on this machine than where it was certified ({off}): a CPU "
                     "without VNNI cuts off sums of 8-bit products. Export again with exact=true")  # fmt: skip
    for photo in options.photos:
        try:
            with Image.open(photo) as image:
                pixels = prepare(image, about["preprocess"])
        except OSError as error:  # missing, no image, or cut short
            parser.error(f"{photo} cannot be read: {error}")
        features = model(pixels[None])[0].astype(np.float64)
        features /= np.linalg.norm(features)
        # Whatever the classes asked for: the threshold is that of the cosines to the classes it was measured with.
        score = SCORES[inside["score"]](usual @ features, about["logit_scale"], inside["temperature"])
        print(f"{photo}: {'in' if score >= inside['threshold'] else 'out of'}-distribution for {inside['of']} "
              f"({inside['score']} {score:.6g}, threshold {inside['threshold']:.6g})")  # fmt: skip
        logits = about["logit_scale"] * (classes @ features)
        is_sigmoid = about.get("zeroshot") == "sigmoid"  # each class then has a probability of its own
        probabilities = sigmoid(logits + about["logit_bias"]) if is_sigmoid else softmax(logits)
        for place in np.argsort(-probabilities)[: options.top]:
            print(f"  {100 * probabilities[place]:5.1f} %  {names[place]}")


def chosen(folder: Path, default: dict, asked: dict[str, str], parser: argparse.ArgumentParser) -> dict:  # type: ignore[type-arg]
    """Return the threshold that ``asked`` {"threshold.score": ...} names, from the scores stored in the folder."""
    for word in asked:
        if word not in ("threshold.score", "threshold.tpr", "threshold.set"):
            parser.error(f"{word}= is unknown: there are threshold.score, threshold.tpr and threshold.set")
    score, of = asked.get("threshold.score", default["score"]), asked.get("threshold.set", default["of"])
    share = asked.get("threshold.tpr", str(default.get("tpr", 0.95)))
    try:
        tpr = float(share)
    except ValueError:
        tpr = 0.0
    if not 0 < tpr < 1:
        parser.error(f"threshold.tpr={share} is the share of ID images that are accepted: a number between 0 and 1")
    if score not in SCORES:
        parser.error(f"threshold.score={score} is unknown: there are {', '.join(SCORES)}")
    stored = default.get("scores")
    if stored is None:
        parser.error(f"{folder} is an export of an earlier release, which stored no scores: export again")
    file = folder / Path(stored["file"]).name
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != stored["sha256"]:
        parser.error(f"{file} is missing, cut short or changed: export again")
    if of not in stored["sets"]:
        parser.error(f"threshold.set={of} is no ID set of this export: there are {', '.join(stored['sets'])}")
    numbers = stored["sets"][of]["arrays"]
    with np.load(file) as arrays:
        scores = {name: arrays[f"{number}.{score}"] for name, number in numbers.items()}
    # "lower" takes the score of an image: the share of the images or more reach it, never less.
    threshold = float(np.quantile(scores[of], round(1 - tpr, 12), method="lower"))
    shares = {name: float((values >= threshold).mean()) for name, values in scores.items()}
    accepted = {name: {"share": shares[name], "images": len(scores[name])} for name in scores if name != of}
    made = {"score": score, "tpr": tpr, "threshold": threshold, "of": of, "images": len(scores[of])}
    return {**default, **made, "reached": shares[of], "accepted": accepted, "classes": stored["sets"][of]["classes"]}


def told(inside: dict) -> str:  # type: ignore[type-arg]
    """Return in words which images count as in-distribution, and how many of each OOD set do."""
    score, share = inside["score"], 100 * inside.get("reached", 0.95)
    line = f"in-distribution: {score} of at least {inside['threshold']:.6g}"
    line += f", as {share:.4g} % of the {inside['images']} images of {inside['of']}"
    of = [f"{100 * x['share']:.1f} % of {name} ({x['images']})" for name, x in inside.get("accepted", {}).items()]
    return f"{line}; accepts {', '.join(of)}" if of else line


def described(folder: Path, parser: argparse.ArgumentParser) -> dict:  # type: ignore[type-arg]
    """Return what an exported folder says of itself, its files compared with their checksums."""
    path = folder / "export.json"
    if not path.exists():
        parser.error(f"{folder} has no export.json: give the folder that `python -m qatlab.export` made")
    about = json.loads(path.read_text())
    read = {*FILES.get(about["format"], ["none"]), "classes.npz", "check.npz", "check.onnx"}
    if not read <= set(about["sha256"]):
        parser.error(f"{path} lacks the checksum of a file that is read: export again, with format=onnx or openvino")
    for name, digest in about["sha256"].items():
        file = folder / Path(name).name
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            parser.error(f"{file} is missing, cut short or changed: export again")
    return about


def load(file: Path, form: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return what maps prepared images (B, 3, S, S) float32 to features (B, D)."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled(images)[0]


def differing(folder: Path, about: dict, model: Callable[[np.ndarray], np.ndarray]) -> str:  # type: ignore[type-arg]
    """Return how the model differs here from what is stored with it: one layer's output, and the features of images."""
    layer = load(folder / "check.onnx", about["format"])
    with np.load(folder / "check.npz") as stored:
        for runs, given, expected, limit in (
            (layer, "layer_input", "layer_output", about["check"]["layer"]["limit"]),
            (model, "images", "features", about["check"]["limit"]),
        ):
            off = np.linalg.norm(runs(stored[given]) - stored[expected]) / np.linalg.norm(stored[expected])
            if not off <= limit:
                return f"{expected} {off:.1e} off, at most {limit:.1e}"
    return ""


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


def logsumexp(values: np.ndarray) -> float:
    """Return log Σ exp(values)."""
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def entropy(values: np.ndarray) -> float:
    """Return minus the entropy of softmax(values), in nats."""
    shares = softmax(values)
    return float((shares * (values - logsumexp(values))).sum())


# By name: a function of the cosines to the classes (C,), the logit scale s and MCM's temperature; more is more like them.
SCORES: dict[str, Callable[[np.ndarray, float, float], float]] = {
    "msp": lambda cosines, s, temperature: float(softmax(s * cosines).max()),
    "energy": lambda cosines, s, temperature: logsumexp(s * cosines) / s,
    "max_logit": lambda cosines, s, temperature: float(cosines.max()),
    "mcm": lambda cosines, s, temperature: float(softmax(cosines / temperature).max()),
    "entropy": lambda cosines, s, temperature: entropy(s * cosines),
}


def softmax(values: np.ndarray) -> np.ndarray:
    """Return exp(values) / Σ exp(values)."""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-values)), which 0.5 (1 + tanh(values / 2)) is too, without an overflow."""
    return 0.5 * (1 + np.tanh(values / 2))


if __name__ == "__main__":
    main()
