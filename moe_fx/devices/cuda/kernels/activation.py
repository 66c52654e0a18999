"""``h = act(gate) * (up + shift)`` and its slope, within other kernels: `moe_fx.ops.fused.Body`.

Comparisons are written so that NaN stays NaN, as in ATen.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activated", "sloped"]


@triton.jit
def _act(g, ACT: tl.constexpr, alpha: tl.constexpr):
    if ACT == "silu":
        a = g / (1 + tl.exp(-alpha * g))
    elif ACT == "gelu":
        a = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        a = g / (1 + tl.exp(-2 * inner))
    elif ACT == "relu":
        a = tl.where(g <= 0, 0.0, g)
    elif ACT == "relu2":
        a = tl.where(g <= 0, 0.0, g * g)
    else:
        tl.static_assert(ACT == "none")
        a = g
    return a


@triton.jit
def _slope(g, ACT: tl.constexpr, alpha: tl.constexpr):
    if ACT == "silu":
        s = 1 / (1 + tl.exp(-alpha * g))
        d = s * (1 + alpha * g * (1 - s))
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        d = 0.5 * (1 + tl.erf(g * 0.7071067811865476)) + g * density
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        s = 1 / (1 + tl.exp(-2 * inner))
        d = s + g * 2 * s * (1 - s) * 0.7978845608028654 * (1 + 3 * 0.044715 * g * g)
    elif ACT == "relu":
        d = tl.where(g > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        d = tl.where(g <= 0, 0.0, 2 * g)
    return d


@triton.jit
def activated(
    g,
    u,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    alpha: tl.constexpr,
    LIMITED: tl.constexpr,
    limit: tl.constexpr,
    shift: tl.constexpr,
):
    """Of float32 columns. u: not read where GATED is false."""
    if LIMITED:
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    h = _act(g, ACT, alpha)
    if GATED:
        h = h * (u + shift)
    return h


@triton.jit
def sloped(
    g,
    u,
    grad,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    alpha: tl.constexpr,
    LIMITED: tl.constexpr,
    limit: tl.constexpr,
    shift: tl.constexpr,
):
    """(h, gradient of g, gradient of u) for the gradient of h."""
    within_g = g == g
    within_u = within_g
    if LIMITED:
        within_g = g <= limit
        within_u = tl.abs(u) <= limit
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    a = _act(g, ACT, alpha)
    slope = _slope(g, ACT, alpha) * grad
    if GATED:
        h = a * (u + shift)
        grad_g = slope * (u + shift)
        grad_u = a * grad
    else:
        h = a
        grad_g = slope
        grad_u = slope
    if LIMITED:
        grad_g = tl.where(within_g, grad_g, 0.0)
        grad_u = tl.where(within_u, grad_u, 0.0)
    return h, grad_g, grad_u
