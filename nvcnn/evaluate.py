"""Evaluation: top-1 and top-5 accuracy over each validation image exactly once, on one rank or many."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvcnn import checkpoint
from nvcnn.check_data import check_data
from nvcnn.check_ranks import check_ranks
from nvcnn.data.backend import choose_backend, open_evaluation
from nvcnn.data.batch import Batch, prepare_input
from nvcnn.data.dali import EvaluationData
from nvcnn.data.dataset import Dataset, find_dataset
from nvcnn.data.epochs import share
from nvcnn.data.pillow_workers import WorkerEvaluationData
from nvcnn.distributed import Transport, connect
from nvcnn.kernel_choices import choose_algorithms
from nvcnn.machine import use_device
from nvcnn.metrics import add_evaluation
from nvcnn.models import Preprocessing
from nvcnn.models.layers import cast_matrices, image_channels
from nvcnn.plan import describe_images
from nvcnn.program import InputError, doing, here, launched, watched
from nvcnn.report import MISTAKES, Tally, check_directory, findings, table
from nvcnn.report import write as write_report
from nvcnn.settings import Chosen, Evaluation
from nvcnn.weights import Weights, load_model, of_checkpoint, read


@torch.no_grad()
def count_hits(
    model: nn.Module, data: Iterable[Batch], dtype: torch.dtype, normalize: str, tally: Tally | None = None
) -> Tensor:
    """Returns images, top-1 hits, top-5 hits of this rank's shard, int64 (3,) on the CPU. tally: sees them all, too.

    An image whose logits are not all finite is no hit; among equal logits topk decides, so that a model that says the
    same of every class does not hit them all.
    """
    model.eval()
    seen, counts = 0, torch.zeros(2, dtype=torch.int64)
    for images, labels, flip in data:
        here.moves += 1
        channels = image_channels(model, images.device)
        logits = model(prepare_input(images, flip, dtype=dtype, normalize=normalize, channels=channels))
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = (best == labels[:, None]) & logits.isfinite().all(1, keepdim=True)
        if tally:
            tally.add(images, labels, logits, best[:, 0])
        seen += len(labels)
        counts = counts.to(hits.device) + torch.stack([hits[:, 0].sum(), hits.sum()])
    return torch.tensor([seen, *counts.tolist()])


def accuracy(counts: Tensor) -> dict[str, Any]:
    """Returns percentages of the summed counts."""
    images, top1, top5 = (int(n) for n in counts)
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": images}


def in_words(result: dict[str, Any], name: str) -> str:
    """Returns what a line says of "Top-1" or "Top-5", with the standard error of a share of that many images."""
    percent = result[name.lower().replace("-", "")]
    error = math.sqrt(percent * (100 - percent) / result["images"])
    return f"{name}: {percent:.3f} % +/- {error:.2f}"


def lines(result: dict[str, Any]) -> list[str]:
    """Returns the original's two lines."""
    return ["-" * 64, *(f"Validation {in_words(result, name)}" for name in ("Top-1", "Top-5")), "-" * 64]


def open_validation(
    dataset: Dataset,
    backend: str,
    preprocessing: Preprocessing,
    batch_size: int,
    transport: Transport,
    device: torch.device,
    threads: int,
) -> EvaluationData | WorkerEvaluationData:
    """Returns this rank's share of the validation images, prepared as the weights want them."""
    return open_evaluation(
        dataset,
        backend,
        batch_size=batch_size,
        image_size=preprocessing.image_size,
        crop=preprocessing.eval_crop,
        aspect=preprocessing.eval_aspect,
        interpolation=preprocessing.eval_interpolation,
        rank=transport.rank,
        ranks=transport.size,
        device=device,
        threads=threads,
    )


def find_weights(asked: Chosen) -> Weights:
    """Returns the weights to evaluate, or to export. Raises InputError if there are none."""
    if asked.checkpoint:
        return read("checkpoint", asked.checkpoint, asked.model, asked.weights_from, asked.ema)
    log_dir = Path(asked.log_dir)
    if not log_dir.is_dir():
        what = f"is a file; give --checkpoint={log_dir}" if log_dir.exists() else "no such directory"
        raise InputError(f"--log_dir={log_dir}: {what}")
    if found := checkpoint.newest(log_dir):
        path, state = found
        if asked.model not in (None, state["model"]):
            raise InputError(f"--model={asked.model}: {path} holds {state['model']}")
        return of_checkpoint(path, state, asked.ema)
    raise InputError(f"--log_dir={log_dir}: no checkpoint there; train first, with the same --log_dir")


