"""Quantizers, quantized layers, and the conversion, calibration and verification of a model."""

from qatlab.quant.bits.allocate import allocate_bits, bit_rules
from qatlab.quant.bits.plan import MixedPrecision
from qatlab.quant.bits.sensitivity import gradient_sensitivities, measured_sensitivities
from qatlab.quant.inspect.layer_report import layer_report
from qatlab.quant.inspect.verify import VerificationError, verify
from qatlab.quant.layers.attention import QuantAttention, QuantOpenClipAttention
from qatlab.quant.layers.convert import quantize
from qatlab.quant.layers.linear import QuantConv2d, QuantLayer, QuantLinear
from qatlab.quant.layers.lora import LoRA
from qatlab.quant.layers.merge import merge
from qatlab.quant.layers.products import AttentionProducts
from qatlab.quant.layers.walk import full_precision, quant_layers
from qatlab.quant.ptq.calibrate import calibrate
from qatlab.quant.ptq.ridge import Ridge
from qatlab.quant.quantizers.base import Quantizer
from qatlab.quant.quantizers.blocks import MX, NVFP4
from qatlab.quant.quantizers.dynamic import DynamicMinMax
from qatlab.quant.quantizers.fp8 import FP8
from qatlab.quant.quantizers.gptq import GPTQ
from qatlab.quant.quantizers.hadamard import RandomHadamard, walsh_hadamard
from qatlab.quant.quantizers.lr_qat import LRQAT
from qatlab.quant.quantizers.lsq import LSQ
from qatlab.quant.quantizers.lsq_plus import LSQPlus
from qatlab.quant.quantizers.minmax import MinMax
from qatlab.quant.quantizers.raana import RaanA
from qatlab.quant.rewrites.outlier_channels import OutlierChannels
from qatlab.quant.rewrites.registers import CachedRegisters
from qatlab.quant.rewrites.repq import RepQ
from qatlab.quant.rewrites.rotation import Rotation
from qatlab.quant.rewrites.smoothquant import SmoothQuant

__all__ = [
    "FP8",
    "GPTQ",
    "LRQAT",
    "LSQ",
    "MX",
    "NVFP4",
    "AttentionProducts",
    "CachedRegisters",
    "DynamicMinMax",
    "LSQPlus",
    "LoRA",
    "MinMax",
    "MixedPrecision",
    "OutlierChannels",
    "QuantAttention",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantOpenClipAttention",
    "Quantizer",
    "RaanA",
    "RandomHadamard",
    "RepQ",
    "Ridge",
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
