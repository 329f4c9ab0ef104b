"""What a run will be: all that follows from its settings, its data and the number of ranks."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from kernels.cross_entropy import MAX_CLASSES
from nvcnn.cuda_graph import why_not
from nvcnn.data.dataset import Dataset, find_dataset
from nvcnn.kernel_choices import use
from nvcnn.machine import chosen_kernels, compute_dtype
from nvcnn.meta import activation_bytes
from nvcnn.models import MODELS, Origin, Preprocessing, build_model
from nvcnn.models.layers import Conv2d, freeze_backbone
from nvcnn.optimizer.schedule import MOST_STEPS
from nvcnn.program import InputError
from nvcnn.settings import MOST_PIXELS, Settings, as_json
from nvcnn.weights import Weights, fit

SYNTHETIC_CLASSES = 1000


@dataclass(frozen=True)
class Plan:
    ranks: int
    images: int  # per epoch, of all ranks
    total_batch: int
    steps_per_epoch: int
    steps: int
    num_classes: int
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing
    options: dict[str, Any]  # what the model is built with, beside its number of classes
    learning_rate: float
    dtype: torch.dtype
    momentum_dtype: torch.dtype
    no_graph: str  # why the step is no CUDA graph; empty if it is one


def find_training_data(settings: Settings) -> Dataset | None:
    """Returns the data set of --data_dir; None without one, which is synthetic data. Raises as `find_dataset`."""
    if settings.data_dir is None:
        return None
    return find_dataset(
        settings.data_dir,
        num_classes=settings.num_classes,
        label_base=settings.label_base,
        split="train",
        lenient=settings.skip_bad_images,
    )


def plan(settings: Settings, dataset: Dataset | None, ranks: int, origin: Origin | None = None) -> Plan:
    """Returns what follows from these. origin: of the weights that training begins with; None: the model's own.

    Raises InputError when the data set is smaller than a total batch, for --cuda_graph=on where it cannot be, and for
    more classes, steps or pixels than there can be.
    """
    total_batch = settings.batch_size * ranks * settings.accumulate
    images = dataset.count("train") if dataset else settings.num_batches * total_batch
    if images < total_batch:
        raise InputError(
            f"--data_dir={settings.data_dir}: {images} training images are fewer than one total batch of {total_batch} "
            f"({ranks} ranks x --batch_size={settings.batch_size}{times(settings)}): lower --batch_size"
        )
    steps_per_epoch = images // total_batch
    model = MODELS[settings.model]
    own = origin or Origin(Preprocessing(model.image_size), {})
    options = {option: value for option, value in own.options.items() if option != "aux"}  # heads are this run's own
    preprocessing = settings.prepared(own.preprocessing)
    num_classes = dataset.num_classes if dataset else settings.num_classes or SYNTHETIC_CLASSES
    steps = settings.num_batches if settings.num_epochs is None else settings.num_epochs * steps_per_epoch
    flag = "num_batches" if settings.num_epochs is None else "num_epochs"
    if steps > MOST_STEPS:
        raise InputError(f"--{flag}={getattr(settings, flag)}: {steps} steps: must be at most {MOST_STEPS}")
    if num_classes > MAX_CLASSES:
        where = f"--data_dir={settings.data_dir}" if dataset else f"--num_classes={num_classes}"
        raise InputError(f"{where}: {num_classes} classes: must be at most {MAX_CLASSES}")
    if settings.batch_size * preprocessing.image_size**2 >= MOST_PIXELS:
        side = preprocessing.image_size
        raise InputError(f"--batch_size={settings.batch_size}: too many images of {side} x {side} pixels: lower it")
    return Plan(
        ranks=ranks,
        images=images,
        total_batch=total_batch,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        num_classes=num_classes,
        class_names=dataset.class_names if dataset else None,
        preprocessing=preprocessing,
        options=options | {flag: True for flag, given in settings.model_flags.items() if given},
        learning_rate=settings.learning_rate or model.learning_rate(total_batch),
        dtype=compute_dtype(settings.fp16, settings.bf16),
        momentum_dtype=torch.bfloat16 if settings.momentum_dtype == "bf16" else torch.float32,
        no_graph=why_not(
            settings.cuda_graph,
            gpu=torch.cuda.is_available(),
            kernels=chosen_kernels(),
            ranks=ranks,
            transport=settings.transport,
        ),
    )


def describe(settings: Settings, run: Plan) -> list[str]:
    """Returns the lines a run starts with, as the original's."""
    dtype = str(run.dtype).removeprefix("torch.")
    slow = run.dtype != torch.float32 and not torch.cuda.is_available()
    return [
        f"Num ranks:   {run.ranks}",
        f"Num images:  {run.images if settings.data_dir else 'Synthetic'}",
        f"Model:       {settings.model}",
        *describe_images(settings.model, run.preprocessing, run.options),
        f"Batch size:  {settings.batch_size} per device{times(settings)}, {run.total_batch} total",
        f"Data type:   {dtype}",
        *[f"  {dtype} on a CPU is for trying things out: it can be slow"] * slow,
        f"Steps:       {run.steps}",
        f"CUDA graph:  {f'none: {run.no_graph}' if run.no_graph else 'the whole step'}",
    ]


