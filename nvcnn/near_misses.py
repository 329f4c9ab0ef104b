"""What was most likely meant by a word of the command line that is no flag, said where argparse would say less."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from nvcnn.models import MODELS
from nvcnn.program import InputError

CLOSE = 0.75  # difflib's ratio: below it a guess is more often wrong than right

ALIASES = {  # flag: what other trainers call it; the first counts that a program has
    "learning_rate": "lr base_lr init_lr initial_lr max_lr",
    "num_epochs": "epochs epoch max_epochs train_epochs",
    "num_batches": "steps max_steps num_steps train_steps iters iterations max_iters",
    "batch_size": "bs batch train_batch_size val_batch_size per_device_train_batch_size",
    "model": "a arch architecture net network model_name",
    "data_dir": "data data_path dataset dataset_dir root imagenet train_dir train_data",
    "log_dir": "logdir output output_dir out_dir save_dir save_path checkpoint_dir work_dir resume_from",
    "out": "output output_dir out_dir save_path",
    "init": "pretrained finetune weights initial_checkpoint init_checkpoint checkpoint ckpt load",
    "checkpoint": "init weights ckpt checkpoint_path load pretrained",
    "display_every": "print_freq log_interval log_every log_freq print_every disp_freq",
    "save_every": "save_freq save_epochs checkpoint_every",
    "save_interval": "save_freq checkpoint_interval",
    "eval_every": "eval_freq eval_interval val_interval val_every validate_every",
    "eval": "evaluate validate test eval_only test_only",
    "fp16": "amp half mixed_precision use_amp use_fp16 float16",
    "bf16": "bfloat16",
    "weight_decay": "wd decay l2",
    "label_smoothing": "smoothing label_smooth smooth",
    "schedule": "lr_scheduler sched scheduler lr_schedule",
    "warmup_epochs": "warmup lr_warmup_epochs num_warmup_epochs",
    "clip_norm": "clip_grad clip_grad_norm grad_clip max_grad_norm gradient_clip_val",
    "accumulate": "accum accumulation grad_accum_steps gradient_accumulation_steps accumulate_grad_batches",
    "ema": "model_ema ema_decay model_ema_decay",
    "mixup": "mixup_alpha",
    "cutmix": "cutmix_alpha",
    "zero_gamma": "zero_init_residual zero_init_last",
    "recipe": "config cfg config_file",
    "num_classes": "classes nclass n_classes nb_classes",
    "image_size": "img_size imgsz img input_size resolution size crop_size res",
    "data_backend": "loader data_loader dataloader backend",
    "dry_run": "dry print_only",
    "top": "topk k",
    "train": "data data_dir dir input root source images train_dir",
    "val_share": "val_split validation_split val_ratio split",
    "workers": "j num_workers nproc",
}
NO_FLAG = {  # what other trainers have a flag for: what this one does instead
    "num_gpus gpus ngpu ngpus n_gpus nproc nproc_per_node num_devices devices world_size": (
        "a process uses one GPU, so start one for each, as in mpiexec -np 8 python launch/train.py ..."
    ),
    "gpu gpu_id gpu_ids device cuda no_cuda cpu": "CUDA_VISIBLE_DEVICES says which GPUs a process sees",
    "j num_workers workers": "input takes all cores that a rank has",
    "resume auto_resume": "a run goes on from the newest checkpoint in its --log_dir",
    "opt optim optimizer": "it is SGD with Nesterov's momentum",
    "nesterov": "momentum is always Nesterov's",
    "norm_weight_decay bias_weight_decay": "--no_decay=1d leaves parameters of one dimension without",
    "noema no_ema": "weights are averaged where --ema=DECAY asks for it, and not without",
}


def check_words(settings: type, arguments: Sequence[str]) -> None:
    """Raises InputError for the first argument that is no flag of a dataclass of settings, or is an empty value."""
    kinds = get_type_hints(settings)
    takes: dict[str, bool] = {}  # a value
    for f in fields(settings):
        if kinds[f.name] != tuple[str, ...]:  # that has no flag
            names = (f"--{f.name}", f.metadata["short"] or f"--{f.name}")
            takes |= dict.fromkeys(names, kinds[f.name] is not bool)
        if kinds[f.name] is bool:
            takes[f"--no{f.name}"] = False
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word in ("-h", "--help", "--version", "--"):
            return
        if name in takes:
            if equals and not takes[name]:
                raise InputError(f"{word}: takes no value: give {name}, or leave it out")
            if takes[name] and (value if equals else next(words, None)) == "":
                raise InputError(f"{name}=: is empty: give a value, or leave the flag out")
        elif word.startswith("-") and (word.startswith("--") or word[:2] not in takes):  # -b64 has a value in it
            after = value if equals else next(words, "")
            value = "" if after.startswith("-") else after
            raise InputError(f"{name}{'=' if value else ''}{value}: {of_flag(name, value, takes)}")
        elif not word.startswith("-") and tuple[str, ...] not in kinds.values():
            raise InputError(f"{word}: {of_word(word, takes)}")


def of_flag(name: str, value: str, takes: Mapping[str, bool]) -> str:
    """Returns what to do about a flag that there is not. takes: those that there are, and whether they take a value."""
    word = name.lstrip("-").lower().replace("-", "_")
    near = [f"--{flag}" for flag, others in ALIASES.items() if word in others.split() and f"--{flag}" in takes]
    instead = [said for others, said in NO_FLAG.items() if word in others.split()]
    if instead and not near:
        return f"there is no such flag: {instead[0]}"
    for flag in near or difflib.get_close_matches(f"--{word}", takes, 1, CLOSE):
        return f"did you mean {flag}{f'={value}' if value and takes[flag] else ''}?"
    return "there is no such flag; --help lists all"


def of_word(word: str, takes: Mapping[str, bool]) -> str:
    """Returns what to do about a word that is no flag."""
    name, equals, value = word.partition("=")
    path = Path(word).expanduser()
    guesses = {
        "--model": word.lower() in MODELS,
        "--log_dir": path.is_dir() and any(path.glob("checkpoint-*.pt")),
        "--data_dir": path.is_dir(),
        "--checkpoint": path.is_file(),
        "--init": path.is_file(),
    }
    if equals:
        return of_flag(name, value, takes) if f"--{name}" not in takes else f"did you mean --{word}?"
    for flag, fits in guesses.items():
        if fits and flag in takes:
            return f"did you mean {flag}={word}?"
    return "is no flag: those begin with --, and --help lists them"
