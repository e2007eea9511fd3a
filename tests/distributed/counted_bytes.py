"""Every collective of a training step, counted as the processes call it.

    torchrun --nproc-per-node N counted_bytes.py OUT CASE...

A case is DATAxTENSOR-VARIANT-GROUPS-MODE: what is trained, groups of heads, checkpointing. Writes
to OUT, for each case, what was called: [kind, ranks, bytes], and how often. Run by
tests/test_cluster.py, which takes `small` and `adapt` from here.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from mamba2_train.adapters import add_lora
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.parallel.shards import average_replicated, shard
from mamba2_train.parallel.sizes import DATA, TENSOR
from mamba2_train.parallel.tensor_parallel import parallelize

ROWS, SEQ_LEN = 3, 200  # 600 rows of the head: a chunk of 512 and a rest
KINDS = {
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "allreduce_": "reduce",
}


def small(groups):
    """Rows that no number of ranks divides, in the vocabulary too."""
    return Mamba2Config(
        d_model=36, n_layers=3, vocab_size=81, d_state=8, headdim=9, n_groups=groups
    )


def adapt(model, variant):
    if variant == "lora":
        add_lora(model, ["in_proj", "out_proj"], r=3, alpha=6, in_full=["conv1d", "A_log"])


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        name = name.partition(".")[0]
        if namespace == "c10d":
            tensors = args[1] if name == "_reduce_scatter_base_" else args[0]
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            n = dist.ProcessGroup.unbox(group).size()
            self.found[KINDS[name], n, sum(t.nbytes for t in tensors)] += 1
        return func(*args, **(kwargs or {}))


def run(case):
    sizes, variant, groups, mode = case.split("-")
    data, tensor = map(int, sizes.split("x"))
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=(DATA, TENSOR))
    model = initialize(Mamba2LM(small(int(groups))))
    adapt(model, variant)
    model.set_checkpointing(mode)
    model.train()
    if tensor > 1:
        parallelize(model, mesh[TENSOR])
    mixed = variant == "mixed"
    shard(model, mesh[DATA], products=torch.bfloat16 if mixed else None)
    ids = torch.randint(0, 81, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    with Collectives() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(ids, shift_labels=ids, reduction="sum").loss
        loss.backward()
        average_replicated(model.parameters(), mesh[DATA])
    return [[*key, times] for key, times in counted.found.items()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {case: run(case) for case in sys.argv[2:]}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
