"""Triton kernels, one op a file: docstring (math, bytes, source), reference, kernel, launcher.

Imports torch and triton only, and asks for no GPU. NVCNN_KERNELS=auto|reference|triton decides what runs.
"""

from kernels.batch_norm import (
    batch_norm,
    batch_norm_backward,
    batch_norm_data_gradient,
    batch_norm_gradient_sums,
    batch_norm_into,
    norm_gradient,
)
from kernels.batch_norm_statistics import batch_norm_statistics, norm_from_sums, norm_of
from kernels.blocks import BLOCK
from kernels.convolution import convolution
from kernels.convolution_data_gradient import convolution_data_gradient
from kernels.convolution_gradients import convolution_gradients
from kernels.convolution_weight_gradient import convolution_weight_gradient
from kernels.cross_entropy import cross_entropy
from kernels.global_average import global_average
from kernels.gradient_statistics import gradient_statistics
from kernels.gram_gradient import gram_gradient
from kernels.gram_matrix import gram_matrix
from kernels.gram_norm import gram_norm
from kernels.larc_update import larc_update, refresh
from kernels.max_pool import max_pool, max_pool_backward, max_pool_into, max_pool_with_argmax
from kernels.prepare_input import prepare_input, prepare_input_into
from kernels.trust_ratio import trust_ratio

__all__ = [
    "BLOCK",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_data_gradient",
    "batch_norm_gradient_sums",
    "batch_norm_into",
    "batch_norm_statistics",
    "convolution",
    "convolution_data_gradient",
    "convolution_gradients",
    "convolution_weight_gradient",
    "cross_entropy",
    "global_average",
    "gradient_statistics",
    "gram_gradient",
    "gram_matrix",
    "gram_norm",
    "larc_update",
    "max_pool",
    "max_pool_backward",
    "max_pool_into",
    "max_pool_with_argmax",
    "norm_from_sums",
    "norm_gradient",
    "norm_of",
    "prepare_input",
    "prepare_input_into",
    "refresh",
    "trust_ratio",
]
