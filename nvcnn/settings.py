"""What can be asked for: a frozen dataclass for each program, from which its command line is made.

`Settings` are those of launch/train.py, and what config.json holds; `Evaluation`, `Prediction` and `Export` those of
launch/eval.py, launch/predict.py and launch/export.py. Importing this file does not import torch.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar, get_type_hints

import nvcnn
from nvcnn import recipes
from nvcnn.models import ALGORITHMS, FLAGS, MODELS, ORIGINS, Preprocessing, find_model
from nvcnn.near_misses import check_words
from nvcnn.program import InputError

T = TypeVar("T")
CONV = ("auto", *ALGORITHMS)
TRANSPORTS = ("auto", "horovod", "torch")
HOW_RANKS_TALK = "how ranks talk: Horovod where it can and its MPI started them, else torch.distributed (auto)"
HOW_LONG_RANKS_WAIT = "seconds in which no rank moves, or one does not answer, until all end, with a line; 0: for ever"
SCHEDULES = ("poly", "cosine", "step", "onecycle")
BACKENDS = ("dali_gpu", "dali_cpu", "torch")
NORMALIZE = ("signed", "imagenet")
ASPECTS = ("stretch", "keep")
INTERPOLATIONS = ("bilinear", "bicubic")
ORIGIN_NAMES = ("nvcnn", *ORIGINS)
FORMATS = ("safetensors", "torch", "onnx")
SMALLEST, LARGEST = 1e-30, 1e30  # of the numbers that are computed with: fp32 holds them, and their reciprocals
LARGEST_SIDE = 2**15  # of an image
SIZES = re.compile(r"([1-9][0-9]{0,8}:[1-9][0-9]{0,8},)*[1-9][0-9]{0,8}")  # of --train_size
MOST_PIXELS = 2**31  # of a batch: some kernels count no further, and no GPU holds what a network makes of so many


def flag(default: Any, help: str, *, group: str, short: str | None = None, choices=(), may_differ: bool = False) -> Any:
    """Returns the field of a setting.

    `default`: MISSING for a flag that is required. `may_differ`: a resumed run may change it, since it does not touch
    what is computed, or says so (`transport`).
    """
    metadata = {"help": help, "group": group, "short": short, "choices": choices, "may_differ": may_differ}
    return field(default=default, metadata=metadata)


GROUPS = ("as in nvcnn_hvd.py", "training", "precision", "input", "run")  # in the order of --help, before any others
original, training, numeric, image, run = (partial(flag, group=group) for group in GROUPS)


@dataclass(frozen=True, kw_only=True)
class Images:
    """How images are prepared, for training and evaluation. What is not given belongs to the weights, or the model."""

    image_size: int | None = image(
        None, "height and width in training and evaluation; none: those that the model, or its weights, are made for"
    )
    eval_size: int | None = image(None, "height and width in evaluation alone; none: --image_size")
    normalize: str | None = image(
        None, "pixels to [-1, 1] (signed) or by ImageNet's mean and deviation; none: signed", choices=NORMALIZE
    )
    eval_crop: float | None = image(None, "evaluation crop, share of height and width; none: 0.875")
    eval_aspect: str | None = image(
        None,
        "evaluation crop: that share of each side, stretched to a square (stretch), or a square with that share of the "
        "shorter side (keep); none: stretch",
        choices=ASPECTS,
    )
    eval_interpolation: str | None = image(None, "evaluation's resize; none: bilinear", choices=INTERPOLATIONS)

    def check_images(self, model: str | None) -> None:
        """Raises InputError for values that cannot be, and for a size that the model does not take."""
        check(self, self.eval_crop is None or 0 < self.eval_crop <= 1, "eval_crop", "above 0 and at most 1")
        for name in ("image_size", "eval_size"):
            size = getattr(self, name)
            if size is not None and model is not None:
                check_image_size(model, size, name)

    def prepared(self, preprocessing: Preprocessing) -> Preprocessing:
        """Returns `preprocessing` with what was asked for in its place."""
        asked = {f.name: value for f in fields(Images) if (value := getattr(self, f.name)) is not None}
        in_training = self.image_size or preprocessing.training_size
        if eval_size := asked.pop("eval_size", None):
            asked["image_size"] = eval_size
        return replace(preprocessing, **asked).trained_at(in_training)


def check_image_size(model: str, size: int, name: str) -> None:
    """Raises InputError, which names the flag, unless the model takes images of that height and width."""
    own, least = find_model(model).image_size, find_model(model).least_size
    if least is None and size != own:
        raise InputError(f"--{name}={size}: --model={model} takes {own} alone, leave the flag out")
    if least is not None and size < least:
        raise InputError(f"--{name}={size}: --model={model} takes {least} and more")
    if size > LARGEST_SIDE:
        raise InputError(f"--{name}={size}: must be at most {LARGEST_SIDE}")


def training_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Returns the sizes of --train_size, each behind the epoch, counted from 0, from which on it is used.

    Raises InputError for what is no such list.
    """
    if not SIZES.fullmatch(text):
        raise InputError(
            f"--train_size={text}: must be SIZE, or SIZE:EPOCHS,...,SIZE, where the last is for the rest of the epochs"
        )
    sizes, first = [], 0
    for size, _, epochs in (part.partition(":") for part in text.split(",")):
        sizes.append((first, int(size)))
        first += int(epochs or 0)
    return tuple(sizes)


