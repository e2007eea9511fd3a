"""A Mamba2LM in EleutherAI's lm-evaluation-harness, registered there as `mamba2-train`.

The harness asks for log-likelihoods of continuations and for generated text; batches are padded on
the right, which no earlier position sees. Where there are several processes, each answers every
n-th question and all get all answers, so that the harness sees one model.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from mamba2_train.data.tokenizer import pad_id
from mamba2_train.generation import complete
from mamba2_train.model import Mamba2LM

Question = TypeVar("Question")
Answer = TypeVar("Answer")
SEGMENT = 1024  # tokens of a long text that one pass reads


@register_model("mamba2-train")
class HarnessModel(TemplateLM):
    """Args:
    model, tokenizer: as `load_pretrained` and `load_tokenizer` give them.
    batch_size: requests in one pass.
    """

    def __init__(self, model: Mamba2LM, tokenizer: Any, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        special = True if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_special_tokens=special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, however long, each token given all before it; eos goes before the first,
        as the harness has it."""

        def answered(some: Sequence[Instance]) -> list[float]:
            found = []
            for request in tqdm(some, disable=disable_tqdm):
                ids = [self.prefix_token_id, *self.tok_encode(request.args[0], False)]
                found.append(self._of_long(ids))
            return found

        return _dealt(requests, answered)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return _dealt(requests, lambda some: self._texts(some, disable_tqdm))

    def _texts(self, requests: Sequence[Instance], disable_tqdm: bool) -> list[str]:
        texts = []
        for request in tqdm(requests, disable=disable_tqdm):
            context, options = request.args
            stop = options.get("until") or []
            sampled = options.get("do_sample", options.get("temperature", 0) > 0)
            (completion,) = complete(
                self.model,
                self.tokenizer,
                [self.tok_encode(context) or [self.prefix_token_id]],
                stop=[stop] if isinstance(stop, str) else stop,
                max_new_tokens=options.get("max_gen_toks", 256),
                temperature=options.get("temperature", 1.0) if sampled else 0.0,
                top_p=options.get("top_p", 1.0),
                top_k=options.get("top_k"),
                seed=0,
            )
            texts.append(completion.text)
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        return _dealt(requests, lambda some: self._of_tokens(some, disable_tqdm))

    @torch.no_grad()
    def _of_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        # the longest first: what shares a batch is of like length
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        for start in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm):
            some = order[start : start + self.batch_size]
            rows = [[*requests[i][1], *requests[i][2]][:-1] for i in some]
            input_ids = torch.full((len(rows), len(rows[0])), pad_id(self.tokenizer))
            for r, row in enumerate(rows):
                input_ids[r, : len(row)] = torch.tensor(row)
            device = self.model.lm_head.weight.device
            logits = self.model(input_ids.to(device)).logits
            for r, i in enumerate(some):
                target = torch.tensor(requests[i][2], device=device)
                n = len(rows[r])
                part = F.log_softmax(logits[r, n - len(target) : n].float(), -1)
                chosen = part.gather(1, target[:, None]).double().sum()
                found[i] = (float(chosen), bool((part.argmax(-1) == target).all()))
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _of_long(self, ids: list[int]) -> float:
        device = self.model.lm_head.weight.device
        inputs, targets = (torch.tensor([x], device=device) for x in (ids[:-1], ids[1:]))
        total, state = 0.0, None
        for start in range(0, inputs.shape[1], SEGMENT):
            some, labels = (x[:, start : start + SEGMENT] for x in (inputs, targets))
            out = self.model(
                some, shift_labels=labels, state=state, return_state=True, reduction="none"
            )
            state = out.state
            total -= float(out.loss.double().sum())
        return total


def _dealt(
    questions: Sequence[Question], answer: Callable[[Sequence[Question]], list[Answer]]
) -> list[Answer]:
    """All answers, in order, of which every process has given its share."""
    if not torch.distributed.is_initialized():
        return answer(questions)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, answer(questions[rank::world]))
    return [parts[i % world][i // world] for i in range(len(questions))]
