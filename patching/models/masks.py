"""Attention with a mask, where who computes it may know none."""

import functools
import logging
from collections.abc import Callable

import comfy.ldm.modules.attention as attention
import torch

Tensor = torch.Tensor

LEAST = 0.1  # of a mask's values: one that says less may round to no difference


class MaskCheck:
    """Whether another node's attention, in the slot for all of a model's attentions, heeds masks. SageAttention's
    kernels leave them out without a word: found out once a run, by the first mask that says something.
    """

    is_heedless: bool | None = None  # None: not known yet

    def attend(self, attend: Callable[[Tensor | None], Tensor], mask: Tensor) -> Tensor | None:
        """What the other node's attention makes of a mask; None where it leaves masks out. attend: it, on the tensors
        at hand. mask: added to the logits.
        """
        if self.is_heedless:
            return None
        found = attend(mask)
        if self.is_heedless is None and mask.abs().max() > LEAST:
            self.is_heedless = torch.equal(found, attend(None))
            if self.is_heedless:
                say_left_out("another node's attention (SageAttention and its kin)", "ComfyUI's own attention")
                return None
        return found


def knows_masks(function: Callable) -> bool:
    """Whether an attention of ComfyUI's can have a mask. Flash attention cannot, and would say so at every call."""
    return getattr(function, "__wrapped__", function) is not _FLASH


_FLASH = getattr(attention.attention_flash, "__wrapped__", attention.attention_flash)


@functools.cache
def say_left_out(who: str, instead: str) -> None:
    logging.info("Montage: %s supports no attention masks; %s is used where one is needed.", who, instead)


def with_pytorch() -> Callable:
    """PyTorch's attention in the place of flash attention, which the log says once."""
    say_left_out("flash attention", "PyTorch attention")
    return attention.attention_pytorch
