"""Lightning's strategy for models whose parameters are spread over the ranks.

Lightning's own ModelParallelStrategy, with what it lacks: a mesh whose dimensions are called by
what is split over them, one reduction of the gradients for a whole window of accumulation, and
checkpoints that are whole or not there, of what is trained, readable by any number of ranks.

    data      ranks that see different tokens and share the weights (FSDP2)
    tensor    ranks that see the same tokens and share the heads of each layer

Where rows are split (context parallelism), `context` consecutive ranks of the data dimension see
the same rows, each its part of them. To the weights they are ranks like the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from mamba2_train.background import Background, copied
from mamba2_train.parallel import checkpoint as sharded
from mamba2_train.parallel.context_parallel import own_part
from mamba2_train.parallel.shards import give_back, reduce_gradients
from mamba2_train.parallel.sizes import CONTEXT, DATA, TENSOR, Sizes


class MeshStrategy(ModelParallelStrategy):
    """Runs a model that `start.sharded_model` has built on `device_mesh`.

    Args:
        sizes: ranks of the dimensions; they multiply to the number of processes.
        reduce_each_batch: reduce gradients after each micro-batch of a window, not after its last.
        cpu_offload: parameters that are cut, and the optimizer's state of them, are on the host.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        reduce_each_batch: bool = False,
        cpu_offload: bool = False,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(sizes.weights, sizes.tensor, timeout=timeout)
        self.sizes = sizes
        self.context: ProcessGroup | None = None  # the ranks that share this one's rows
        self.reduce_each_batch = reduce_each_batch
        self.cpu_offload = cpu_offload
        self.background: Background | None = None  # writes checkpoints while training goes on
        self.saving_group: dist.ProcessGroup | None = None  # through which the writers talk
        self.written: Path | None = None  # the last checkpoint

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        rank = self.device_mesh[DATA].get_local_rank() // self.sizes.context
        return {"num_replicas": self.sizes.data, "rank": rank}

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        """All ranks that share rows get the same batch, and take their parts of it."""
        if self.context is not None:
            model: Any = self._module.model
            part = own_part(batch, self.context.rank(), self.context.size(), model.config.d_conv)
            batch = {name: value for name, value in batch.items() if name == "position"} | part
        return super().batch_to_device(batch, device, dataloader_idx)

    def start(self) -> DeviceMesh:
        """Start the processes, if nobody has, and connect them: a model is built on the mesh."""
        if self.launcher is not None:
            self.launcher.launch(self.setup_environment)
        else:
            self.setup_environment()
        return self.device_mesh

    def setup_environment(self) -> None:
        """Lightning comes here for each validation and fit; one mesh serves all."""
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        if self._device_mesh is None:
            device, sizes = self.root_device.type, self.sizes
            self._device_mesh = init_device_mesh(
                device, (sizes.weights, sizes.tensor), mesh_dim_names=(DATA, TENSOR)
            )
            if sizes.context > 1:
                rows = init_device_mesh(
                    device,
                    (sizes.data, sizes.context, sizes.tensor),
                    mesh_dim_names=(DATA, CONTEXT, TENSOR),
                )
                self.context = rows.get_group(CONTEXT)
            self.saving_group = dist.new_group(backend="gloo", timeout=self._timeout)

    def setup(self, trainer: L.Trainer) -> None:
        """The model is on its devices already, in its own dtypes."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.barrier()
        give_back(self._module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        assert self.model is not None
        if self.reduce_each_batch:
            yield
            return
        reduce_gradients(self.model, False)
        try:
            yield
        finally:
            reduce_gradients(self.model, True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return sharded.weights(self._module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return sharded.optimizer_state(self._module, getattr(optimizer, "_optimizer", optimizer))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        # of one step, before and after its validation: the weights are the same
        again = self.broadcast(path == self.written and path.exists())
        self.written = path
        if self.background is not None:
            checkpoint = copied(checkpoint)
        save = partial(sharded.save, checkpoint, path, self.saving_group, same_tensors=again)
        save() if self.background is None else self.background.do(save)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        return sharded.load(path, self._module, self.optimizers)

    @property
    def _module(self) -> L.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def data_ranks(trainer: L.Trainer) -> tuple[int, Any]:
    """How many ranks see tokens of their own, and their process group; None: all that there are."""
    strategy = trainer.strategy
    if isinstance(strategy, MeshStrategy):
        return strategy.sizes.weights, strategy.device_mesh[DATA].get_group()
    return trainer.world_size, None


def row_ranks(trainer: L.Trainer) -> int:
    """How many ranks, or groups of ranks, see rows of their own."""
    strategy = trainer.strategy
    return strategy.sizes.data if isinstance(strategy, MeshStrategy) else trainer.world_size