def times(settings: Settings) -> str:
    """Returns in words how many batches a step has, if it is not one."""
    return f" x --accumulate={settings.accumulate}" * (settings.accumulate > 1)


def describe_images(model: str, preprocessing: Preprocessing, options: dict[str, Any]) -> list[str]:
    """Returns a line for what is not as nvcnn_hvd.py has it: how images are prepared, what the model is built with."""
    built = ", ".join(f"{option}={value}" for option, value in options.items() if value)
    return [
        *[f"Images:      {preprocessing}"] * (preprocessing != Preprocessing(MODELS[model].image_size)),
        *[f"Built with:  {built}"] * bool(built),
    ]


def initial_model(settings: Settings, run: Plan, weights: Weights | None) -> tuple[nn.Module, list[str]]:
    """Returns the model that training begins with, and lines that say so. weights: on rank 0, those of --init.

    Raises InputError unless they fit.
    """
    options = run.options | {"zero_gamma": settings.zero_gamma}
    model = build_model(settings.model, num_classes=run.num_classes, seed=settings.seed, **options)
    lines = []
    if weights:
        lines = [f"Weights:     {weights}", *(f"  {line}" for line in fit(model, weights, run.class_names))]
    if settings.freeze == "backbone":
        freeze_backbone(model)
        trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        lines.append(f"Frozen:      weights and statistics of all but {', '.join(sorted(trained))}")
    return model, lines


def dry_run(settings: Settings, run: Plan, weights: Weights | None = None) -> None:
    """Prints the resolved settings, steps, parameter count and a memory estimate."""
    model, lines = initial_model(settings, run, weights)
    if settings.conv != "auto":  # else torch's, which keep the most
        use(model, {name: settings.conv for name, module in model.named_modules() if isinstance(module, Conv2d)})
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Master weight, momentum, and 4 bytes of gradient, or 2 of gradient and 2 of model weight; and a sum of gradients.
    state = trained * (4 + run.momentum_dtype.itemsize + 4 + 4 * (settings.accumulate > 1))
    state += (parameters - trained) * (4 + run.dtype.itemsize)
    activations = activation_bytes(model, settings.batch_size, run.preprocessing.image_size, run.dtype)
    resolved = as_json(settings) | {"learning_rate": run.learning_rate, "num_classes": run.num_classes}
    resolved |= asdict(run.preprocessing)
    print(*(f"--{name}={value}" for name, value in resolved.items()), sep="\n")
    print(*describe(settings, run), *lines, sep="\n")
    print(f"Parameters:  {parameters:,}" + (f", of which {trained:,} are trained" if trained < parameters else ""))
    print(
        f"Memory:      about {(state + activations) / 2**30:.2f} GiB a device: {state / 2**30:.2f} weights and "
        f"optimizer, {activations / 2**30:.2f} activations; cuDNN's workspaces come on top"
    )
