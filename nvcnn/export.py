"""Weights into files for other programs: a state_dict by torchvision's or timm's names, or an ONNX model.

Beside the weights is what belongs to them: network, classes, preprocessing, what the network is built with.
"""

import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import nn

import nvcnn
from nvcnn.checkpoint import write, written_whole
from nvcnn.evaluate import find_weights
from nvcnn.models import EPSILON, Preprocessing
from nvcnn.plan import describe_images
from nvcnn.program import InputError
from nvcnn.settings import Export
from nvcnn.weights import FORMAT, VERSION, Weights, load_model


def export(asked: Export) -> int:
    """Writes the file that was asked for. Returns the exit code."""
    out = Path(asked.out)
    if out.exists():
        raise InputError(f"--out={out}: is there already; remove it, or give another")
    if not out.parent.is_dir():
        raise InputError(f"--out={out}: there is no directory {out.parent}; make it, or give another")
    weights = find_weights(asked)
    preprocessing = asked.prepared(weights.origin.preprocessing)
    asked.check_images(weights.model)
    model, lines = load_model(weights)
    told = description(weights, preprocessing)
    try:
        content = serialized(model.eval(), told, asked.format, asked.fold)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise InputError(f"--format={asked.format}: needs the package {name}: pip install {name}") from None
    try:
        with written_whole(out, f".{out.name}.part") as file:  # other exports may write beside it
            file.write(content)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written ({error.strerror})") from None
    print(f"Weights:     {weights}", *(f"  {line}" for line in lines), sep="\n")
    print(*describe_images(weights.model, preprocessing, told["options"]), sep="\n")
    print(f"Written to {out}")
    return 0


def description(weights: Weights, preprocessing: Preprocessing) -> dict[str, Any]:
    """Returns what the file says of the weights."""
    return {
        "nvcnn": nvcnn.__version__,
        "model": weights.model,
        "num_classes": weights.num_classes,
        "class_names": list(weights.class_names),
        "preprocessing": asdict(preprocessing),
        "options": {"epsilon": EPSILON} | weights.origin.options,
    }


def serialized(model: nn.Module, told: dict[str, Any], format: str, fold: bool) -> bytes:
    """Returns the content of a file of that format. The model is not to be used any more."""
    as_text = {name: json.dumps(value) for name, value in told.items()}
    if format == "torch":
        file = BytesIO()
        write({"format": FORMAT, "version": VERSION, **told, "state_dict": dict(model.state_dict())}, file)
        return file.getvalue()
    if format == "safetensors":
        from safetensors.torch import save

        return save(model.state_dict(), metadata={"format": "pt"} | as_text)
    from nvcnn.onnx_graph import onnx_model

    size, normalize = told["preprocessing"]["image_size"], told["preprocessing"]["normalize"]
    return onnx_model(model, image_size=size, normalize=normalize, fold=fold, metadata=as_text).SerializeToString()
