"""The operations of Mamba2: the SSD scan, the causal convolution, the norms, and decoding steps.

Every op is differentiable where that makes sense, exists on every device, and has four backends:
Triton kernels, plain PyTorch, a sequential reference, and `auto`, which picks.
"""

from mamba2_kernels.conv1d import causal_conv1d
from mamba2_kernels.norm import gated_rms_norm, gated_scale, gated_square_sum, rms_norm
from mamba2_kernels.ssd import ssd_scan
from mamba2_kernels.step import MixerStep, causal_conv1d_step, ssd_step

__all__ = [
    "MixerStep",
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_rms_norm",
    "gated_scale",
    "gated_square_sum",
    "rms_norm",
    "ssd_scan",
    "ssd_step",
]
