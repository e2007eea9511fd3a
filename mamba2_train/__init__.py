"""Fine-tune Mamba2 language models."""

import logging


def _is_news(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward from kernels-community" not in record.getMessage()


# On some CPUs bitsandbytes, which peft imports, looks for a package called `kernels` to speed up
# one product that is never asked for here (see quantization.py), and warns when there is none.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
