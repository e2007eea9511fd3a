"""Text from a model.

`generate` continues token ids, `complete` texts; `read` makes of a prompt what can be continued any
number of times, and `save_prefix` and `load_prefix` keep that in a file.
"""

from mamba2_train.generation.chat import Conversation
from mamba2_train.generation.loop import generate
from mamba2_train.generation.prefix import Prefix, load_prefix, read, save_prefix
from mamba2_train.generation.sampling import Sampling
from mamba2_train.generation.text import Completion, GrowingText, complete

__all__ = [
    "Completion",
    "Conversation",
    "GrowingText",
    "Prefix",
    "Sampling",
    "complete",
    "generate",
    "load_prefix",
    "read",
    "save_prefix",
]
