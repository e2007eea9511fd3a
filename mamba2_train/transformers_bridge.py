"""Our ops inside transformers' Mamba2 model.

    model = accelerate(AutoModelForCausalLM.from_pretrained(...))

The weights, the class of the model and its checkpoints stay as they are. Its mixers compute with
`mamba2_kernels`, and with that what is wrong or missing in the stock path becomes right:

- `model(input_ids, seq_idx=...)`: packed documents do not see each other, nor does the loss learn
  to predict the first token of one from the last of another. The stock model drops `seq_idx`.
- Padding on either side leaves no trace, in a cache neither.
- `in_proj` and `out_proj` are called as modules, so LoRA on them is heard; peft, which refuses it
  on `out_proj` because fused kernels read its weight, is told that these do not.
- One-token steps honour `time_step_limit`.
"""

from typing import Any

import peft.tuners.tuners_utils
import torch
from torch import Tensor, nn
from transformers import Cache, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, Mamba2Model

from mamba2_kernels import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    ssd_scan,
    ssd_step,
)
from mamba2_train.errors import UserError
from mamba2_train.loss import IGNORED

_refuse = peft.tuners.tuners_utils._check_lora_target_modules_mamba


def accelerate(model: nn.Module) -> nn.Module:
    """Make the Mamba2 model in `model`, in place, use our ops; returns `model`.

    Args:
        model: a Mamba2Model or Mamba2ForCausalLM of transformers, or a module that holds one, such
            as peft's wrapper.

    Raises:
        UserError: there is no such model in it, or one with another activation than silu.
    """
    modules = list(model.modules())
    mixers = [m for m in modules if isinstance(m, Mamba2Mixer)]
    backbones = [m for m in modules if isinstance(m, Mamba2Model)]
    if not mixers or not backbones:
        raise UserError(
            f"{type(model).__name__} holds no Mamba2 model of transformers: give a "
            "Mamba2ForCausalLM, or ours (Mamba2LM) as it is"
        )
    if (activation := mixers[0].activation) not in ("silu", "swish"):
        raise UserError(f"the model's hidden_act is {activation!r}; our ops compute silu only")
    for mixer in mixers:
        mixer.__class__ = AcceleratedMixer  # a subclass without fields of its own
    for module in backbones + [m for m in modules if isinstance(m, Mamba2ForCausalLM)]:
        if not getattr(module, _MARK, False):
            setattr(module, _MARK, True)
            is_backbone = isinstance(module, Mamba2Model)
            hook = _give_seq_idx if is_backbone else _take_seq_idx
            module.register_forward_pre_hook(hook, with_kwargs=True)
            if not is_backbone:
                module.register_forward_hook(_forget_seq_idx, always_call=True)
    peft.tuners.tuners_utils._check_lora_target_modules_mamba = _check_lora_targets
    return model


class AcceleratedMixer(Mamba2Mixer):
    """transformers' mixer with our ops."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(batch, seq_len, hidden_size) -> the same.

        Args:
            attention_mask: (batch, seq_len), 0 marks padding.
            seq_idx: (batch, seq_len) int32, the document of each token; -1 marks padding.
        """
        seq_idx = _with_padding(seq_idx, attention_mask)
        conv_state = ssm_state = None
        if cache_params is not None:
            conv_state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
            ssm_state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
        z, xBC, dt = self.in_proj(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        if conv_state is not None:
            # transformers keeps d_conv inputs, of which the oldest is never read
            conv_state = conv_state[..., 1:].transpose(1, 2).to(xBC.dtype).contiguous()
        one_token = hidden_states.shape[1] == 1 and seq_idx is None and not torch.is_grad_enabled()
        if one_token and conv_state is not None and ssm_state is not None:
            y = self._step(xBC[:, 0], dt[:, 0], conv_state, ssm_state)[:, None]
        else:
            y, conv_state, ssm_state = self._scan(
                xBC, dt, seq_idx, conv_state, ssm_state, cache_params is not None
            )
        if cache_params is not None and conv_state is not None and ssm_state is not None:
            kept = nn.functional.pad(conv_state.transpose(1, 2), (1, 0))
            cache_params.update_conv_state(
                kept, self.layer_idx, conv_kernel_size=self.conv_kernel_size
            )
            cache_params.update_recurrent_state(ssm_state, layer_idx=self.layer_idx)
        y = gated_rms_norm(
            y.flatten(2),
            z,
            self.norm.weight,
            eps=self.norm.variance_epsilon,
            group_size=self.norm.group_size,
        )
        return self.out_proj(y.to(hidden_states.dtype))

    def _scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        seq_idx: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Any, Any]:
        xBC = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            seq_idx=seq_idx,
            initial_state=conv_state,
            return_final_state=keep,
        )
        xBC, conv_state = xBC if keep else (xBC, None)
        x, B, C = self._split(xBC)
        y = ssd_scan(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self._dt_limit(),
            chunk_size=self.chunk_size,
            seq_idx=seq_idx,
            initial_state=ssm_state,
            return_final_state=keep,
        )
        y, ssm_state = y if keep else (y, None)
        return y, conv_state, ssm_state

    def _step(self, xBC: Tensor, dt: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token; both states are updated in place."""
        xBC = causal_conv1d_step(xBC, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        x, B, C = self._split(xBC)
        return ssd_step(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            ssm_state,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self._dt_limit(),
        )

    def _dt_limit(self) -> tuple[float, float]:
        lowest, highest = self.time_step_limit  # a list, where a config was read from a file
        return lowest, highest

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_bc = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, d_bc, d_bc], dim=-1)
        heads, groups = (self.num_heads, self.head_dim), (self.n_groups, self.ssm_state_size)
        return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)


_MARK = "_uses_mamba2_kernels"
_SEQ_IDX = "_mamba2_kernels_seq_idx"


def _take_seq_idx(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """The causal LM's forward drops `seq_idx`, so it is left with the backbone; and the labels are
    shifted inside, where a document's first token would be predicted by another, or by padding."""
    seq_idx = kwargs.pop("seq_idx", None)
    setattr(model.backbone, _SEQ_IDX, seq_idx)
    seq_idx = _with_padding(seq_idx, kwargs.get("attention_mask"))
    labels = kwargs.get("labels")
    if seq_idx is not None and labels is not None:
        starts = torch.ones_like(labels, dtype=torch.bool)
        starts[:, 1:] = (seq_idx[:, 1:] != seq_idx[:, :-1]) | (seq_idx[:, 1:] < 0)
        kwargs["labels"] = labels.masked_fill(starts, IGNORED)
    return args, kwargs


def _give_seq_idx(backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    seq_idx = getattr(backbone, _SEQ_IDX, None)
    if kwargs.get("seq_idx") is None and seq_idx is not None:
        kwargs["seq_idx"] = seq_idx
    return args, kwargs


def _forget_seq_idx(model: nn.Module, args: Any, output: Any) -> None:
    setattr(model.backbone, _SEQ_IDX, None)


def _with_padding(seq_idx: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None if seq_idx is None else seq_idx.to(torch.int32)
    if seq_idx is None:
        seq_idx = torch.zeros_like(attention_mask, dtype=torch.int32)
    return seq_idx.to(torch.int32).masked_fill(attention_mask == 0, -1)


def _check_lora_targets(peft_config: Any, model: nn.Module, target_name: str) -> None:
    if not (getattr(model, _MARK, False) and target_name == "out_proj"):
        _refuse(peft_config, model, target_name)
