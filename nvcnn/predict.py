"""What pictures show: the likeliest classes of each, by the weights of a run or of a file.

A picture is decoded, cropped and resized as evaluation does it with Pillow, so its first class is what eval.py counts.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nvcnn.data.batch import prepare_input
from nvcnn.data.class_folders import SUFFIXES, image_files
from nvcnn.data.crops import middle
from nvcnn.data.options import EvaluationOptions
from nvcnn.data.pillow import decode, require_pillow, undecodable
from nvcnn.distributed import Transport
from nvcnn.evaluate import find_weights
from nvcnn.files import to_read
from nvcnn.machine import use_device
from nvcnn.models import ORIGINS
from nvcnn.models.layers import cast_matrices, image_channels
from nvcnn.plan import describe_images
from nvcnn.program import InputError, Launch
from nvcnn.settings import Prediction
from nvcnn.weights import Weights, load_model

Classes = list[tuple[int, float]]  # numbers and probabilities, the likeliest first


def predict(asked: Prediction) -> int:
    """Prints the likeliest classes of each picture, in order. Returns the exit code: 1 if one could not be used."""
    with redirect_stdout(sys.stderr):  # a checkpoint that is passed over is no result
        weights = find_weights(asked)
    preprocessing = asked.prepared(weights.origin.preprocessing)
    asked.check_images(weights.model)
    require_pillow()
    model, notes = load_model(weights)
    device, threads = use_device(Transport(Launch()))
    model = cast_matrices(model.to(device), weights.dtype).eval()
    if not (asked.json or asked.csv):
        print(f"Weights:     {weights}", *(f"  {note}" for note in notes), sep="\n")
        print(*describe_images(weights.model, preprocessing, weights.origin.options), sep="\n", end="\n\n")
    options = EvaluationOptions(
        batch_size=asked.batch_size,
        image_size=preprocessing.image_size,
        crop=preprocessing.eval_crop,
        aspect=preprocessing.eval_aspect,
        interpolation=preprocessing.eval_interpolation,
        rank=0,
        ranks=1,
        device=device,
        threads=threads,
    )
    classify = partial(likeliest, model, dtype=weights.dtype, normalize=preprocessing.normalize, top=asked.top)
    write, bad = writer(asked, class_names(weights)), 0
    for path, answer in answers(list(listed(asked.images)), options, classify):
        if isinstance(answer, str):
            bad += 1
            print(answer, file=sys.stderr, flush=True)
        else:
            write(str(path), answer)
            sys.stdout.flush()
    return 1 if bad else 0


def listed(given: Iterable[str]) -> Iterator[Path | str]:
    """Yields the pictures in order, those of a folder sorted. A folder without any is a line that says so."""
    for path in map(Path, given):
        if not path.is_dir():
            yield path
            continue
        try:
            images, others = image_files(path, ".", SUFFIXES)
        except InputError as error:
            yield str(error)
            continue
        except OSError as error:
            yield f"{error.filename}: cannot be listed ({error.strerror})"
            continue
        if others:
            print(f"{path}: {others} files are left out, whose names are not those of images", file=sys.stderr)
        yield from (path / image for image in images)
        if not images:
            yield f"{path}: holds no images (*{', *'.join(SUFFIXES)})"


def answers(
    files: list[Path | str], options: EvaluationOptions, classify: Callable[[Tensor], list[Classes]]
) -> Iterator[tuple[Path | str, Classes | str]]:
    """Yields each picture with its classes, or with a line that says why it has none."""
    with ThreadPoolExecutor(options.threads) as pool:
        for at in range(0, len(files), options.batch_size):
            batch = files[at : at + options.batch_size]
            shown = list(pool.map(partial(pixels, options=options), batch))
            images = [image for image in shown if isinstance(image, Tensor)]
            found = iter(classify(torch.stack(images).to(options.device)) if images else ())
            for path, image in zip(batch, shown, strict=True):
                not_finite = f"{path}: the network's output for it is not finite"
                yield path, image if isinstance(image, str) else next(found) or not_finite


def pixels(path: Path | str, options: EvaluationOptions) -> Tensor | str:
    """Returns what evaluation shows of a picture, or a line that says why it cannot be used; of a line itself."""
    if isinstance(path, str):
        return path
    try:
        return middle(decode(to_read(path).read_bytes()), options)
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    except ValueError as error:
        return undecodable(str(path), str(error))


@torch.no_grad()
def likeliest(model: nn.Module, images: Tensor, dtype: torch.dtype, normalize: str, top: int) -> list[Classes]:
    """Returns the classes of each of the images, (N, H, W, 3) uint8; an empty list where logits are not finite."""
    flip = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    channels = image_channels(model, images.device)
    logits = model(prepare_input(images, flip, dtype=dtype, normalize=normalize, channels=channels))
    best = logits.topk(min(top, logits.shape[1]))
    shares = (best.values - logits.logsumexp(1, keepdim=True)).exp()
    finite = logits.isfinite().all(1).tolist()
    rows = zip(best.indices.tolist(), shares.tolist(), finite, strict=True)
    return [list(zip(numbers, row, strict=True)) if good else [] for numbers, row, good in rows]


def class_names(weights: Weights) -> tuple[str, ...]:
    """Returns the classes by number, an empty tuple if they are not known. Published weights have ImageNet's."""
    if weights.class_names or weights.publisher not in ORIGINS or weights.num_classes != 1000:
        return weights.class_names
    try:
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch
        print("Classes are numbers: ImageNet's names come with torchvision, pip install torchvision", file=sys.stderr)
        return ()
    return tuple(AlexNet_Weights.DEFAULT.meta["categories"])


def writer(asked: Prediction, names: tuple[str, ...]) -> Callable[[str, Classes], None]:
    """Returns what prints a picture's classes: as JSON, as CSV, or for people."""

    def write_json(path: str, classes: Classes) -> None:
        keys = ("class", "name", "probability")
        found = [dict(zip(keys, (n, names[n] if names else None, p), strict=True)) for n, p in classes]
        print(json.dumps({"image": path, "classes": found}))

    def write_csv(path: str, classes: Classes) -> None:
        rows.writerows((path, rank, n, names[n] if names else "", p) for rank, (n, p) in enumerate(classes, 1))

    def write_text(path: str, classes: Classes) -> None:
        print(path, *(f"  {100 * p:6.2f} %  {names[n] if names else f'class {n}'}" for n, p in classes), sep="\n")

    if asked.csv:
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow(("image", "rank", "class", "name", "probability"))
    return write_json if asked.json else write_csv if asked.csv else write_text
