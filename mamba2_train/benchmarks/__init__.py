"""Training beside transformers + peft + TRL: `make bench`, `python -m mamba2_train.benchmarks`.

`workloads` says what is run, `prepare` makes weights and rows that both sides read, `ours` and
`peer` are one side each, in a process of its own, `pair` lets them step in turn, `report` writes
BENCHMARKS.md. The operations alone are in `mamba2_kernels.benchmark`.
"""
