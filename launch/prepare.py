"""Makes a data directory for --data_dir: python launch/prepare.py imagenet|folder|cifar10|fashion-mnist --out DIR"""

import signal
import sys

try:
    from nvcnn.program import SAVED_AND_STOPPED, run
except ModuleNotFoundError:
    how = "activate its environment, or `pip install -e .` in the checkout"
    sys.exit(f"prepare.py: {sys.executable} has no nvcnn: {how}")


def main(arguments: list[str] | None = None) -> int:
    from nvcnn.prepare.flags import parse, prepare  # takes a moment, in which Ctrl-C is one line as well

    flags = parse(arguments)
    try:
        prepare(flags)
    except KeyboardInterrupt:
        again = "" if flags.verify else "; the same command goes on from here"
        print(f"prepare.py: stopped{again}", file=sys.stderr)
        return SAVED_AND_STOPPED
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run(main)
