"""What a run will be: all that follows from its settings, its data and the number of ranks."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from kernels.cross_entropy import MAX_CLASSES
from nvcnn.cuda_graph import why_not
from nvcnn.data.dataset import Dataset, find_dataset
from nvcnn.data.source import NoSplit
from nvcnn.estimate import LEAST, MEASURED, picture, step_floors, table_of_times
from nvcnn.kernel_choices import use
from nvcnn.machine import chosen_kernels, compute_dtype, slowness
from nvcnn.meta import activation_bytes, check_batch, macs
from nvcnn.models import MODELS, Origin, Preprocessing, build_model
from nvcnn.models.layers import Conv2d, freeze_backbone
from nvcnn.optimizer.schedule import MOST_STEPS, RISE, learning_rates
from nvcnn.program import InputError
from nvcnn.roofline import GPUS, META
from nvcnn.settings import MOST_PIXELS, Settings, as_json, training_sizes
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
    image_sizes: tuple[tuple[int, int], ...]  # in training: an epoch, counted from 0, and the size from then on
    options: dict[str, Any]  # what the model is built with, beside its number of classes
    learning_rate: float
    warmup: float  # steps in which it rises
    dtype: torch.dtype
    momentum_dtype: torch.dtype
    no_graph: str  # why the step is no CUDA graph; empty if it is one

    @property
    def sizes(self) -> list[int]:
        """Returns the sizes of training's images, the first one first, each once."""
        return list(dict.fromkeys(size for _, size in self.image_sizes))

    @property
    def shares(self) -> dict[int, float]:
        """Returns the share of the steps that has images of each size."""
        epochs = self.steps / self.steps_per_epoch
        ends = [*(first for first, _ in self.image_sizes[1:]), epochs]
        found = dict.fromkeys(self.sizes, 0.0)
        for (first, size), end in zip(self.image_sizes, ends, strict=True):
            found[size] += (end - first) / epochs
        return found


def find_training_data(settings: Settings) -> Dataset | None:
    """Returns the data set of --data_dir; None without one, which is synthetic data. Raises as `find_dataset`."""
    return None if settings.data_dir is None else find_split(settings, settings.data_dir, "train")


def find_validation_data(settings: Settings) -> Dataset | None:
    """Returns the data set on which training evaluates; None if it does not, or by default where there is none.

    Raises as `find_dataset`.
    """
    if settings.data_dir is None or settings.eval_every == 0:
        return None
    try:
        return find_split(settings, settings.data_dir, "validation")
    except InputError as error:
        if settings.eval_every is None and isinstance(error, NoSplit):
            return None
        raise InputError(f"{error}; or give --eval_every=0") from None


def find_split(settings: Settings, data_dir: str, split: str) -> Dataset:
    """Returns the data set there after checking that split, with what the flags say of it."""
    return find_dataset(
        data_dir,
        num_classes=settings.num_classes,
        label_base=settings.label_base,
        split=split,
        lenient=settings.skip_bad_images,
    )


