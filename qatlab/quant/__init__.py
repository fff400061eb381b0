"""Quantizers, quantized layers, and the conversion, calibration and verification of a model."""

from qatlab.quant.attention import QuantAttention, QuantOpenClipAttention
from qatlab.quant.calibrate import calibrate, layer_report
from qatlab.quant.convert import quantize
from qatlab.quant.layers import QuantConv2d, QuantLayer, QuantLinear, full_precision, quant_layers
from qatlab.quant.dynamic import DynamicMinMax
from qatlab.quant.lsq import LSQ
from qatlab.quant.lsq_plus import LSQPlus
from qatlab.quant.minmax import MinMax
from qatlab.quant.quantizer import Quantizer
from qatlab.quant.verify import VerificationError, verify

__all__ = [
    "LSQ",
    "DynamicMinMax",
    "LSQPlus",
    "MinMax",
    "QuantAttention",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantOpenClipAttention",
    "Quantizer",
    "VerificationError",
    "calibrate",
    "full_precision",
    "layer_report",
    "quant_layers",
    "quantize",
    "verify",
]
