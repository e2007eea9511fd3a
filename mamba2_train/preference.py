"""Direct preference optimization: of two answers to a prompt, the chosen one is to gain on the
rejected one, measured against the model as it was.

    r(y) = log pi(y | x) - log pi_ref(y | x)      log pi(y | x): sum over the tokens of the answer
    D    = r(chosen) - r(rejected)

    sigmoid   -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)
    ipo       (r(chosen) / n_chosen - r(rejected) / n_rejected - 1 / (2 beta))^2
    hinge     max(0, 1 - beta D)

sigmoid is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), with label smoothing e its cautious
form (Mitchell 2023); ipo is eq. 17 of Azar et al. 2023 (arXiv 2310.12036), per token of an answer,
as its authors and TRL compute it; hinge is SLiC's (Zhao et al. 2023, arXiv 2305.10425).

The reference is the base under the adapter: the same weights, computed with the adapter off, so
there is no second model. What is trained in full beside the adapter has a frozen copy.

Answers are documents of packed rows: 2k the chosen one and 2k + 1 the rejected one of a row's pair
k, each behind the prompt, which has no labels. The loss of a step is the mean over all its pairs,
whichever micro-batch and rank holds them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mamba2_train.loss import IGNORED, aligned
from mamba2_train.model import Mamba2LM
from mamba2_train.module import Mamba2Module
from mamba2_train.parallel.strategy import data_ranks
from mamba2_train.schema import DpoConfig

METRICS = (  # means over pairs, in TRL's sense
    "rewards/chosen",  # beta r
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracy",  # share of the pairs whose chosen answer has the higher reward
    "logps/chosen",
    "logps/rejected",
)


def preference_losses(
    logps: Tensor, reference: Tensor, n_tokens: Tensor, objective: DpoConfig
) -> Tensor:
    """The loss of each pair, (n,).

    Args:
        logps: (n, 2) log-probabilities of the chosen and the rejected answer.
        reference: (n, 2) the same by the reference.
        n_tokens: (n, 2) tokens of the answers.
    """
    ratios = logps - reference
    if objective.loss_type == "ipo":
        chosen, rejected = (ratios / n_tokens).unbind(-1)
        return (chosen - rejected - 1 / (2 * objective.beta)) ** 2
    chosen, rejected = ratios.unbind(-1)
    gain = objective.beta * (chosen - rejected)
    if objective.loss_type == "hinge":
        return F.relu(1 - gain)
    smoothing = objective.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(gain) - smoothing * F.logsigmoid(-gain)


def by_answer(values: Tensor, seq_idx: Tensor) -> Tensor:
    """`values` (b, t) summed over documents, float64: (b, pairs, 2), 0 where there is no such
    document.

    Args:
        seq_idx: (b, t), the document of each token; -1 marks padding.
    """
    room = 2 * (values.shape[1] // 2 + 1)  # a row has no more documents than that
    sums = values.new_zeros(len(values), room + 1, dtype=torch.float64)
    # fp64: two sums of a thousand log-probabilities are nearly equal; padding goes behind the last
    index = torch.where(seq_idx < 0, room, seq_idx).long()
    return sums.scatter_add(1, index, values.double())[:, :room].unflatten(1, (-1, 2))


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """`model` computes as its base does.

    Not through peft's `disable_adapter`, which also takes requires_grad away for as long: FSDP and
    DDP look at that once, at a time of their own.
    """
    layers = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters
    ]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class PreferenceModule(Mamba2Module):
    """Trains the adapters of a Mamba2LM on preference pairs.

    Must be made before the weights of a run that goes on are loaded: what it copies is the
    reference.

    Args:
        objective: which loss; the other arguments are Mamba2Module's.
    """

    reference_passes = 1

    def __init__(self, model: Mamba2LM, *rest: Any, objective: DpoConfig, **options: Any) -> None:
        super().__init__(model, *rest, **options)
        self.objective = objective
        in_full = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad and "lora_" not in name
        }
        self.copied = list(in_full)
        self.copies = nn.ParameterList(
            nn.Parameter(p.detach().clone(), requires_grad=False) for p in in_full.values()
        )
        # of train and val: the sums that METRICS are made of, and the number of pairs
        self.sums: dict[str, Tensor | float] = {"train": 0.0, "val": 0.0}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self._log_means("train")

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.sums["val"] = 0.0

    def on_validation_epoch_end(self) -> None:
        self.carried_in_validation = None
        loss, _ = self.validation.reduced(self)
        self.log("val/loss", loss.float(), prog_bar=True)
        self._log_means("val")

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the losses and number of pairs."""
        inputs = aligned(batch)
        with torch.no_grad(), adapters_off(self.model):
            reference = self._reference(inputs)
        out = self.model(**inputs, reduction="none")
        seq_idx = inputs["seq_idx"]
        n_tokens = by_answer(inputs["shift_labels"] != IGNORED, seq_idx)
        there = n_tokens.all(-1)  # (b, pairs)
        logps, before = (-by_answer(x, seq_idx)[there] for x in (out.loss, reference))
        losses = preference_losses(logps, before, n_tokens[there], self.objective)
        self._add("train" if self.training else "val", logps.detach(), before)
        return losses.sum(), there.sum()

    def _reference(self, inputs: dict[str, Tensor]) -> Tensor:
        """Losses of the tokens (b, t) by the base."""
        if not self.copied:
            return self.model(**inputs, reduction="none").loss
        weights: dict[str, Tensor] = dict(zip(self.copied, self.copies, strict=True))
        keywords = {**inputs, "reduction": "none"}
        return torch.func.functional_call(self.model, weights, (), keywords).loss

    def _add(self, part: str, logps: Tensor, reference: Tensor) -> None:
        chosen, rejected = (self.objective.beta * (logps - reference)).unbind(-1)
        margins = chosen - rejected
        columns = chosen, rejected, margins, (margins > 0).double(), *logps.unbind(-1)
        n_pairs = torch.ones_like(margins)
        self.sums[part] = self.sums[part] + torch.stack([*columns, n_pairs]).sum(-1)

    def _log_means(self, part: str) -> None:
        sums, self.sums[part] = self.sums[part], 0.0
        if not isinstance(sums, Tensor):  # no batch at all, on any rank
            return
        _, group = data_ranks(self.trainer)
        *total, n_pairs = self.trainer.strategy.reduce(sums, group, reduce_op="sum")
        means = {f"{part}/{name}": s / n_pairs for name, s in zip(METRICS, total, strict=True)}
        # a step that was left out, for its loss is no number, has no metrics
        if all(bool(mean.isfinite()) for mean in means.values()):
            self.log_dict({name: mean.float() for name, mean in means.items()})
