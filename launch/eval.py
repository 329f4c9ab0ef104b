"""Evaluate a checkpoint on the validation images: `python launch/eval.py --help`."""

import nvcnn
from nvcnn.evaluate import Evaluation, evaluate
from nvcnn.models.fused import ALGORITHMS
from nvcnn.program import run
from nvcnn.settings import Parser


def parse() -> Evaluation:
    parser = Parser(prog="eval.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"nvcnn {nvcnn.__version__}")
    parser.add_argument("--data_dir", required=True, help="images: TFRecord files, WebDataset tars or class folders")
    parser.add_argument("--log_dir", default="", help="a training's directory: its newest checkpoint is evaluated")
    parser.add_argument("--checkpoint", metavar="FILE", help="evaluate this file")
    parser.add_argument("-m", "--model", help="checked against the checkpoint's")
    parser.add_argument("-b", "--batch_size", type=int, default=64, help="images per device (default 64)")
    conv = "auto", *ALGORITHMS
    parser.add_argument("--conv", choices=conv, default="auto", help="as in training (default auto)")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    parser.add_argument("--transport", choices=("horovod", "torch"), default="horovod", help="how ranks talk")
    parser.add_argument("--data_backend", choices=("dali_gpu", "dali_cpu", "torch"), help="what decodes; none: DALI")
    parser.add_argument("--skip_bad_images", action="store_true", help="leave out, and count, what cannot be decoded")
    return Evaluation(**vars(parser.parse_args()))


if __name__ == "__main__":
    run(lambda: evaluate(parse()))
