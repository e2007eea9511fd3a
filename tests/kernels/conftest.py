"""Where the Triton kernels' tests run: on the interpreter, and never silently nowhere."""

import pytest
import torch


@pytest.fixture
def interpreter() -> None:
    """Triton's interpreter, which a machine without a GPU must have; with one, test_triton_gpu.py
    runs the kernels themselves."""
    import triton

    if torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        pytest.skip("this machine has a GPU: run with TRITON_INTERPRET=1 to test here as well")
    assert triton.knobs.runtime.interpret, (
        "something imported Triton before TRITON_INTERPRET was set"
    )
