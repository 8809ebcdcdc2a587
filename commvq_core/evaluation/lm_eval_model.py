"""The model class `commvq` of lm-evaluation-harness: any of its tasks on a compressed cache.

A context is cached first, all but its last token, as `generate()` caches a prompt. The last token
and the continuation then come decode-style: each sees its own newest tokens exactly and the older
ones as codes, whether it is scored (log-likelihoods) or generated.

Importing this file registers the class; run as a program it is lm-eval's own command line with it:
``python -m commvq_core.evaluation.lm_eval_model run --model commvq --model_args ...``.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from commvq_core.cache.cache import CommVQCache
from commvq_core.errors import InputError
from commvq_core.evaluation.beginnings import run_tokens
from commvq_core.evaluation.metrics import token_nll
from commvq_core.models import load_model
from commvq_core.progress import Progress, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORWARD = 512  # tokens whose logits are held at once
Tokens = tuple[int, ...]
OpenCache = Callable[[bool], AbstractContextManager[Any]]


@register_model("commvq")
class CommVQLM(HFLM):
    """lm-eval's `hf` class, run on a CommVQCache.

    `pretrained` is what `load_model` takes (hub id, folder, .gguf file), or a loaded model together
    with its `tokenizer`. `codebook` is an artifact's folder or hub id; `window` and `sinks` as in
    CommVQCache. `open_cache` gives other caches instead (EvalCodec.open: strict or not -> context
    manager). `options` go to lm-eval's `hf` class: max_length, add_bos_token, and so on. Raises
    InputError when there is neither codebook nor open_cache, or they don't fit the model.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        codebook: str | None = None,
        *,
        tokenizer: Any = None,
        window: int = 128,
        sinks: int = 4,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        open_cache: OpenCache | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        if open_cache is None and codebook is None:
            raise InputError("no codebook was named", "add codebook=ARTIFACT to --model_args")
        if not str(batch_size).isdecimal():
            raise InputError(f"batch_size {batch_size}", "give a number of rows")
        if isinstance(pretrained, str):
            if device.startswith("cuda") and not torch.cuda.is_available():
                device = "auto"  # lm-eval asks for cuda:0 unless it is told otherwise
            loaded = load_model(pretrained, device=device, dtype=dtype)
            pretrained, tokenizer = loaded.model, loaded.tokenizer
        super().__init__(
            pretrained=pretrained,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            **options,
        )
        self._progress = progress
        self._bar: Task | None = None
        self._open_cache = open_cache or _opener(pretrained, str(codebook), window, sinks)

    # Scoring.

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, whether greedy) of each (text, context, continuation).

        A context is cached once for all its continuations. Sequences longer than the model's
        context lose their first tokens, as with `hf`.
        """
        groups: dict[Tokens, dict[Tokens, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation):,} tokens is longer than the context "
                    f"of {self.max_length:,}",
                    "raise max_length, or choose another task",
                )
            whole = tuple(context + continuation)[-(self.max_length + 1) :]
            cut = len(whole) - len(continuation) - 1
            groups[whole[:cut]][whole[cut:-1]].append(index)
        answers: dict[int, tuple[float, bool]] = {}
        for cached, tails in groups.items():
            with self._open_cache(False) as cache, torch.inference_mode():
                self._fill(cache, torch.tensor([cached], dtype=torch.long))
                for place, (tail, wanted) in enumerate(tails.items()):
                    with _copy_of(cache, needed=place < len(tails) - 1) as own:
                        found = self._score(own, tail, [requests[index][2] for index in wanted])
                    answers.update(zip(wanted, found, strict=True))
            for index in (index for wanted in tails.values() for index in wanted):
                if requests[index][0] is not None:  # None: a window of loglikelihood_rolling
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                    self._advance()
        return [answers[index] for index in range(len(requests))]

    def _score(
        self, cache: Any, tail: Tokens, continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Run `tail` decode-style; its logits score continuations that differ in the last token."""
        _decode_style(cache)
        targets = torch.tensor(continuations, device=self.device)
        sums, greedy = [0.0] * len(continuations), [True] * len(continuations)
        for start in range(0, len(tail), _FORWARD):
            part = slice(start, start + _FORWARD)
            ids = torch.tensor([tail[part]], device=self.device)
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
            best = logits.argmax(-1)
            for index, wanted in enumerate(targets[:, part]):
                sums[index] -= float(token_nll(logits, wanted).double().sum())
                greedy[index] &= bool((best == wanted).all())
        return list(zip(sums, greedy, strict=True))

    def _fill(self, cache: Any, ids: Tensor, mask: Tensor | None = None) -> None:
        """Run `ids` [batch, n] into the empty cache; nobody needs a logit of them."""
        if ids.shape[1] == 0:
            return
        ids = ids.to(self.device)
        mask = torch.ones_like(ids) if mask is None else mask
        run_tokens(self.model, cache, ids, mask, 0, ids.shape[1])

    # Generating.

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """See HFLM: `context` [batch, n], padded on the left."""
        mask = generation_kwargs.get("attention_mask")
        several = max(
            int(generation_kwargs.get(name) or 1) for name in ("num_beams", "num_return_sequences")
        )
        with self._open_cache(False) as cache, torch.inference_mode():
            if several == 1:  # generate() repeats rows of the input, but not of a filled cache
                before = None if mask is None else mask[:, :-1]
                self._fill(cache, context[:, :-1], before)
            output = super()._model_generate(
                context, max_length, stop, past_key_values=cache, **generation_kwargs
            )
        self._advance(context.shape[0])
        return output

    # Progress.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """See LM."""
        with self._watched("log-likelihoods", requests):
            return super().loglikelihood(requests, disable_tqdm or self._progress is not None)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """See LM."""
        with self._watched("texts", None):
            return super().loglikelihood_rolling(
                requests, disable_tqdm or self._progress is not None
            )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """See LM."""
        with self._watched("answers", requests):
            return super().generate_until(requests, disable_tqdm or self._progress is not None)

    @contextlib.contextmanager
    def _watched(self, what: str, requests: list[Any] | None) -> Iterator[None]:
        if self._progress is None or requests is None:
            yield
            return
        with self._progress.task(what, total=len(requests)) as self._bar:
            yield
        self._bar = None

    def _advance(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.advance(count)


def _opener(model: PreTrainedModel, codebook: str, window: int, sinks: int) -> OpenCache:
    from commvq_core.artifact import load_artifact

    artifact = load_artifact(codebook)

    def open_cache(strict: bool) -> AbstractContextManager[Any]:
        return CommVQCache.from_pretrained(
            artifact, model, window=window, sinks=sinks, strict=strict
        )

    return open_cache


def _decode_style(cache: Any) -> None:
    """Caches without codes see every token the same way, one by one or not."""
    if isinstance(cache, CommVQCache):
        cache.strict = True


@contextlib.contextmanager
def _copy_of(cache: Any, *, needed: bool) -> Iterator[Any]:
    """A copy that may be written to; the cache itself where it is not needed any more."""
    twin = copy.deepcopy(cache) if needed else cache
    try:
        yield twin
    finally:
        if needed and hasattr(twin, "close"):
            twin.close()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
