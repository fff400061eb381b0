"""How quantized layers are trained: which parameters learn, and by which kernels and products."""

from __future__ import annotations

from torch import nn

from qatlab.core.errors import UserError, nearest
from qatlab.quant.layers.fused import MATMULS
from qatlab.quant.layers.linear import QuantLinear
from qatlab.quant.layers.walk import quant_layers
from qatlab.quant.quantizers.base import Quantizer
from qatlab.quant.quantizers.kernels import EAGER, compiled


def freeze_base(model: nn.Module) -> None:
    """Freeze every parameter of ``model`` that belongs to no quantizer and no adapter of a quantized layer.

    QAT-LoRA (arXiv 2509.21173) and LR-QAT train adapters and learned scales alone: biases, norms and embeddings also
    stay those of the checkpoint, and no product for the gradient of a weight is computed.
    """
    trained: set[nn.Parameter] = set()
    for layer in quant_layers(model).values():
        for module in (layer.weight_quantizer, layer.act_quantizer, layer.adapter):
            if module is not None:
                trained.update(module.parameters())
    for parameter in model.parameters():
        if parameter not in trained:
            parameter.requires_grad_(False)


def prepare_training(model: nn.Module, kernels: str, matmul: str) -> None:
    """Set how the quantized layers of ``model`` compute with gradients.

    ``kernels`` is "eager" or "compiled", ``matmul`` one of the products of ``fused_linear``. Raises UserError for an
    unknown ``matmul``, and for integer products where no layer has both quantizers, or where a grid has codes that
    cannot be multiplied in this way.
    """
    if matmul not in MATMULS:
        raise UserError(f"quant.matmul={matmul} is unknown{nearest(matmul, MATMULS)}; there are {', '.join(MATMULS)}.")
    # A layer with one quantizer has codes for one factor only, so it multiplies floats whatever ``matmul`` is.
    integer = {
        name: layer
        for name, layer in quant_layers(model).items()
        if isinstance(layer, QuantLinear) and layer.weight_quantizer is not None and layer.act_quantizer is not None
    }
    if matmul != "float":
        _require_integers(integer, matmul)
    for layer in integer.values():
        layer.matmul = matmul
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.kernels = compiled() if kernels == "compiled" else EAGER


def _require_integers(layers: dict[str, QuantLinear], matmul: str) -> None:
    """Raise UserError where no layer has both quantizers, or where a layer's codes cannot be multiplied."""
    if not layers:
        raise UserError(
            f"quant.matmul={matmul} multiplies integer codes, and no layer has both quantizers: choose quant/weight= and "
            "quant/act=, or set quant.matmul=float."
        )
    for name, layer in layers.items():
        for slot, quantizer in (("weight", layer.weight_quantizer), ("act", layer.act_quantizer)):
            if quantizer is not None and not quantizer.integer_product:
                raise UserError(
                    f"quant.matmul={matmul} multiplies integer codes without zero points and with one scale per sum, "
                    f"which quant.{slot} of {name} does not have: choose another quant/{slot}=, or set quant.matmul=float."
                )