def in_lower_case(settings: Any) -> None:
    """Takes --model=ResNet50 for resnet50, and leaves what is no model for `find_model` to say."""
    if settings.model and settings.model.lower() in MODELS:
        object.__setattr__(settings, "model", settings.model.lower())  # the dataclass is frozen for others


def check(settings: Any, right: bool, name: str, must: str) -> None:
    """Raises InputError, which names the flag, unless `right`."""
    if not right:
        value = getattr(settings, name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise InputError(f"--{name}={text}: must be {must}")


@dataclass(frozen=True, kw_only=True)
class Chosen(Images):
    """Weights that are there already: a run's, or a file's."""

    image_size: int | None = image(None, "height and width of the images; none: those of evaluation with these weights")
    eval_size: int | None = image(None, "the same, and stronger than --image_size; none: that")

    log_dir: str = run("", "a training's directory: its newest checkpoint is taken")
    checkpoint: str | None = run(None, "take this file: a checkpoint, or published weights (.pth, .safetensors)")
    model: str | None = run(None, "network of published weights; a checkpoint's is checked against it", short="-m")
    ema: bool = run(True, "take the averaged weights where a checkpoint has them; --noema: those that are trained")
    weights_from: str | None = run(None, "who published the weights, where they do not tell", choices=ORIGIN_NAMES)

    def __post_init__(self) -> None:
        in_lower_case(self)
        if bool(self.log_dir) == bool(self.checkpoint):
            raise InputError("give one of --log_dir (its newest checkpoint) and --checkpoint=FILE")
        if self.weights_from and not self.checkpoint:
            raise InputError(f"--weights_from={self.weights_from} needs --checkpoint, the weights")
        if self.model is not None:
            find_model(self.model)
        self.check_images(self.model)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Chosen):
    """Evaluate a checkpoint on the validation images.

    What is not given (image size, pixels, crop), and the compute dtype, are the checkpoint's.
    """

    data_dir: str = image(MISSING, "images: TFRecord files, WebDataset tars or class folders")
    data_backend: str | None = image(None, "what decodes; none: DALI, on the GPU if any", choices=BACKENDS)
    skip_bad_images: bool = image(False, "leave out, and count, what cannot be decoded")

    batch_size: int = run(64, "images per device", short="-b")
    conv: str = run("auto", "what computes convolutions, as in training", choices=CONV)
    json: bool = run(False, "print a JSON object as the last line; with --per_class accuracy by class is in it")
    per_class: bool = run(False, "print accuracy by class, the worst last")
    report: str | None = run(
        None, "write report.html to this directory: accuracy by class, what is confused, the most confident mistakes"
    )
    transport: str = run("auto", HOW_RANKS_TALK, choices=TRANSPORTS)
    rank_timeout: int = run(600, HOW_LONG_RANKS_WAIT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, self.batch_size >= 1, "batch_size", "at least 1")
        check(self, 0 <= self.rank_timeout < 2**62, "rank_timeout", "0 or more, below 2^62")
        check(self, self.report != "", "report", "a directory")


