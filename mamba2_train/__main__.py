"""`python -m mamba2_train` is `mamba2-train`, for `torchrun -m`."""

from mamba2_train.commands.train import main

if __name__ == "__main__":
    main()