def plan(settings: Settings, dataset: Dataset | None, ranks: int, origin: Origin | None = None) -> Plan:
    """Returns what follows from these. origin: of the weights that training begins with; None: the model's own.

    Raises InputError when the data set is smaller than a total batch or of one class, for --cuda_graph=on where it
    cannot be, for a size of images that the run does not come to, and for more classes, steps or pixels than there can
    be.
    """
    total_batch = settings.batch_size * ranks * settings.accumulate
    if dataset:
        images = dataset.count("train")
    else:
        images = settings.num_batches * total_batch if settings.num_epochs is None else settings.num_images or 0
    if images < total_batch:
        where = f"--data_dir={settings.data_dir}" if dataset else "--num_images"
        raise InputError(
            f"{where}: {images} training images are fewer than one total batch of {total_batch} "
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
    if settings.warmup_epochs is None:
        warmup = RISE * steps if settings.schedule == "onecycle" else 0.0
    else:
        warmup = settings.warmup_epochs * steps_per_epoch
    if warmup > steps:
        raise InputError(
            f"--warmup_epochs={settings.warmup_epochs}: the run has {steps / steps_per_epoch:g} epochs: lower it"
        )
    where = f"--data_dir={settings.data_dir}" if dataset else f"--num_classes={num_classes}"
    if num_classes > MAX_CLASSES:
        raise InputError(f"{where}: {num_classes} classes: must be at most {MAX_CLASSES}")
    if num_classes == 1:
        raise InputError(f"{where}: one class is nothing to learn: give images of two or more")
    image_sizes = training_sizes(settings.train_size) if settings.train_size else ((0, preprocessing.training_size),)
    for first, size in image_sizes:
        if first * steps_per_epoch >= steps:
            raise InputError(
                f"--train_size={settings.train_size}: {size} begins after epoch {first}, the run has "
                f"{steps / steps_per_epoch:g}: change one of them"
            )
    preprocessing = preprocessing.trained_at(image_sizes[-1][1])
    evaluates = settings.data_dir is not None and settings.eval_every != 0
    largest = max([size for _, size in image_sizes] + [preprocessing.image_size] * evaluates)
    if settings.batch_size * largest**2 >= MOST_PIXELS:
        raise InputError(
            f"--batch_size={settings.batch_size}: too many images of {largest} x {largest} pixels: lower it"
        )
    return Plan(
        ranks=ranks,
        images=images,
        total_batch=total_batch,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        num_classes=num_classes,
        class_names=dataset.class_names if dataset else None,
        preprocessing=preprocessing,
        image_sizes=image_sizes,
        options=options | {flag: True for flag, given in settings.model_flags.items() if given},
        learning_rate=settings.learning_rate or model.learning_rate(total_batch),
        warmup=warmup,
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
    low = run.dtype != torch.float32 and not torch.cuda.is_available() and not settings.dry_run
    assumed = f"{run.images}, assumed: there is no --data_dir" if settings.num_epochs is not None else "Synthetic"
    images = run.images if settings.data_dir else assumed
    return [
        *[f"Recipe:      {settings.recipe}"] * bool(settings.recipe),
        f"Num ranks:   {run.ranks}",
        f"Num images:  {images}",
        f"Model:       {settings.model}",
        *describe_images(settings.model, run.preprocessing, run.options),
        *[f"Sizes:       {describe_sizes(run)}"] * (len(run.image_sizes) > 1),
        f"Batch size:  {settings.batch_size} per device{times(settings)}, {run.total_batch} total",
        f"Data type:   {dtype}",
        *[f"  {dtype} on this CPU: a convolution takes {slowness(run.dtype):.1f} times as long as in float32"] * low,
        f"Steps:       {run.steps}",
        f"CUDA graph:  {f'none: {run.no_graph}' if run.no_graph else 'the whole step'}",
    ]


def times(settings: Settings) -> str:
    """Returns in words how many batches a step has, if it is not one."""
    return f" x --accumulate={settings.accumulate}" * (settings.accumulate > 1)


def describe_sizes(run: Plan) -> str:
    """Returns the sizes of training's images, each with its epochs, counted from 1."""
    epochs = -(-run.steps // run.steps_per_epoch)
    ends = [*(first for first, _ in run.image_sizes[1:]), epochs]
    return ", ".join(
        f"{size} x {size} in epochs {first + 1} to {end}" if end > first + 1 else f"{size} x {size} in epoch {end}"
        for (first, size), end in zip(run.image_sizes, ends, strict=True)
    )


def describe_images(model: str, preprocessing: Preprocessing, options: dict[str, Any]) -> list[str]:
    """Returns a line for what is not as nvcnn_hvd.py has it: how images are prepared, what the model is built with."""
    built = ", ".join(f"{option}={value}" for option, value in options.items() if value)
    return [
        *[f"Images:      {preprocessing}"] * (preprocessing != Preprocessing(MODELS[model].image_size)),
        *[f"Built with:  {built}"] * bool(built),
    ]


def initial_model(settings: Settings, run: Plan, weights: Weights | None) -> tuple[nn.Module, list[str]]:
    """Returns the model that training begins with, and lines that say so. weights: on rank 0, those of --init.

    Raises InputError unless they fit, and where a BatchNorm would get one value a channel.
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
    for size in run.sizes if settings.batch_size == 1 else ():
        try:
            check_batch(model, 1, size)
        except ValueError as error:
            more = f"raise --batch_size, or --{'train_size' if settings.train_size else 'image_size'}"
            raise InputError(f"--batch_size=1: with images of {size} x {size}, {error}: {more}") from None
    return model, lines


def dry_run(settings: Settings, run: Plan, weights: Weights | None = None) -> None:
    """Prints the resolved settings, steps, parameters, MACs, a memory estimate, learning rates, and the least time."""
    model, lines = initial_model(settings, run, weights)
    if settings.conv != "auto":  # else torch's, which keep the most
        use(model, {name: settings.conv for name, module in model.named_modules() if isinstance(module, Conv2d)})
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # 4 bytes each: master weight; gradient, or 2 of it and 2 of model weight; average of weights; sum of gradients.
    copies = 2 + (settings.ema is not None) + (settings.accumulate > 1)
    state = trained * (4 * copies + run.momentum_dtype.itemsize)
    state += (parameters - trained) * (4 + run.dtype.itemsize)
    activations = max(activation_bytes(model, settings.batch_size, size, run.dtype) for size in run.sizes)
    resolved = as_json(settings) | {"learning_rate": run.learning_rate, "num_classes": run.num_classes}
    train_size = settings.train_size or run.sizes[0]
    resolved |= asdict(run.preprocessing) | {"train_size": train_size, "eval_size": run.preprocessing.image_size}
    print(*(f"--{name}={value}" for name, value in resolved.items()), sep="\n")
    print(*describe(settings, run), *lines, sep="\n")
    print(f"Parameters:  {parameters:,}" + (f", of which {trained:,} are trained" if trained < parameters else ""))
    print(
        f"Memory:      about {(state + activations) / 2**30:.2f} GiB a device: {state / 2**30:.2f} weights and "
        f"optimizer, {activations / 2**30:.2f} activations; cuDNN's workspaces come on top"
    )
    print(*estimates(settings, run), sep="\n")


def estimates(settings: Settings, run: Plan) -> list[str]:
    """Returns the lines of a dry run for what is computed: MACs, the learning rates, how long it takes at least."""
    batch_size, accumulate = settings.batch_size, settings.accumulate

    def build() -> nn.Module:
        model = build_model(settings.model, num_classes=run.num_classes, seed=settings.seed, **run.options)
        if settings.freeze == "backbone":
            freeze_backbone(model)
        return model

    with META:
        model = build().eval()
    counts = ", ".join(f"{macs(model, size) / 1e9:.4g} G ({size} x {size})" for size in run.sizes)
    rates = learning_rates(settings.schedule, run.learning_rate, run.steps, run.warmup)
    each = {size: step_floors(build, size, batch_size, run.dtype, settings.conv, accumulate) for size in run.sizes}
    floors = {gpu.name: sum(share * each[size][gpu.name] for size, share in run.shares.items()) for gpu in GPUS}
    plain = (
        settings.conv == "auto"
        and accumulate == 1
        and settings.freeze == "none"
        and not any(settings.model_flags.values())
    )
    as_measured = plain and run.dtype == torch.float16 and len(run.sizes) == 1
    known = MEASURED.get((settings.model, run.sizes[0], batch_size), {}) if as_measured else {}
    algorithm = f"{' or '.join(LEAST)} throughout, whichever is less" if settings.conv == "auto" else settings.conv

    def images(gpus: int) -> int:
        """Returns how many images that many GPUs train on."""
        total, epochs = batch_size * accumulate * gpus, settings.num_epochs
        return total * (epochs * (run.images // total) if epochs else settings.num_batches)

    return [
        f"MACs:        {counts} forward, an image",
        "Learning rate",
        *picture(rates, run.steps / run.steps_per_epoch),
        f"Time:        at least: by the bytes and FLOPs of a step with --conv={algorithm}",
        f"             as measured: {'by such steps on synthetic images' if known else 'no such step was'}",
        "             Reading data, allreduce, evaluation and saving come on top",
        *table_of_times(images, batch_size * accumulate, floors, known),
    ]
