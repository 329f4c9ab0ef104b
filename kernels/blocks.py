"""The blocks of a parameter arena, as the ops that work on them see them.

An arena is a flat buffer of M elements of tensors with two or more dimensions, then V elements of the others. Every
tensor starts on a block, so a block belongs to exactly one tensor. Padding is zero.
"""

from collections.abc import Iterator

from torch import Tensor

BLOCK = 2048  # elements; a program of 128 threads handles one, with 16-byte loads
CHUNK = 256  # blocks a reference works on at a time: 2 MiB of fp32, so that the next operator finds them in the cache


def chunks(matrix_gradient: Tensor, vector_gradient: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields the gradient, as (blocks, BLOCK), and the others, which have as many blocks, in pieces of CHUNK blocks."""
    segments = (matrix_gradient.view(-1, BLOCK), vector_gradient.view(-1, BLOCK))
    gradients = [rows for segment in segments for rows in segment.split(CHUNK) if len(rows)]
    sizes = [len(rows) for rows in gradients]
    return zip(gradients, *(other.split(sizes) for other in others), strict=True)


def count_blocks(op: str, matrix: Tensor, vector: Tensor) -> tuple[int, int]:
    """Returns the blocks of the first segment and of both. Raises ValueError for parts of a block or none."""
    sizes = matrix.numel(), vector.numel()
    if any(n % BLOCK for n in sizes) or not sum(sizes):
        raise ValueError(f"{op}: the segments must be multiples of {BLOCK} elements, not both 0, got {sizes}")
    return sizes[0] // BLOCK, sum(sizes) // BLOCK
