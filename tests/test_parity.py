"""The LoRA recipe of Hugging Face's Mamba2 page, driven by transformers + peft and by us.

Same weights, same first adapter, same rows in the same order, thirty steps. Theirs is the plain
loop that the page's trainer amounts to: left-padded rows, the mean loss of a batch, AdamW, the
norm clipped at 1, a linear schedule. Two things are lifted here: peft's guard on `out_proj`, and
the label of a row's first token, which transformers would learn from the padding before it.
"""

import contextlib
import types

import lightning as L
import peft.tuners.tuners_utils
import pytest
import torch
import transformers
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers.models.mamba2 import modeling_mamba2

from mamba2_train.adapters import load_adapter
from mamba2_train.commands import extend_hydra
from mamba2_train.module import Mamba2Module
from mamba2_train.schema import TrainConfig, validated

STEPS, LENGTHS = 30, (3, 17, 9, 30, 22, 5)


@pytest.fixture(scope="module")
def recipe() -> TrainConfig:
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose(
            "hf_docs_lora",
            # transformers' schedule ends one step after the last at zero, ours at the last
            overrides=[f"trainer.max_steps={STEPS}", f"scheduler.min_lr_fraction={1 / STEPS}"],
        )
    return validated(TrainConfig, OmegaConf.to_container(composed, resolve=True))


def batches(size: int) -> list[dict[str, torch.Tensor]]:
    """Rows of unequal length, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(STEPS):
        lengths = [LENGTHS[(size * i + j) % len(LENGTHS)] for j in range(size)]
        width = max(lengths)
        ids = torch.randint(0, 80, (size, width), generator=generator)
        mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
        made.append(
            {
                "input_ids": ids,
                "labels": ids.masked_fill(~mask, -100),
                "seq_idx": mask.int() - 1,
            }
        )
    return made


@contextlib.contextmanager
def unguarded(exact: bool):
    """peft takes out_proj; transformers, if `exact`, without its casts to fp32."""
    wide = types.SimpleNamespace(**vars(torch))
    wide.float32 = torch.float64
    with pytest.MonkeyPatch.context() as patch:
        guard = "_check_lora_target_modules_mamba"
        patch.setattr(peft.tuners.tuners_utils, guard, lambda *_: None)
        if exact:
            patch.setattr(modeling_mamba2, "torch", wide)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def theirs(model, folder, config, dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """transformers + peft, as the page has it; the first adapter is written to `folder`."""
    with unguarded(exact=dtype == torch.float64):
        torch.manual_seed(0)
        lora = LoraConfig(
            r=8, target_modules=["embeddings", "in_proj", "out_proj"], task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, lora)
        lora.base_model_name_or_path = "the same weights"
        adapted.save_pretrained(folder, save_embedding_layers=False)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
        losses = []
        for batch in batches(config.data.batch_size):
            real = batch["seq_idx"] >= 0
            first = real & (real.cumsum(1) == 1)
            loss = adapted(
                input_ids=batch["input_ids"],
                attention_mask=real.long(),
                labels=batch["labels"].masked_fill(first, -100),
                use_cache=False,
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return losses, {name: w.detach().clone() for name, w in weights.items()}


def ours(model, folder, config, dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What `mamba2-train` runs: the module, the optimizer and the schedule of the recipe."""
    adapted = load_adapter(model, folder, trainable=True)
    module = Mamba2Module(model, config.optimizer, config.scheduler, config.trainer.max_steps)
    losses: list[float] = []
    add = module.window.add

    def noted(loss_sum, n_tokens):
        losses.append(float(loss_sum.detach() / n_tokens))  # of the batch, which is the step
        add(loss_sum, n_tokens)

    module.window.add = noted
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true" if dtype == torch.float64 else "32-true",
        max_steps=config.trainer.max_steps,
        gradient_clip_val=config.trainer.clip_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = batches(config.data.batch_size)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None, shuffle=False))
    return losses, get_peft_model_state_dict(adapted, save_embedding_layers=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_thirty_steps_equal_transformers_and_peft(
    small_config, random_model, transformers_model, recipe, tmp_path, dtype, tied
):
    model = random_model(small_config(n_groups=2, tie_embeddings=tied), dtype=dtype)
    stock = transformers_model(model.config, model.state_dict())
    before = {name: w.clone() for name, w in model.state_dict().items()}
    expected, their_weights = theirs(stock, tmp_path, recipe, dtype)
    losses, weights = ours(model, tmp_path, recipe, dtype)
    assert len(losses) == len(expected) == STEPS
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(losses, expected, rtol=0, atol=tolerance)
    assert losses[-1] < losses[0]
    assert weights.keys() == their_weights.keys()
    if dtype == torch.float64:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, their_weights[name], rtol=0, atol=1e-8)
    after = {n.replace(".base_layer", ""): w for n, w in model.state_dict().items()}
    assert all(torch.equal(after[name], w) for name, w in before.items())


def test_the_recipe_is_the_pages(recipe):
    assert recipe.adapter.r == 8
    assert recipe.adapter.alpha == LoraConfig().lora_alpha
    assert recipe.adapter.dropout == LoraConfig().lora_dropout
    assert set(recipe.adapter.target_names) == {"embeddings", "in_proj", "out_proj"}
    page = transformers.TrainingArguments(
        num_train_epochs=3, per_device_train_batch_size=2, learning_rate=2e-3
    )
    assert recipe.optimizer.lr == page.learning_rate
    assert recipe.optimizer.betas == (page.adam_beta1, page.adam_beta2)
    assert recipe.optimizer.eps == page.adam_epsilon
    assert recipe.optimizer.weight_decay == page.weight_decay
    assert recipe.trainer.clip_norm == page.max_grad_norm
    assert recipe.trainer.accumulate == page.gradient_accumulation_steps
    assert (recipe.trainer.max_epochs, recipe.data.batch_size) == (3, 2)
    assert (recipe.data.packing, recipe.data.padding_side) == ("none", "left")
    assert recipe.scheduler.kind == page.lr_scheduler_type
    assert recipe.scheduler.warmup_fraction == page.warmup_steps
