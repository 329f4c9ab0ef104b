"""What can be asked for: a frozen dataclass for each program, from which its command line is made.

`Settings` are those of launch/train.py, and what config.json holds; `Evaluation` and `Export` those of launch/eval.py
and launch/export.py. Importing this file does not import torch.
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar, get_type_hints

import nvcnn
from nvcnn.models import ALGORITHMS, FLAGS, ORIGINS, Preprocessing, find_model
from nvcnn.program import InputError

T = TypeVar("T")
CONV = ("auto", *ALGORITHMS)
TRANSPORTS = ("horovod", "torch")
BACKENDS = ("dali_gpu", "dali_cpu", "torch")
NORMALIZE = ("signed", "imagenet")
ASPECTS = ("stretch", "keep")
INTERPOLATIONS = ("bilinear", "bicubic")
ORIGIN_NAMES = ("nvcnn", *ORIGINS)
FORMATS = ("safetensors", "torch", "onnx")
SMALLEST, LARGEST = 1e-30, 1e30  # of the numbers that are computed with: fp32 holds them, and their reciprocals
LARGEST_SIDE = 2**15  # of an image
MOST_PIXELS = 2**31  # of a batch: some kernels count no further, and no GPU holds what a network makes of so many


def flag(default: Any, help: str, *, group: str, short: str | None = None, choices=(), may_differ: bool = False) -> Any:
    """Returns the field of a setting.

    `default`: MISSING for a flag that is required. `may_differ`: a resumed run may change it, since it does not touch
    what is computed.
    """
    metadata = {"help": help, "group": group, "short": short, "choices": choices, "may_differ": may_differ}
    return field(default=default, metadata=metadata)


GROUPS = ("as in nvcnn_hvd.py", "training", "precision", "input", "run")  # in the order of --help, before any others
original, training, numeric, image, run = (partial(flag, group=group) for group in GROUPS)


@dataclass(frozen=True, kw_only=True)
class Images:
    """How images are prepared, for training and evaluation. What is not given belongs to the weights, or the model."""

    image_size: int | None = image(None, "height and width; none: those that the model, or its weights, are made for")
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
        if self.image_size is not None and model is not None:
            check_image_size(model, self.image_size)

    def prepared(self, preprocessing: Preprocessing) -> Preprocessing:
        """Returns `preprocessing` with what was asked for in its place."""
        asked = {f.name: getattr(self, f.name) for f in fields(Images)}
        return replace(preprocessing, **{name: value for name, value in asked.items() if value is not None})


def check_image_size(model: str, image_size: int) -> None:
    """Raises InputError unless the model takes images of that height and width."""
    size, least = find_model(model).image_size, find_model(model).least_size
    if least is None and image_size != size:
        raise InputError(f"--image_size={image_size}: --model={model} takes {size} alone, leave the flag out")
    if least is not None and image_size < least:
        raise InputError(f"--image_size={image_size}: --model={model} takes {least} and more")
    if image_size > LARGEST_SIDE:
        raise InputError(f"--image_size={image_size}: must be at most {LARGEST_SIDE}")


def check(settings: Any, right: bool, name: str, must: str) -> None:
    """Raises InputError, which names the flag, unless `right`."""
    if not right:
        raise InputError(f"--{name}={getattr(settings, name)}: must be {must}")


@dataclass(frozen=True, kw_only=True)
class Chosen(Images):
    """Weights that are there already: a run's, or a file's."""

    log_dir: str = run("", "a training's directory: its newest checkpoint is taken")
    checkpoint: str | None = run(None, "take this file: a checkpoint, or published weights (.pth, .safetensors)")
    model: str | None = run(None, "network of published weights; a checkpoint's is checked against it", short="-m")
    weights_from: str | None = run(None, "who published the weights, where they do not tell", choices=ORIGIN_NAMES)

    def __post_init__(self) -> None:
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
    json: bool = run(False, "print a JSON object as the last line")
    transport: str = run("horovod", "how ranks talk", choices=TRANSPORTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, self.batch_size >= 1, "batch_size", "at least 1")


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

    model: str = original(MISSING, "network to train, e.g. resnet50", short="-m")
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
    summary_interval: int = original(3600, "seconds between TensorBoard summaries", may_differ=True)
    loss_scale: float | str = original(1.0, "factor on the loss against fp16 underflow, or 'dynamic'")
    larc_eta: float | None = original(None, "LARC trust coefficient; none: LARC off")
    larc_mode: str = original(
        "clip", "LARC caps the learning rate (clip) or multiplies it (scale)", choices=("clip", "scale")
    )
    learning_rate: float | None = original(None, "initial learning rate; none: the model's own")
    eval: bool = original(False, "evaluate the newest checkpoint of --log_dir, do not train", may_differ=True)
    fp16: bool = original(False, "compute in float16")

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
    num_classes: int | None = image(None, "classes; none: from the data's dataset.json, else 1000")
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

    resnet_v1: bool = run(False, "bottleneck's stride in its first 1x1, as the original")
    seed: int = run(1, "weights, crops, order")
    keep: int = run(3, "checkpoints to keep", may_differ=True)
    cuda_graph: str = run(
        "auto",
        "the step as one launch of a CUDA graph, to the same bits: where it can be (auto), on or off",
        choices=("auto", "on", "off"),
        may_differ=True,
    )
    transport: str = run("horovod", "how ranks talk", choices=TRANSPORTS)
    log_tensors: bool = run(
        False, "trust ratio and norms of each tensor in metrics.jsonl, at each table line", may_differ=True
    )
    dry_run: bool = run(False, "print settings, steps and memory, then stop", may_differ=True)

    def __post_init__(self) -> None:
        find_model(self.model, zero_gamma=self.zero_gamma, **self.model_flags)
        self.check_images(self.model)
        for name in ("batch_size", "num_batches", "accumulate", "display_every", "keep"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        for name in ("num_epochs", "num_classes"):
            check(self, getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "larc_eta"):
            value = getattr(self, name)
            check(self, value is None or SMALLEST <= value <= LARGEST, name, f"a number from {SMALLEST} to {LARGEST}")
        for name in ("save_interval", "summary_interval", "seed"):
            check(self, 0 <= getattr(self, name) < 2**62, name, "0 or more, below 2^62")
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
        if self.num_epochs is not None and self.data_dir is None:
            raise InputError("--num_epochs needs --data_dir; on synthetic data give --num_batches")
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
        both = {f.name for f in fields(Settings)} & {f.name for f in fields(Evaluation)} - {"weights_from"}
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
READERS |= {kind | None: kind for kind in (str, int, float)}


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds a flag for each field of a dataclass whose fields are made by `flag`."""
    kinds = get_type_hints(settings)
    used = dict.fromkeys(f.metadata["group"] for f in fields(settings))
    in_order = [group for group in GROUPS if group in used] + [group for group in used if group not in GROUPS]
    groups = {group: parser.add_argument_group(group) for group in in_order}
    for f in fields(settings):
        kind, meta, group = kinds[f.name], f.metadata, groups[f.metadata["group"]]
        names = [n for n in (meta["short"], f"--{f.name}") if n]
        if kind is bool:
            group.add_argument(*names, dest=f.name, action="store_true", default=f.default, help=meta["help"])
            group.add_argument(f"--no{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
            continue
        required = f.default is MISSING
        group.add_argument(
            *names,
            type=READERS.get(kind, kind),
            default=None if required else f.default,
            required=required,
            choices=meta["choices"] or None,
            metavar="LO,HI" if kind == tuple[float, float] else None if meta["choices"] else f.name.upper(),
            help=meta["help"] + ("" if required or f.default is None else f" (default {f.default})"),
        )


def parse(settings: type[T], arguments: Sequence[str] | None = None) -> T:
    """Returns the settings that a command line asks for. Raises InputError for anything that is not a valid one."""
    parser = Parser(description=(settings.__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"nvcnn {nvcnn.__version__}")
    add_flags(parser, settings)
    return settings(**vars(parser.parse_args(arguments)))
