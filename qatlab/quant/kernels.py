"""The elementwise arithmetic of rounding, in plain torch or compiled; no autograd here."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatlab.errors import UserError, nearest

# grad where lo < v < hi, else 0, in one pass: a comparison into bools and a product with them take ten times as long on a CPU.
_strictly_inside = torch.ops.aten.hardtanh_backward

# An end of the grid, a whole multiple of the scale: a number, or one for each scale, of the scale's shape.
Ends = int | Tensor


def grid_codes(x: Tensor, scale: Tensor, qmin: Ends, qmax: Ends) -> Tensor:
    """Return x / scale rounded to the nearest even integer and clipped to [qmin, qmax], in x's shape.

    ``scale`` is (), or (rows, 1) or (n,) for x (rows, n). With a zero point z the result is the code less z, and so are
    the ends: clip(round(x / s) + z, lo, hi) - z = clip(round(x / s), lo - z, hi - z).

    bfloat16 and float16 are computed in float32, float64 stays float64. It divides: x * (1 / scale) rounds some ties
    the other way, and the integer runtimes divide too.
    """
    codes = torch.div(widened(x), scale).round_()
    if isinstance(qmin, Tensor) and isinstance(qmax, Tensor):  # clamp with tensors takes six times as long on a CPU
        return torch.minimum(torch.maximum(codes, qmin, out=codes), qmax, out=codes)
    return codes.clamp_(qmin, qmax)  # type: ignore[arg-type]


def fake_quantize(x: Tensor, scale: Tensor, qmin: Ends, qmax: Ends) -> Tensor:
    """Return x on the grid, code times ``scale``, in x's shape and dtype."""
    return grid_codes(x, scale, qmin, qmax).mul_(scale).to(x.dtype)


def integer_codes(x: Tensor, scale: Tensor, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """Return the codes in ``dtype``, int8 or bfloat16: both hold every code of up to 8 bits exactly."""
    return grid_codes(x, scale, qmin, qmax).to(dtype)


def lsq_backward(x: Tensor, scale: Tensor, grad: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return LSQ's gradients to x and, before LSQ's constant factor, to ``scale``; ``grad`` is that of the output.

    With v = x / s strictly inside (qmin, qmax): dx = grad and ds = round(v) - v; else dx = 0 and ds = qmin or qmax
    (Esser 2020, arXiv 1902.08153).
    """
    v = torch.div(widened(x), scale)
    grad = grad.to(v.dtype)
    grad_x = _strictly_inside(grad, v, qmin, qmax).to(x.dtype)
    v_inside = _strictly_inside(v, v, qmin, qmax)
    # Outside, the clipped value is a whole number and v counts for nothing.
    slope = v.clamp_(qmin, qmax).round_().sub_(v_inside).mul_(grad)
    return grad_x, slope.sum(1, keepdim=True) if scale.ndim else slope.sum()


def straight_through_backward(x: Tensor, scale: Tensor, grad: Tensor, qmin: Ends, qmax: Ends) -> Tensor:
    """Return ``grad`` where x's rounded value lies on the grid, both ends included, and 0 elsewhere."""
    code = torch.div(widened(x), scale).round_()
    grad = grad.to(code.dtype)
    if isinstance(qmin, Tensor):
        return torch.where((code >= qmin) & (code <= qmax), grad, 0).to(x.dtype)
    return _strictly_inside(grad, code, qmin - 1, qmax + 1).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return x in float32 if it is float16 or bfloat16, else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Kernels(NamedTuple):
    """The functions above, as they are or compiled; flat inputs, so that one compilation serves every shape."""

    fake_quantize: Callable[..., Tensor] = fake_quantize
    integer_codes: Callable[..., Tensor] = integer_codes
    lsq_backward: Callable[..., tuple[Tensor, Tensor]] = lsq_backward
    straight_through_backward: Callable[..., Tensor] = straight_through_backward


EAGER = Kernels()
CHOICES = ("auto", "eager", "compiled")
# Compiling takes half a minute, and saves about 1 ns on a CPU for each element that is rounded in a training step.
LONG_RUN = 1e11  # elements


@functools.cache
def compiled() -> Kernels:
    """Return the kernels compiled by inductor, at their first use for each dtype; equal to the plain ones to rounding."""
    return Kernels(*(_on_flat(torch.compile(function, dynamic=True)) for function in EAGER))


def _on_flat(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``kernel`` called with flat tensors where one scale serves all, reshaped back after."""

    def call(x: Tensor, scale: Tensor, *rest: Any) -> Any:
        flat = (lambda tensor: tensor) if scale.ndim else (lambda tensor: tensor.reshape(-1))
        # torch compiles anew for every mixture of autograd, autocast and views that it meets, and gives up after eight:
        # here there is only one.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            others = (flat(value).detach() if isinstance(value, Tensor) else value for value in rest)
            result = kernel(flat(x).detach(), scale.detach(), *others)
        return (result[0].view(x.shape), result[1]) if isinstance(result, tuple) else result.view(x.shape)

    return call


def choose(asked: str, device: torch.device, elements: float) -> str:
    """Return eager or compiled: what ``asked`` stands for on ``device`` in a run that rounds so many ``elements``.

    Raises UserError for another word, and for compiled where nothing can compile.
    """
    if asked not in CHOICES:
        raise UserError(f"quant.kernels={asked} is unknown{nearest(asked, CHOICES)}; there are {', '.join(CHOICES)}.")
    if asked == "eager":
        return "eager"
    missing = _missing_compiler(device)
    if asked == "compiled" and missing:
        raise UserError(
            f"quant.kernels=compiled needs {missing}, which is not here: install it, or set quant.kernels=eager."
        )
    if missing or (asked == "auto" and device.type == "cpu" and elements < LONG_RUN):
        return "eager"
    return "compiled"


def _missing_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if find_spec("triton") else "triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return None if shutil.which(get_cpp_compiler()) else "a C++ compiler"
    except InvalidCxxCompiler:
        return "a C++ compiler"
