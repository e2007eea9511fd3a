"""What several test modules share: small models with no weight at its initial value, and
transformers' Mamba2ForCausalLM holding the same ones, which is what most of them call the truth."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["MAMBA2_CACHE"] = tempfile.mkdtemp()  # of the session, subprocesses included

import torch

if not torch.cuda.is_available():
    # Triton kernels run on Triton's interpreter, which is chosen when Triton is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from mamba2_train.model import Mamba2Config, Mamba2LM

torch.set_num_threads(1)  # the models are so small that threads only get in each other's way


@pytest.fixture(scope="session", autouse=True)
def _no_cache_is_left() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["MAMBA2_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Mamba2Config]:
    """Eight heads in two layers, chunks of 16; any field may be given."""

    def make(**fields: Any) -> Mamba2Config:
        small = {"d_model": 32, "n_layers": 2, "vocab_size": 80, "d_state": 8, "headdim": 8}
        return Mamba2Config(**(small | {"chunk_size": 16} | fields))

    return make


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Mamba2LM]:
    """A model whose every weight is drawn: norms and D away from one, biases away from zero."""

    def make(
        config: Mamba2Config, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Mamba2LM:
        model = Mamba2LM(config).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                kind = name.rpartition(".")[2] if "norm" not in name else "norm"
                if kind in ("norm", "D"):
                    draw = 1 + 0.4 * draw
                elif kind == "A_log":
                    draw = draw - 1  # decays slow enough for chunks to depend on one another
                elif kind == "dt_bias":
                    draw = draw - 2
                elif kind == "bias":
                    draw = 0.3 * draw
                elif "embeddings" not in name:
                    draw = draw / draw[0].numel() ** 0.5
                weight.copy_(draw)
        return model

    return make


@pytest.fixture(scope="session")
def transformers_model() -> Callable[..., transformers.Mamba2ForCausalLM]:
    """transformers' model for our config, with the weights `tensors` under their names."""

    def make(
        config: Mamba2Config, tensors: dict[str, torch.Tensor]
    ) -> transformers.Mamba2ForCausalLM:
        theirs = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                hidden_size=config.d_model,
                num_hidden_layers=config.n_layers,
                vocab_size=config.vocab_size,
                state_size=config.d_state,
                conv_kernel=config.d_conv,
                expand=config.expand,
                head_dim=config.headdim,
                num_heads=config.expand * config.d_model // config.headdim,
                n_groups=config.n_groups,
                chunk_size=config.chunk_size,
                time_step_limit=config.dt_limit,
                layer_norm_epsilon=config.norm_eps,
                residual_in_fp32=config.residual_in_fp32,
                tie_word_embeddings=config.tie_embeddings,
                use_bias=config.use_bias,
                use_conv_bias=config.use_conv_bias,
                use_cache=False,
            )
        )
        theirs.to(tensors["backbone.embeddings.weight"].dtype)
        theirs.load_state_dict(tensors)  # strict
        return theirs

    return make


@pytest.fixture
def torchrun() -> Callable[..., str]:
    """Run a script of tests/distributed on two ranks, and return what it printed."""

    def run(script: str, *arguments: str) -> str:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node=2", str(Path(__file__).parent / "distributed" / script)]
        done = subprocess.run(
            [*launch, *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """mamba2-train in this process, which forgets what a run hands down to processes of its own."""
    from mamba2_train.commands.train import main

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["mamba2-train", *arguments])
        before = dict(os.environ)
        os.environ["COLUMNS"] = "200"
        try:
            main()
        finally:
            os.environ.clear()
            os.environ.update(before)

    return run
