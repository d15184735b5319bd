"""``nn.Conv2d`` by a kernel of im2win_tvm."""

from __future__ import annotations

import torch
import torch.fx
from torch import nn

from .operator import conv2d

__all__ = ["Conv2d"]


class Conv2d(nn.Conv2d):
    """As `torch.nn.Conv2d`, with its arguments, parameters and state; gradients are PyTorch's.

    accuracy: as in `im2win_tvm.compile`. Inputs ``[N, C, H, W]``; one image ``[C, H, W]`` as well.
    Raises ValueError for a padding mode other than zeros and for padding that is not symmetric.
    """

    def __init__(self, *arguments, accuracy: str | None = None, **options):
        super().__init__(*arguments, **options)
        reason = refusal(self)
        if reason is not None:
            raise ValueError(reason)
        self.accuracy, self.frozen = accuracy, False

    @classmethod
    def of(cls, module: nn.Conv2d, accuracy: str | None = None) -> Conv2d:
        """One with the parameters, mode and hooks of `module`, which share memory."""
        reason = refusal(module)
        if reason is not None:
            raise ValueError(reason)
        made = cls.__new__(cls)
        made.__dict__.update(module.__dict__)
        # Hooks stay shared: who placed one may remove it.
        for name in ("_parameters", "_buffers", "_modules"):
            made.__dict__[name] = module.__dict__[name].copy()
        made.accuracy, made.frozen = accuracy, False
        return made

    def freeze(self) -> Conv2d:
        """Weights stay as they are: they are brought into the kernel's order once.

        They need no gradient from now on. Changes by operators of PyTorch, `load_state_dict` among
        them, are seen; changes by way of ``weight.data`` are not. A CUDA graph may go on
        with the weights as they were at its capture: capture it again after a change.
        """
        self.requires_grad_(False)
        self.frozen = True
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _one_or_many(
            input, self.weight, self.bias, self.stride, numbers(self), self.dilation, self.groups,
            self.accuracy, self.frozen,
        )  # fmt: skip

    def extra_repr(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy={self.accuracy!r}"
        return super().extra_repr() + accuracy


@torch.fx.wrap  # symbolic tracing knows no number of dimensions
def _one_or_many(input: torch.Tensor, *rest) -> torch.Tensor:
    """`conv2d` of a batch of images or of one."""
    if input.dim() == 4:
        return conv2d(input, *rest)
    if input.dim() == 3:
        return conv2d(input.unsqueeze(0), *rest).squeeze(0)
    raise RuntimeError(
        f"Conv2d: input of shape {tuple(input.shape)}: allowed are [N, C, H, W] and [C, H, W]"
    )


def numbers(module: nn.Conv2d) -> tuple[int, int]:
    """Its padding, before and after each axis alike."""
    if module.padding == "valid":
        return (0, 0)
    if module.padding == "same":
        spans = zip(module.dilation, module.kernel_size, strict=True)
        return tuple(d * (k - 1) // 2 for d, k in spans)
    return module.padding


def refusal(module: nn.Conv2d) -> str | None:
    """Why Conv2d cannot take a module's place; None if it can."""
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}: allowed is 'zeros'"
    spans = zip(module.dilation, module.kernel_size, strict=True)
    if module.padding == "same" and any(d * (k - 1) % 2 for d, k in spans):
        return (
            f"padding='same', kernel_size={module.kernel_size}, dilation={module.dilation}: "
            "the padding is one more after than before; allowed is as much"
        )
    return None
