"""How much memory a step takes, counted without allocating any."""

import torch
from torch import Tensor, nn


def on_meta(
    model: nn.Module, batch_size: int, image_size: int, dtype: torch.dtype, channels: int = 3
) -> tuple[dict[str, Tensor], Tensor]:
    """The model's state as it would be in `dtype`, and a batch of images, both without memory, for functional_call."""

    def meta(t: Tensor) -> Tensor:
        like = torch.empty_like(t, device="meta", dtype=dtype if t.dim() >= 2 else t.dtype)
        return like.requires_grad_(t.requires_grad)

    state = {name: meta(t.detach()) for name, t in model.named_buffers()}
    state |= {name: meta(t) for name, t in model.named_parameters()}
    images = torch.empty(batch_size, channels, image_size, image_size, dtype=dtype, device="meta")
    return state, images.to(memory_format=torch.channels_last)


def activation_bytes(model: nn.Module, batch_size: int, image_size: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps from forward for backward, images included, parameters not.

    One forward on the meta device, with `model`'s weights (left alone, wherever they are) as they would be in `dtype`.
    An estimate from below: the gradients that backward holds at a time, cuDNN's workspaces and the allocator's rounding
    come on top.
    """
    state, images = on_meta(model, batch_size, image_size, dtype)
    saved: dict[int, torch.UntypedStorage] = {}  # by identity; held, so that no identity is given out twice

    def pack(t: Tensor) -> Tensor:
        saved[id(t.untyped_storage())] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch.func.functional_call(model, state, images)
    for t in state.values():
        saved.pop(id(t.untyped_storage()), None)
    return sum(storage.nbytes() for storage in saved.values())