@dataclass(frozen=True, kw_only=True)
class Prediction(Chosen):
    """Say what pictures show, by the weights of a run or of a file.

    What is not given (image size, pixels, crop), and the compute dtype, are the checkpoint's.
    """

    images: tuple[str, ...] = image(MISSING, "pictures, and folders whose pictures are taken in order of name")

    top: int = run(5, "classes to print of each, the likeliest first")
    json: bool = run(False, "print nothing but a JSON object a line for each picture")
    csv: bool = run(False, "print nothing but CSV: image, rank, class, name, probability")
    batch_size: int = run(64, "pictures at a time", short="-b")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, self.batch_size >= 1, "batch_size", "at least 1")
        check(self, self.top >= 1, "top", "at least 1")
        if not all(self.images):
            raise InputError("'': is no picture: leave the empty word out")
        if self.json and self.csv:
            raise InputError("--json and --csv: choose one")


@dataclass(frozen=True, kw_only=True)
class Export(Chosen):
    """Write weights for other programs, with classes and preprocessing beside them."""

    out: str = run(MISSING, "the file to write")
    format: str = run(
        "safetensors",
        "a state_dict by torchvision's or timm's names (safetensors, torch), or an ONNX model",
        choices=FORMATS,
    )
    fold: bool = run(False, "with --format=onnx: convolutions do the BatchNorm behind them")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fold and self.format != "onnx":
            raise InputError(f"--fold is for --format=onnx: nobody loads such weights as {self.format}; leave it out")


