"""mamba2-eval as it is typed, under torchrun; tasks of the harness's own are left out, for to index
them takes long."""

import contextlib
from functools import partial

from mamba2_train.commands.evaluate import main

if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        from lm_eval import tasks

        tasks.TaskManager = partial(tasks.TaskManager, include_defaults=False)
    main()
