"""The elementwise arithmetic of rounding, in plain torch or compiled; this file has no autograd."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatlab.core.errors import UserError, nearest

# (grad, v, lo, hi) gives grad where lo < v < hi, else 0, in one pass over the data. A comparison into bools and a
# product with them take ten times as long on a CPU.
_strictly_inside = torch.ops.aten.hardtanh_backward

# An end of the grid as a multiple of the scale: one whole number, or a tensor of them that has the scale's shape.
Ends = int | Tensor


def grid_codes(x: Tensor, scale: Tensor, qmin: Ends, qmax: Ends) -> Tensor:
    """Return x / scale rounded to the nearest even integer and clipped to [qmin, qmax], in the shape of x.

    ``scale`` is (), or (rows, 1) or (n,) for x (rows, n). With a zero point z the result is the code minus z, and the
    ends are minus z too: clip(round(x / s) + z, lo, hi) - z = clip(round(x / s), lo - z, hi - z).

    bfloat16 and float16 are computed in float32, float64 stays float64.
    """
    # Integer runtimes divide too; a product with 1 / scale would round some ties the other way.
    codes = torch.div(widened(x), scale).round_()
    if isinstance(qmin, Tensor) and isinstance(qmax, Tensor):
        # clamp with tensors takes six times as long on a CPU as minimum and maximum.
        return torch.minimum(torch.maximum(codes, qmin, out=codes), qmax, out=codes)
    return codes.clamp_(qmin, qmax)  # type: ignore[arg-type]


def fake_quantize(x: Tensor, scale: Tensor, qmin: Ends, qmax: Ends) -> Tensor:
    """Return x on the grid, code times ``scale``, in the shape and dtype of x; shapes are those of ``grid_codes``."""
    return grid_codes(x, scale, qmin, qmax).mul_(scale).to(x.dtype)


def integer_codes(x: Tensor, scale: Tensor, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """Return the codes of x (rows, n) in ``dtype``, int8 or bfloat16: both hold every code of up to 8 bits exactly."""
    return grid_codes(x, scale, qmin, qmax).to(dtype)


def lsq_backward(x: Tensor, scale: Tensor, grad: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return LSQ's gradients to x and, before LSQ's constant factor, to ``scale``; ``grad`` is the output's gradient.

    x and ``grad`` are (rows, n) with ``scale`` (rows, 1), or of any shape with ``scale`` a scalar. With v = x / s
    strictly inside (qmin, qmax): dx = grad and ds = round(v) - v; else dx = 0 and ds = qmin or qmax (Esser 2020, arXiv
    1902.08153).
    """
    v = torch.div(widened(x), scale)
    grad = grad.to(v.dtype)
    grad_x = _strictly_inside(grad, v, qmin, qmax).to(x.dtype)
    v_inside = _strictly_inside(v, v, qmin, qmax)  # with v in the place of the gradient the result is v inside, else 0
    # Inside, this is round(v) - v. Outside, it is qmin or qmax, because there 0 is subtracted.
    slope = v.clamp_(qmin, qmax).round_().sub_(v_inside).mul_(grad)
    return grad_x, slope.sum(1, keepdim=True) if scale.ndim else slope.sum()


def straight_through_backward(x: Tensor, scale: Tensor, grad: Tensor, qmin: Ends, qmax: Ends) -> Tensor:
    """Return ``grad`` where the rounded x lies on the grid, both ends included, and 0 elsewhere, in the shape of x.

    Shapes are those of ``grid_codes``: x and ``grad`` (rows, n), ends whole numbers or of the scale's shape.
    """
    code = torch.div(widened(x), scale).round_()
    grad = grad.to(code.dtype)
    if isinstance(qmin, Tensor):
        # _strictly_inside takes ends that are numbers, not tensors.
        return torch.where((code >= qmin) & (code <= qmax), grad, 0).to(x.dtype)
    # For whole numbers, from qmin to qmax is the same as strictly between qmin - 1 and qmax + 1.
    return _strictly_inside(grad, code, qmin - 1, qmax + 1).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return x (of any shape) in float32 if it is float16 or bfloat16, else x as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Kernels(NamedTuple):
    """The functions that quantizers compute with: those of this file, eager or compiled."""

    fake_quantize: Callable[..., Tensor] = fake_quantize
    integer_codes: Callable[..., Tensor] = integer_codes
    lsq_backward: Callable[..., tuple[Tensor, Tensor]] = lsq_backward
    straight_through_backward: Callable[..., Tensor] = straight_through_backward


EAGER = Kernels()
CHOICES = ("auto", "eager", "compiled")
# Rounded elements of a run from which on "auto" compiles on a CPU: compiling takes half a minute, and saves about 1 ns
# for each element that is rounded in a training step.
LONG_RUN = 1e11


@functools.cache
def compiled() -> Kernels:
    """Return the kernels compiled by inductor, which compiles at the first use with each dtype.

    Their results are those of the eager kernels up to float rounding.
    """
    return Kernels(*(_on_flat(torch.compile(function, dynamic=True)) for function in EAGER))


def _on_flat(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``kernel`` with flat tensors where one scale serves all, and reshapes the result.

    Flat tensors have one dimension whatever the layer, so that one compilation serves every shape.
    """

    def call(x: Tensor, scale: Tensor, *rest: Any) -> Any:
        """Return the kernel's result in the shape of x, which is any shape, or (rows, n) with ``scale`` (rows, 1)."""
        flat = (lambda tensor: tensor) if scale.ndim else (lambda tensor: tensor.reshape(-1))
        # torch compiles anew for every mixture of autograd, autocast and views, and gives up after eight. With detached
        # tensors and without autocast there is only one mixture.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            others = (flat(value).detach() if isinstance(value, Tensor) else value for value in rest)
            result = kernel(flat(x).detach(), scale.detach(), *others)
        return (result[0].view(x.shape), result[1]) if isinstance(result, tuple) else result.view(x.shape)

    return call


def choose(asked: str, device: torch.device, elements: float) -> str:
    """Return "eager" or "compiled": what ``asked`` stands for on ``device`` in a run that rounds so many ``elements``.

    Raises UserError for another word, and for compiled where nothing can compile.
    """
    if asked not in CHOICES:
        raise UserError(f"quant.kernels={asked} is unknown{nearest(asked, CHOICES)}; there are {', '.join(CHOICES)}.")
    too_short = asked == "auto" and device.type == "cpu" and elements < LONG_RUN
    if asked == "eager" or too_short:
        return "eager"
    missing = _missing_compiler(device)
    if asked == "compiled" and missing:
        raise UserError(
            f"quant.kernels=compiled needs {missing}, which is not here: install it, or set quant.kernels=eager."
        )
    return "eager" if missing else "compiled"


def _missing_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if find_spec("triton") else "triton"
    # The imports are local, because inductor takes seconds and only a run that may compile needs it.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return None if shutil.which(get_cpp_compiler()) else "a C++ compiler"
    except InvalidCxxCompiler:
        return "a C++ compiler"
