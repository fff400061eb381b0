"""Quantizers, quantized layers, and the conversion, calibration and verification of a model."""

from qatlab.quant.allocate import allocate_bits, bit_rules
from qatlab.quant.attention import QuantAttention, QuantOpenClipAttention
from qatlab.quant.calibrate import calibrate, layer_report
from qatlab.quant.convert import quantize
from qatlab.quant.dynamic import DynamicMinMax
from qatlab.quant.hadamard import RandomHadamard, walsh_hadamard
from qatlab.quant.layers import QuantConv2d, QuantLayer, QuantLinear, full_precision, quant_layers
from qatlab.quant.lora import LoRA
from qatlab.quant.lr_qat import LRQAT, merge
from qatlab.quant.lsq import LSQ
from qatlab.quant.lsq_plus import LSQPlus
from qatlab.quant.minmax import MinMax
from qatlab.quant.plan import MixedPrecision
from qatlab.quant.quantizer import Quantizer
from qatlab.quant.raana import RaanA
from qatlab.quant.rotation import Rotation
from qatlab.quant.sensitivity import gradient_sensitivities, measured_sensitivities
from qatlab.quant.smoothquant import SmoothQuant
from qatlab.quant.verify import VerificationError, verify

__all__ = [
    "LRQAT",
    "LSQ",
    "DynamicMinMax",
    "LSQPlus",
    "LoRA",
    "MinMax",
    "MixedPrecision",
    "QuantAttention",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantOpenClipAttention",
    "Quantizer",
    "RaanA",
    "RandomHadamard",
    "Rotation",
    "SmoothQuant",
    "VerificationError",
    "allocate_bits",
    "bit_rules",
    "calibrate",
    "full_precision",
    "gradient_sensitivities",
    "layer_report",
    "measured_sensitivities",
    "merge",
    "quant_layers",
    "quantize",
    "verify",
    "walsh_hadamard",
]
