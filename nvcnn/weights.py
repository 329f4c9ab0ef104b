"""Weights to begin with, or to evaluate: from checkpoints, from files of launch/export.py, from torchvision and timm.

Whose they are decides how images are prepared and what the model is built with: `nvcnn.models.ORIGINS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvcnn import checkpoint
from nvcnn.files import SAFETENSORS, from_json, to_read, what_is
from nvcnn.machine import compute_dtype
from nvcnn.models import FLAGS, MODELS, ORIGINS, Origin, Preprocessing, build_model
from nvcnn.models.layers import Classifier
from nvcnn.optimizer.arena import misfit
from nvcnn.program import InputError
from nvcnn.settings import ASPECTS, INTERPOLATIONS, NORMALIZE, check_image_size

FORMAT, VERSION = "nvcnn weights", 1  # of files that launch/export.py writes with torch.save
WRAPPERS = ("state_dict", "model")  # of timm's and torchvision's training scripts
TIMM_VGG = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}


@dataclass(frozen=True)
class Weights:
    """Tensors by the names of `nvcnn.models`, whose they are, and what a run left beside them."""

    path: Path
    publisher: str  # nvcnn, or one of ORIGINS
    model: str
    origin: Origin
    tensors: dict[str, Tensor]
    num_classes: int
    class_names: tuple[str, ...] = ()
    label_base: int | None = None
    dtype: torch.dtype = torch.float32  # in which evaluation computes
    step: int | None = None
    averaged: bool | None = None  # whether they are the moving averages of a checkpoint that has them

    def __str__(self) -> str:
        which = {None: "", True: ", the averaged weights", False: ", not the averaged weights"}[self.averaged]
        return f"{self.path}, {self.publisher}'s {self.model}{which}"


def read(flag: str, file: str, model: str | None, weights_from: str | None, ema: bool = True) -> Weights:
    """Returns the weights in a file. model: as its flag says; what a file of nvcnn says is checked against it.

    ema: see `of_checkpoint`. Raises InputError, which names the flag and the file, for what cannot be read, and where
    it is not told whose the weights are.
    """
    path = Path(file)
    try:
        if path.is_dir():
            run = f", or --log_dir={path} for its newest checkpoint" * (flag == "checkpoint")
            raise InputError(f"{path}: is a directory; give a file in it{run}")
        if path.suffix == ".safetensors" or what_is(path) == SAFETENSORS:
            content, told = read_safetensors(path)
        else:
            content, told = read_torch(path)
        if told is None:
            return foreign(path, content, model, weights_from)
        if weights_from not in (None, "nvcnn"):
            raise InputError(f"{path}: is nvcnn's own, not --weights_from={weights_from}; leave that flag out")
        try:
            own = (
                of_checkpoint(path, told, ema)
                if told.get("format") == checkpoint.FORMAT
                else exported(path, told, content)
            )
            check_description(own)
        except InputError:
            raise
        except Exception:  # what a stranger has written there can be anything
            raise InputError(f"{path}: its description is damaged; write the file anew") from None
        if model not in (None, own.model):
            raise InputError(f"{path}: holds {own.model}, not --model={model}")
        return own
    except InputError as error:
        raise InputError(f"--{flag}={error}") from None


def read_torch(path: Path) -> tuple[Any, dict[str, Any] | None]:
    """Returns what torch.save wrote, and if that was nvcnn what it says of itself."""
    content = checkpoint.read(path, mmap=True)
    kind = content.get("format") if isinstance(content, dict) else None
    if kind == checkpoint.FORMAT:
        return None, checkpoint.check(path, content)
    if kind == FORMAT:
        return content.get("state_dict", {}), checkpoint.check(path, content, FORMAT, VERSION)
    return content, None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Returns the tensors of a file of that format, and if nvcnn wrote it what it says of itself."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(f"{path}: needs the package safetensors: pip install safetensors") from None
    try:
        with safe_open(to_read(path), "pt") as file:
            told = file.metadata() or {}
            own = {k: from_json(v) for k, v in told.items() if k != "format"} if "nvcnn" in told else None
            return {name: file.get_tensor(name) for name in file.keys()}, own  # noqa: SIM118 (it is no dictionary)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]})") from None


def of_checkpoint(path: Path, state: dict[str, Any], ema: bool = True) -> Weights:
    """Returns the weights of a checkpoint. ema: where it has moving averages of them, these."""
    settings = state["settings"]
    return Weights(
        path,
        "nvcnn",
        state["model"],
        checkpoint.origin(state),
        state["ema" if ema and "ema" in state else "weights"],
        state["num_classes"],
        tuple(state["class_names"]),
        settings["label_base"],
        compute_dtype(settings["fp16"], settings["bf16"]),
        int(state["optimizer"]["counters"][0]),
        ema if "ema" in state else None,
    )


def exported(path: Path, told: dict[str, Any], tensors: dict[str, Tensor]) -> Weights:
    """Returns the weights of a file of launch/export.py. `told`: what it says of itself."""
    origin = Origin(Preprocessing(**told["preprocessing"]), told["options"])
    return Weights(path, "nvcnn", told["model"], origin, tensors, told["num_classes"], tuple(told["class_names"]))


def check_description(own: Weights) -> None:
    """Raises InputError, ValueError or what else it stumbles over unless the network that is described can be.

    It is built, and images are prepared, by this description: one with 2**40 classes would take the memory.
    """
    images, options = own.origin.preprocessing, own.origin.options
    chosen = (images.normalize, NORMALIZE), (images.eval_aspect, ASPECTS), (images.eval_interpolation, INTERPOLATIONS)
    numbers = [images.eval_crop, *options.values(), own.label_base or 0]
    if not (
        options.keys() <= {"epsilon", "padding", *FLAGS}
        and all(isinstance(number, int | float) for number in numbers)
        and all(0 <= number < 10 for number in options.values())
        and all(value in values for value, values in chosen)
        and 0 < images.eval_crop <= 1
        and all(isinstance(name, str) for name in own.class_names)
        and all(isinstance(tensor, Tensor) for tensor in own.tensors.values())
        and images.image_size > 0
    ):
        raise ValueError
    try:
        check_image_size(own.model, images.image_size, "image_size")
    except InputError:  # of a flag that nobody gave
        raise ValueError from None
    heads = [own.tensors.get(f"{name}.weight") for name in classifiers(skeleton(own.model, **options))]
    if {len(head) for head in heads if head is not None} != {own.num_classes}:
        raise InputError(f"{own.path}: its weights are not of {own.num_classes} classes, as it says; write it anew")


def foreign(path: Path, content: Any, model: str | None, weights_from: str | None) -> Weights:
    """Returns the weights of a file that does not say whose it is. Raises InputError where names do not, either."""
    if model is None:
        raise InputError(f"{path}: does not say which network it is of; give --model")
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise InputError(f"{path}: not a dictionary of tensors; save the model's state_dict")
    if not content:
        raise InputError(f"{path}: holds no tensors; save the model's state_dict")
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    published = [who for who, models in ORIGINS.items() if model in models]
    possible = ["nvcnn", *published]
    if model.startswith("vgg"):
        published = ["timm" if "head.fc.weight" in tensors else "torchvision"]
        possible = published if published == ["timm"] else ["nvcnn", *published]
        tensors = dict(renamed(name, tensor) for name, tensor in tensors.items())
    if weights_from is None and len(published) != 1:
        who = " and ".join(published) or "nobody"
        raise InputError(
            f"{path}: {who} published {model} by these names, and images are prepared as the weights want it; "
            f"give --weights_from={'|'.join(possible)}"
        )
    publisher = weights_from or published[0]
    if publisher not in possible:
        raise InputError(f"{path}: cannot be {publisher}'s {model}; give --weights_from={'|'.join(possible)}")
    origin = ORIGINS.get(publisher, {}).get(model) or Origin(Preprocessing(MODELS[model].image_size), {})
    (head,) = classifiers(skeleton(model, **origin.options))
    if f"{head}.weight" not in tensors:
        raise InputError(f"{path}: does not fit {model}: the file lacks {head}.weight")
    return Weights(path, publisher, model, origin, tensors, len(tensors[f"{head}.weight"]))


def renamed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Returns a parameter of timm's VGG, where hidden layers are convolutions, as torchvision has it."""
    module, _, kind = name.rpartition(".")
    if module not in TIMM_VGG:
        return name, tensor
    return f"{TIMM_VGG[module]}.{kind}", tensor.flatten(1) if kind == "weight" else tensor