def evaluate(asked: Evaluation) -> int:
    """Evaluates weights, prints the result, appends it to metrics.jsonl of --log_dir. Returns the exit code."""
    if asked.report and launched().rank == 0:
        check_directory(Path(asked.report))
    weights = find_weights(asked)
    path, dtype = weights.path, weights.dtype
    preprocessing = asked.prepared(weights.origin.preprocessing)
    asked.check_images(weights.model)
    dataset = find_dataset(
        asked.data_dir,
        num_classes=weights.num_classes,
        label_base=weights.label_base,
        split="validation",
        lenient=asked.skip_bad_images,
        weights=path,
    )
    check_classes(asked.data_dir, dataset.class_names, path, weights.class_names)
    model, notes = load_model(weights)
    transport = connect(asked.transport, asked.rank_timeout)
    check_ranks(transport, asked, dataset, "validation")
    with path.open("rb") as file:
        mine = f"{path} of SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:8]}" if transport.size > 1 else ""
    if len(found := set(transport.gather(mine))) > 1:
        raise InputError(
            f"the ranks found different checkpoints ({', '.join(sorted(found))}): name one that all have, "
            "--checkpoint=FILE"
        )
    if transport.rank == 0:
        notes = [f"Weights:     {weights}", *(f"  {note}" for note in notes)]
        print(*notes, *describe_images(weights.model, preprocessing, weights.origin.options), sep="\n")
        if transport.size > 1:
            print(f"Ranks:       {transport.size}, transport {transport}")
    device, threads = use_device(transport)
    backend = choose_backend(asked.data_backend, device)
    dataset, left_out = check_data(dataset, "validation", "none", asked.skip_bad_images, transport, threads)

    batch_size = min(asked.batch_size, dataset.count("validation"))
    model = cast_matrices(model.to(device), dtype).eval()
    if device.type == "cuda" or asked.conv not in ("auto", "torch"):  # else PyTorch's, as they are
        images = batch_size, preprocessing.image_size
        choices = choose_algorithms(model, asked.conv, images, dtype, device, transport)
        if choices.algorithms and transport.rank == 0:
            print(f"Convolution: {choices}")
    tally = None
    if asked.report or asked.per_class:
        first = share(dataset.count("validation"), transport.rank, transport.size).start
        tally = Tally(first, MISTAKES if asked.report else 0)
    data = open_validation(dataset, backend, preprocessing, batch_size, transport, device, threads)
    with doing("evaluates"), watched(lambda: 0.0):  # there is nothing to save, so nothing else to wait for
        counts = count_hits(model, data, dtype, preprocessing.normalize, tally)
    tallies = transport.gather(tally) if tally else []
    result = summed(counts, transport)
    if left_out:
        result["left_out"] = len(left_out)
    if weights.averaged is not None:
        result["ema"] = weights.averaged
    result |= {"step": weights.step, "checkpoint": str(path)}
    transport.close()
    if transport.rank == 0:
        extra = {}
        if tally:
            by_class = findings(tallies, dataset.class_names or weights.class_names, dataset.num_classes)
        if asked.per_class:
            extra["classes"] = by_class.as_json()
            print(*table(by_class), sep="\n")
        print(*lines(result), sep="\n")
        if asked.log_dir:
            add_evaluation(path.parent, result)
        if asked.report:
            size = f"{preprocessing.image_size} x {preprocessing.image_size}"
            about = {"Network": weights.model, "Weights": str(weights), "Data": asked.data_dir}
            about |= {"Top-1": f"{result['top1']:.3f} %", "Top-5": f"{result['top5']:.3f} %"}
            about |= {"Images": f"{result['images']} of {size} pixels", "Left out": str(len(left_out))}
            report = write_report(Path(asked.report), by_class, about, dataset.source("validation").name)
            print(f"Report written to {report}")
        if asked.json:
            print(json.dumps(result | extra))
    return 0


def check_classes(data_dir: str | None, here: Sequence[str] | None, where: Path | str, there: Sequence[str]) -> None:
    """Raises InputError if a class has another number here than `where` it was trained, as far as both have names."""
    if not here or not there or list(here) == list(there):
        return
    if len(here) != len(there):
        raise InputError(f"--data_dir={data_dir}: {len(here)} classes, but {where} has {len(there)}: give its data")
    n, (mine, its) = next((n, pair) for n, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1])
    raise InputError(f"--data_dir={data_dir}: its class {n} is {mine!r}, but in {where} that is {its!r}: give its data")


def summed(counts: Tensor, transport: Transport) -> dict[str, Any]:
    """Returns the accuracy over the images of all ranks."""
    transport.all_reduce(counts, "evaluation")()
    return accuracy(counts)
