"""What the hardware of this process computes with."""

import torch


def products_in_bfloat16(accelerator: str) -> tuple[bool, str]:
    """Whether matrix products in bfloat16 are products of the hardware, and why.

    Args:
        accelerator: "cpu" leaves GPUs out of account.
    """
    if torch.cuda.is_available() and accelerator != "cpu":
        major, minor = torch.cuda.get_device_capability()
        return major >= 8, f"the GPU is sm_{major}{minor}, and sm_80 is the first that has them"
    if torch.cpu._is_amx_tile_supported():
        return True, "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "the CPU has AVX512-BF16"
    return False, "the CPU has neither AVX512-BF16 nor AMX"
