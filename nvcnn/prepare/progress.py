"""Shows how far a run is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(images: int) -> Iterator[Callable[[int, str, list[str]], None]]:
    """Shows a bar on a terminal with tqdm, else a line per shard. What is wrong is printed in both cases.

    Yields a function to call after each shard with its number of images, its line, and what is wrong with it.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None  # type: ignore[assignment, misc]
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(total=images, unit="image", dynamic_ncols=True) as bar:

            def update(n: int, line: str, wrong: list[str]) -> None:
                for text in wrong:
                    bar.write(text)
                bar.update(n)

            yield update
    else:
        yield lambda n, line, wrong: print(*wrong, line, sep="\n", flush=True)
