"""Attention by a kernel of torch's, of one example, with its log-sum-exps.

Kernels are called below ``scaled_dot_product_attention``, which neither takes nor returns log-sum-exps. The heads of a
group are the heads of a call and the key/value heads its batch: keys and values are then views, repeated by a stride
of zero, and a mask is shared by all heads.

Shapes: K key/value heads, G query heads of each, H head dim; s rows, R keys.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import pad

from tokenseek.decoder.device import kind_of
from tokenseek.errors import UserError

_aten = torch.ops.aten


def is_served(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether there are kernels that give their log-sum-exp for tensors such as these."""
    return _kernels(query) is not None and key.shape[-1] == value.shape[-1] and key.dtype == value.dtype == query.dtype


class Kernel(Protocol):
    """Attention of one example by a kernel of torch's, with its log-sum-exp.

    Queries, outputs and their gradients are [K, G, s, H], log-sum-exps (natural, of scaled scores) [K, G, s], keys,
    values and their gradients [K, R, H], masks [s, R] or None.
    """

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""

    @staticmethod
    def add_gradients(
        dquery: torch.Tensor,
        dkey: torch.Tensor,
        dvalue: torch.Tensor,
        grad: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        """Add the gradients to `dquery`, `dkey` and `dvalue`, in place."""


class _CpuFlash:
    """Heads of a group are taken as more rows of one head: blocks of keys are loaded once for all of them."""

    # Rows of one call in the backward pass, which copies them.
    ROWS = 128

    @classmethod
    def forward(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            cls._packed(query), key[None], value[None], attn_mask=cls._packed_mask(mask, query), scale=scale
        )
        return out.view(query.shape), lse.squeeze(0).unflatten(1, query.shape[1:3])

    @classmethod
    def add_gradients(
        cls,
        dquery: torch.Tensor,
        dkey: torch.Tensor,
        dvalue: torch.Tensor,
        grad: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        # In the plan of a GPU, whose kernels take all rows at once, it stands for them.
        count = cls.ROWS if kind_of(query.device) == "cpu" else max(1, query.shape[2])
        for first in range(0, query.shape[2], count):
            rows = slice(first, first + count)
            query_s = query[:, :, rows]
            dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                cls._packed(grad[:, :, rows]), cls._packed(query_s), key[None], value[None],
                cls._packed(out[:, :, rows]), cls._packed(lse[:, :, rows]), 0.0, False,
                attn_mask=None if mask is None else cls._packed_mask(mask[rows], query_s), scale=scale,
            )  # fmt: skip
            dquery[:, :, rows] += dq.squeeze(0).unflatten(1, query_s.shape[1:3])
            dkey += dk.squeeze(0)
            dvalue += dv.squeeze(0)
            del dq, dk, dv  # before the next call makes such

    @staticmethod
    def _packed(x: torch.Tensor) -> torch.Tensor:
        """[1, K, G * s, ..]"""
        return x.flatten(1, 2)[None]

    @staticmethod
    def _packed_mask(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
        return None if mask is None else mask.repeat(query.shape[1], 1)


class _CudaFlash:
    """In 16 bits, without a mask."""

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (_repeated(x, query) for x in (key, value))
        output, logsumexp, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return output, logsumexp

    @staticmethod
    def add_gradients(
        dquery: torch.Tensor,
        dkey: torch.Tensor,
        dvalue: torch.Tensor,
        grad: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        key, value = (_repeated(x, query) for x in (key, value))
        # Random state, which is of dropout alone.
        seed, offset = (torch.empty(n, dtype=torch.uint64, device=query.device) for n in (2, ()))
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, False,
            seed, offset, scale=scale,
        )  # fmt: skip
        dquery += dq
        dkey += _summed(dk)
        dvalue += _summed(dv)


class _CudaEfficient:
    """In any precision but float64. Its log-sum-exps are filled up to a multiple of 32 rows."""

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bias = None if mask is None else mask.expand(*query.shape[:2], *mask.shape)
        key, value = (_repeated(x, query) for x in (key, value))
        out, lse, _, _ = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
        return out, lse[:, :, : query.shape[2]]

    @staticmethod
    def add_gradients(
        dquery: torch.Tensor,
        dkey: torch.Tensor,
        dvalue: torch.Tensor,
        grad: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        bias = None if mask is None else mask.expand(*query.shape[:2], *mask.shape)
        key, value = (_repeated(x, query) for x in (key, value))
        lse = pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
        seed = offset = torch.empty((), dtype=torch.int64, device=query.device)
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, bias, out, lse, seed, offset, 0.0, [True, True, True, False], scale=scale
        )
        dquery += dq
        dkey += _summed(dk)
        dvalue += _summed(dv)


def _repeated(x_KRH: torch.Tensor, like_KGsH: torch.Tensor) -> torch.Tensor:
    """[K, G, R, H]: a view."""
    return x_KRH[:, None].expand(-1, like_KGsH.shape[1], -1, -1)


def _summed(x_KGRH: torch.Tensor) -> torch.Tensor:
    return x_KGRH.squeeze(1) if x_KGRH.shape[1] == 1 else x_KGRH.sum(1)


def require_kernels(query: torch.Tensor) -> tuple[type[Kernel], type[Kernel]]:
    kernels = _kernels(query)
    if kernels is None:
        raise UserError(
            f"no attention kernel gives its log-sum-exp for {query.dtype} on {query.device} and heads of "
            f"{query.shape[-1]} channels: ask is_served first."
        )
    return kernels


def _kernels(query: torch.Tensor) -> tuple[type[Kernel], type[Kernel]] | None:
    """Of attention without and with a mask; None where there are none."""
    device, dtype, head_dim = query.device.type, query.dtype, query.shape[-1]
    if device == "cpu":
        return _CpuFlash, _CpuFlash
    if device == "cuda" and torch.version.hip is None and dtype != torch.float64 and head_dim % 8 == 0:
        # Its backward pass for wider heads is not on every GPU.
        is_flash = dtype in (torch.float16, torch.bfloat16) and head_dim <= 192
        is_flash = is_flash and torch.cuda.get_device_capability(query.device) >= (8, 0)
        return (_CudaFlash if is_flash else _CudaEfficient), _CudaEfficient
    return None