@dataclass(frozen=True, kw_only=True)
class Settings(Images):
    """Train a convolutional network.

    Names, meanings and defaults of the first group are those of NVIDIA's `nvcnn_hvd.py` 1.1.
    """

    model: str = original(MISSING, f"network to train: {', '.join(MODELS)}", short="-m")
    data_dir: str | None = original(
        None, "images: TFRecord files, WebDataset tars or class folders; none: synthetic", may_differ=True
    )
    batch_size: int = original(64, "images per device and step", short="-b")
    num_batches: int = original(50, "steps to run")
    num_epochs: int | None = original(None, "epochs to run; overrides --num_batches")
    log_dir: str = original(
        "", "checkpoints and summaries; a run resumes from the newest checkpoint there", may_differ=True
    )
    display_every: int = original(1, "steps between table lines", may_differ=True)
    save_interval: int = original(43200, "seconds between checkpoints", may_differ=True)
    summary_interval: int = original(
        3600, "seconds between TensorBoard's values of --log_tensors; its curves need no flag", may_differ=True
    )
    loss_scale: float | str = original(1.0, "factor on the loss against fp16 underflow, or 'dynamic'")
    larc_eta: float | None = original(None, "LARC trust coefficient; none: LARC off")
    larc_mode: str = original(
        "clip", "LARC caps the learning rate (clip) or multiplies it (scale)", choices=("clip", "scale")
    )
    learning_rate: float | None = original(None, "initial learning rate; none: the model's own")
    eval: bool = original(False, "evaluate the newest checkpoint of --log_dir, do not train", may_differ=True)
    fp16: bool = original(False, "compute in float16")

    schedule: str = training(
        "poly",
        "how the learning rate falls: as (1 - x)^2 (poly), a cosine, to a tenth at 1/3, 2/3 and 8/9 of the run (step), "
        "or linearly behind a linear rise (onecycle)",
        choices=SCHEDULES,
    )
    warmup_epochs: float | None = training(
        None,
        "epochs, or parts of one, in which the learning rate rises linearly; none: 0, with onecycle 0.3 of the run",
    )
    momentum: float = training(0.9, "SGD's momentum, by Nesterov's rule")
    weight_decay: float = training(1e-4, "factor of the weights in the gradient")
    no_decay: str = training(
        "none", "parameters without weight decay: none, or those of one dimension (1d)", choices=("none", "1d")
    )
    clip_norm: float | None = training(
        None, "largest norm of the whole gradient, without decay: a larger one is scaled down; none: any"
    )
    ema: float | None = training(
        None, "decay of a moving average of the weights, e.g. 0.9999, which is what is evaluated; none: no average"
    )
    larc_exclude: str = training(
        "none", "parameters LARC leaves to plain SGD: none, or those of one dimension (1d)", choices=("none", "1d")
    )
    label_smoothing: float = training(0.0, "share of the target spread over all classes")
    accumulate: int = training(1, "batches of --batch_size that make one step")
    mixup: float = training(0.0, "blend each image with another, by shares of Beta(MIXUP, MIXUP); 0: do not")
    cutmix: float = training(
        0.0,
        "put a box of another image into each, of a share of Beta(CUTMIX, CUTMIX); 0: do not. With --mixup each batch "
        "has one of both",
    )
    aux: bool = training(False, "the auxiliary heads of googlenet and inception3, with their papers' weights")
    zero_gamma: bool = training(False, "the last BatchNorm of each residual block begins with gamma 0")
    init: str | None = training(None, "weights to begin with: a checkpoint, or published ones (.pth, .safetensors)")
    weights_from: str | None = training(
        None, "who published the weights of --init, where they do not tell", choices=ORIGIN_NAMES
    )
    freeze: str = training(
        "none", "what keeps weights and statistics: all but the last layer (backbone)", choices=("none", "backbone")
    )

    bf16: bool = numeric(False, "compute in bfloat16")
    conv: str = numeric(
        "auto",
        "what computes convolutions with their BatchNorms: the project's kernels, which normalise as they load "
        "(triton) or read what is normalised (triton-materialized), cudnn, either with the statistics of a widening "
        "1 x 1 from its input's Gram matrix (triton-gram, cudnn-gram), torch; or of all but torch, place by place, "
        "what is measured to be the fastest on this GPU (auto)",
        choices=CONV,
    )
    momentum_dtype: str = numeric("fp32", "what momentum is kept in", choices=("fp32", "bf16"))

    crop_area: tuple[float, float] = image((0.1, 1.0), "training crop, share of the image's area: LO,HI")
    crop_aspect: tuple[float, float] = image((0.8, 1.25), "training crop, width / height: LO,HI")
    train_size: str | None = image(
        None,
        "height and width in training alone: SIZE, or SIZE:EPOCHS,...,SIZE, each for so many epochs, the last for the "
        "rest; none: --image_size",
    )
    num_classes: int | None = image(None, "classes; none: from the data's dataset.json, else 1000")
    num_images: int | None = image(
        None, "training images that --dry_run counts with where there is no --data_dir", may_differ=True
    )
    label_base: int | None = image(None, "lowest label in the records; none: from dataset.json, else 1")

    data_backend: str | None = image(
        None,
        "what decodes: DALI on the GPU or CPU, or Pillow in worker processes (torch); none: DALI, on the GPU if any",
        choices=BACKENDS,
    )
    check_data: str = image(
        "none",
        "before training, read all records (CRC, label) or decode all images",
        choices=("none", "records", "images"),
        may_differ=True,
    )
    skip_bad_images: bool = image(False, "decode all images before training, leave out those that cannot be used")

    recipe: str | None = run(
        None,
        "flags from a file, of which the command line's own are the stronger: FILE.yaml, or the NAME of one of "
        "nvcnn's recipes",
        may_differ=True,
    )
    eval_every: int | None = run(
        None,
        "epochs between evaluations on the validation images, of which the last is at the end; 0: never; none: 1 with "
        "--data_dir",
        may_differ=True,
    )
    save_every: int = run(1, "epochs between checkpoints, whatever --save_interval is; 0: never", may_differ=True)
    max_skipped: int = run(
        50, "steps in a row that may be skipped, for gradients that are not finite, before a run stops", may_differ=True
    )
    resnet_v1: bool = run(False, "bottleneck's stride in its first 1x1, as the original")
    seed: int = run(1, "weights, crops, order")
    keep: int = run(3, "checkpoints to keep", may_differ=True)
    cuda_graph: str = run(
        "auto",
        "the step as one launch of a CUDA graph, to the same bits: where it can be (auto), on or off",
        choices=("auto", "on", "off"),
        may_differ=True,
    )
    transport: str = run("auto", HOW_RANKS_TALK, choices=TRANSPORTS, may_differ=True)
    rank_timeout: int = run(600, HOW_LONG_RANKS_WAIT, may_differ=True)
    log_tensors: bool = run(
        False, "trust ratio and norms of each tensor in metrics.jsonl, at each table line", may_differ=True
    )
    dry_run: bool = run(
        False,
        "print settings, steps, memory, learning rates and the least time on GPUs, then stop",
        may_differ=True,
    )

    def __post_init__(self) -> None:
        in_lower_case(self)
        find_model(self.model, zero_gamma=self.zero_gamma, **self.model_flags)
        self.check_images(self.model)
        for _, size in training_sizes(self.train_size) if self.train_size is not None else ():
            check_image_size(self.model, size, "train_size")
        for name in ("batch_size", "num_batches", "accumulate", "display_every", "max_skipped", "keep"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        for name in ("num_epochs", "num_classes", "num_images"):
            check(self, getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        check(self, self.eval_every is None or 0 <= self.eval_every < 2**62, "eval_every", "0 or more, below 2^62")
        for name in ("learning_rate", "larc_eta", "clip_norm"):
            value = getattr(self, name)
            check(self, value is None or SMALLEST <= value <= LARGEST, name, f"a number from {SMALLEST} to {LARGEST}")
        for name in ("save_interval", "save_every", "summary_interval", "rank_timeout", "seed"):
            check(self, 0 <= getattr(self, name) < 2**62, name, "0 or more, below 2^62")
        check(self, 0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        check(self, self.ema is None or 0 < self.ema < 1, "ema", "above 0 and below 1")
        decay = self.weight_decay
        right = decay == 0 or SMALLEST <= decay <= LARGEST
        check(self, right, "weight_decay", f"0, or a number from {SMALLEST} to {LARGEST}")
        warmup = self.warmup_epochs
        check(self, warmup is None or 0 <= warmup <= LARGEST, "warmup_epochs", "a number of epochs, 0 or more")
        for name, top in (("crop_area", 1.0), ("crop_aspect", LARGEST)):
            low, high = getattr(self, name)
            check(self, SMALLEST <= low <= high <= top, name, f"LO,HI with {SMALLEST} <= LO <= HI <= {top}")
        check(self, 0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1")
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            check(self, alpha == 0 or SMALLEST <= alpha <= LARGEST, name, f"0, or from {SMALLEST} to {LARGEST}")
            if alpha and self.batch_size == 1:
                raise InputError(f"--{name}={alpha}: mixes images of a batch, and --batch_size=1 has no other")
        scale = self.loss_scale
        right = scale == "dynamic" if isinstance(scale, str) else SMALLEST <= scale <= LARGEST
        check(self, right, "loss_scale", f"a number from {SMALLEST} to {LARGEST}, or 'dynamic'")
        if self.fp16 and self.bf16:
            raise InputError("--fp16 and --bf16: choose one")
        if self.larc_exclude != "none" and self.larc_eta is None:
            raise InputError(f"--larc_exclude={self.larc_exclude} needs --larc_eta: without it LARC is off")
        if self.weights_from and not (self.init or self.eval):
            raise InputError(f"--weights_from={self.weights_from} needs --init, the weights")
        if self.freeze != "none" and not (self.init or self.eval):
            raise InputError(f"--freeze={self.freeze} needs --init: random weights are none to keep")
        if self.zero_gamma and self.init:
            raise InputError("--zero_gamma is for random weights: --init brings others, leave one of them out")
        if self.log_tensors and not self.log_dir:
            raise InputError("--log_tensors needs --log_dir, where metrics.jsonl is")
        if self.data_dir is None and not (self.dry_run and self.num_images):
            dry = ", and a --dry_run --num_images" if self.dry_run else ""
            if self.num_epochs is not None:
                raise InputError(f"--num_epochs needs --data_dir; on synthetic data give --num_batches{dry}")
            if "," in (self.train_size or ""):
                raise InputError(f"--train_size={self.train_size} needs --data_dir: synthetic data has no epochs")
        if self.eval_every and self.data_dir is None:
            raise InputError(f"--eval_every={self.eval_every} needs --data_dir, where the validation images are")
        if self.eval and self.data_dir is None:
            raise InputError("--eval needs --data_dir")
        if self.eval and not self.log_dir:
            raise InputError("--eval needs --log_dir, where the checkpoint is")

    @property
    def model_flags(self) -> dict[str, bool]:
        """Returns those of the flags that change the model, and not only the weights that it begins with."""
        return {flag: getattr(self, flag) for flag in FLAGS if flag != "zero_gamma"}

    def evaluation(self) -> Evaluation:
        """Returns what --eval asks for: launch/eval.py with the flags that both programs have."""
        both = {f.name for f in fields(Settings)} & {f.name for f in fields(Evaluation)} - {"weights_from", "ema"}
        return Evaluation(**{name: getattr(self, name) for name in both})


def as_json(settings: Settings) -> dict[str, Any]:
    """Returns what config.json and checkpoints hold: JSON's own types only, so a copy read back compares equal."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}


def differences(settings: Settings, stored: dict[str, Any]) -> list[str]:
    """Returns a line 'flag: there X, here Y' for each setting that a resumed run may not change but did."""
    here = as_json(settings)
    return [
        f"--{f.name}: there {stored.get(f.name, f.default)}, here {here[f.name]}"
        for f in fields(settings)
        if not f.metadata["may_differ"] and stored.get(f.name, f.default) != here[f.name]
    ]


class Parser(argparse.ArgumentParser):
    """A parser of flags that raises InputError where argparse would exit."""

    def error(self, message: str):
        raise InputError(message)


def number_or_dynamic(text: str) -> float | str:
    """Returns the value of --loss_scale."""
    try:
        return text if text == "dynamic" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'dynamic'") from None


def pair(text: str) -> tuple[float, float]:
    """Returns the two numbers of 'LO,HI'."""
    try:
        low, high = text.split(",")
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers LO,HI") from None


READERS: dict[Any, Any] = {float | str: number_or_dynamic, tuple[float, float]: pair}
READERS |= {int | None: int, float | None: float}
READERS |= {str: os.path.expanduser, str | None: os.path.expanduser}  # of --data_dir=~/x a shell leaves the ~


SWITCHES = {False: "off", True: "on"}  # in --help
METAVARS = {int: "N", int | None: "N", float: "X", float | None: "X", tuple[float, float]: "LO,HI"}


def in_words(default: Any, help: str) -> str:
    """Returns what --help says of a flag's default, behind its other words."""
    if default is MISSING:
        return " (required)"
    if default in (None, ""):
        return "" if "none:" in help else " (default none)"
    texts = [str(value) for value in (default if isinstance(default, tuple) else (default,))]
    return f" (default {SWITCHES[default] if isinstance(default, bool) else ','.join(texts)})"


def usage(settings: type) -> str:
    """Returns the shortest command line."""
    needed = [f for f in fields(settings) if f.default is MISSING]
    words = [f.name.upper() if f.type == tuple[str, ...] else f"--{f.name}={f.name.upper()}" for f in needed]
    return " ".join(["%(prog)s", *words, "[--FLAG=VALUE ...]"])


def add_flags(parser: argparse.ArgumentParser, settings: type, *, whole: bool = True) -> None:
    """Adds a flag for each field of a dataclass whose fields are made by `flag`. Several texts need none.

    whole: required ones are.
    """
    kinds = get_type_hints(settings)
    used = dict.fromkeys(f.metadata["group"] for f in fields(settings))
    in_order = [group for group in GROUPS if group in used] + [group for group in used if group not in GROUPS]
    groups = {group: parser.add_argument_group(group) for group in in_order}
    for f in fields(settings):
        kind, meta, group = kinds[f.name], f.metadata, groups[f.metadata["group"]]
        names = [n for n in (meta["short"], f"--{f.name}") if n]
        if kind is bool:
            help = meta["help"] + in_words(f.default, meta["help"])
            group.add_argument(*names, dest=f.name, action="store_true", default=f.default, help=help)
            group.add_argument(f"--no{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
            continue
        if kind == tuple[str, ...]:
            group.add_argument(f.name, nargs="+", type=READERS[str], metavar=f.name.upper(), help=meta["help"])
            continue
        required = f.default is MISSING
        group.add_argument(
            *names,
            type=READERS.get(kind, kind),
            default=None if required else f.default,
            required=required and whole,
            choices=meta["choices"] or None,
            metavar=None if meta["choices"] else METAVARS.get(kind, f.name.upper()),
            help=meta["help"] + in_words(f.default, meta["help"]),
        )


def read_recipe(settings: type, arguments: Sequence[str]) -> dict[str, tuple[recipes.Line, Any]]:
    """Returns the flags of the recipe that is asked for, with their values. Raises InputError, which names the line."""
    kinds = {f.name: get_type_hints(settings)[f.name] for f in fields(settings) if f.name != "recipe"}
    before, parser = Parser(add_help=False, allow_abbrev=False), Parser(add_help=False, allow_abbrev=False)
    before.add_argument("--recipe")
    add_flags(parser, settings, whole=False)
    found = {}
    if (name := before.parse_known_args(arguments)[0].recipe) is not None:
        for line in recipes.read(name, {flag: kind is bool for flag, kind in kinds.items()}):
            try:
                found[line.flag] = line, getattr(parser.parse_args([line.argument]), line.flag)
            except InputError as error:
                raise InputError(f"{line.where}: {error}") from None
    return found


def parse(settings: type[T], arguments: Sequence[str] | None = None) -> T:
    """Returns the settings that a command line asks for, with those of its recipe where it says nothing.

    Raises InputError for anything that is not a valid one.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    check_words(settings, arguments)
    by_hand = {word.partition("=")[0] for word in arguments}
    asks = by_hand & {"-h", "--help", "--version"}
    recipe = read_recipe(settings, arguments) if hasattr(settings, "recipe") and not asks else {}
    for flag, other in (("--num_batches", "num_epochs"), ("--num_epochs", "num_batches")):
        if flag in by_hand:  # both say how long a run is
            recipe.pop(other, None)
    description = (settings.__doc__ or "").partition("\n")[0]
    parser = Parser(usage=usage(settings), description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"nvcnn {nvcnn.__version__}")
    add_flags(parser, settings)
    # Files may stand between flags.
    given = vars(parser.parse_intermixed_args([*(line.argument for line, _ in recipe.values()), *arguments]))
    try:
        return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    except InputError as error:
        lines = [recipe[flag] for flag in re.findall(r"--(\w+)", str(error)) if flag in recipe]
        from_it = dict.fromkeys(line.where for line, value in lines if given[line.flag] == value)
        raise InputError(" ".join([str(error), *(f"({where})" for where in from_it)])) from None