def skeleton(model: str, **options: Any) -> nn.Module:
    """Returns the model without memory, for its names."""
    with torch.device("meta"):
        return build_model(model, num_classes=1, seed=0, **options)


def classifiers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Classifier)]


def fit(model: nn.Module, weights: Weights, class_names: Sequence[str] | None = None) -> list[str]:
    """Copies the weights into a model of that kind. Returns a line for each thing that the model does not have of them.

    A head for other classes than `class_names`, or another number of them, stays as it was drawn. So do auxiliary heads
    that are not in the file; those of the file are left out where the model has none. Raises InputError for anything
    else that does not fit.
    """
    own, given, path = model.state_dict(), dict(weights.tensors), weights.path
    lines = []
    if "aux" in MODELS[weights.model].flags:
        heads = skeleton(weights.model, aux=True).state_dict().keys() - skeleton(weights.model).state_dict().keys()
        if given.keys() & heads and not own.keys() & heads:
            given = {name: tensor for name, tensor in given.items() if name not in heads}
            lines.append(f"auxiliary heads: left out of what {path} has")
        if own.keys() & heads and not given.keys() & heads:
            given |= {name: own[name] for name in heads}
            lines.append(f"auxiliary heads: none in {path}, made anew")
    others = bool(class_names and weights.class_names) and tuple(class_names or ()) != weights.class_names
    for head in classifiers(model):
        there, here = given.get(f"{head}.weight"), own[f"{head}.weight"]
        if there is None or there is here or there.shape[1:] != here.shape[1:]:
            continue
        if others or len(there) != len(here):
            word = " others" * (len(there) == len(here))
            lines.append(f"{head}: {len(there)} classes in {path}, {len(here)}{word} here: made anew")
            given |= {f"{head}.{kind}": own[f"{head}.{kind}"] for kind in ("weight", "bias")}
    for name in own:
        if name.endswith("num_batches_tracked"):  # older files have none, and nothing reads it
            given.setdefault(name, own[name])
    if problem := misfit(own, given):
        raise InputError(f"{path}: does not fit {weights.model}: {problem}")
    for name, value in own.items():
        if value.is_floating_point():
            if not given[name].is_floating_point():
                raise InputError(f"{path}: {name} is {given[name].dtype}; give a file of floating-point weights")
            given[name] = given[name].float()
            if not given[name].isfinite().all():
                raise InputError(f"{path}: {name} has values that are not finite; give another file")
    model.load_state_dict(given)
    return lines


def load_model(weights: Weights) -> tuple[nn.Module, list[str]]:
    """Returns the model of the weights, in fp32 on the CPU, and what `fit` says. Raises InputError as that does."""
    model = build_model(weights.model, num_classes=weights.num_classes, seed=0, **weights.origin.options)
    return model, fit(model, weights)
