"""The estimate against a sum by hand and against what autograd keeps in a real forward on the CPU."""

import pytest
import torch

from nvcnn.memory import activation_bytes
from nvcnn.models import build_model
from nvcnn.models.layers import cast_matrices

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


@dtypes
def test_lenet_by_hand(dtype):
    values = 3 * 28 * 28 + 32 * 28 * 28 + 32 * 14 * 14 + 64 * 14 * 14 + 64 * 7 * 7 + 512
    indices = 32 * 14 * 14 + 64 * 7 * 7  # of max pooling, int64
    expected = 5 * (values * dtype.itemsize + indices * 8)
    assert activation_bytes(build_model("lenet", num_classes=10, seed=1), 5, 28, dtype) == expected


def kept(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward keeps alive beyond model, images and logits, found in the graph itself, plus the images."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages, todo, visited = {}, [model(x).grad_fn], set()
    while todo:
        node = todo.pop()
        if node in visited:
            continue
        visited.add(node)
        todo += [n for n, _ in node.next_functions if n is not None]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for t in (*saved, *getattr(node, "saved_tensors", ())):  # of PyTorch's own operators, and of custom ones
            if isinstance(t, torch.Tensor):
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
    return sum(s.nbytes() for pointer, s in storages.items() if pointer not in known)


@pytest.mark.parametrize(("name", "dtype"), [("resnet18", torch.float32), ("resnet50", torch.bfloat16)])
def test_is_what_autograd_keeps_on_the_cpu(name, dtype):
    model = build_model(name, num_classes=10, seed=1)
    estimate = activation_bytes(model, 2, 64, dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype).to(memory_format=torch.channels_last)
    assert estimate == kept(cast_matrices(model, dtype), x)


def test_leaves_the_model_alone():
    model = build_model("resnet18", num_classes=10, seed=1)
    before = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    activation_bytes(model, 4, 64, torch.float16)
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        assert value.dtype == before[key].dtype, key
        assert torch.equal(value, before[key]), key
