"""The stages of a model, as rows and files name them, and their titles in tables."""

from __future__ import annotations

FP32 = "fp32"
"""The model in full precision."""
QUANTIZED = "quantized"
"""The model after quantization and calibration, before any training."""
ADAPTED = "adapted"
"""The model after training, quantized before or not, from given weights."""
TRAINED = "trained"
"""The model after training from random weights; it has no full-precision model to compare with."""
PROBE = "probe"
"""The model during training, scored on some images of each set; its rows are in no table of results."""
TITLES = {
    FP32: "FP32",
    QUANTIZED: "quantized",
    ADAPTED: "adapted",
    TRAINED: "trained",
    "integer_onnx": "integer (ONNX)",
    "integer_openvino": "integer (OpenVINO)",
    "integer_torch": "integer (torch)",
    "temperature": "after temperature",
    "temperature_proxy": "after temperature (proxy)",
}
"""{stage: title} of the stages in tables, in the order of their columns; the last ones are exports and refits."""
