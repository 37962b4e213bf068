"""The engine as the model "pdiff" of lm-evaluation-harness (extra ``[eval]``).

Importing this module registers it; then it goes by its name, in Python or on a command line::

    lm_eval.simple_evaluate("pdiff", model_args={"steps_ratio": 0.5}, tasks=["gsm8k"])
    python -m pdiff_runtime.eval.harness run --model pdiff --tasks gsm8k --apply_chat_template

Results record how answers were made and how many failed. An answer that failed is empty; nothing
is tried twice.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pdiff_runtime import __version__
from pdiff_runtime.engine import LLM, EngineConfig, GenerationParams, Usage
from pdiff_runtime.eval.answering import answer, has_answer
from pdiff_runtime.eval.knobs import with_knobs
from pdiff_runtime.eval.likelihood import Pair, causal_log_likelihoods

_OF_A_TASK = ("max_tokens", "temperature", "stop", "n", "plan", "logprobs", "record_steps")
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32)}


@register_model("pdiff")
class PlannedDiffusionLM(TemplateLM):
    """A planned-diffusion model.

    Args:
        pretrained: A model, checkpoint folder or hub id; None for the bundled model.
        likelihood: "ar" answers requests for log-likelihoods as mode "ar" would write: a plain
            causal forward, in which no tag may follow. None refuses them, since a plan and its
            spans define no such number.
        max_gen_toks: Tokens of an answer, where the task does not say.
        batch_size: Requests that run at the same time, or "auto" for the engine's own number.
        max_batch_size: The same where ``batch_size`` is "auto".
        device, dtype: Where and how a checkpoint is loaded.
        seed: Of the random numbers; repeats of one request take the seeds that follow.
        knobs: Other fields of :class:`pdiff_runtime.GenerationParams`, as "mode" or "steps_ratio".
            What a task sets, like the temperature, goes into the task's ``generation_kwargs``.

    Raises:
        ValueError: A bad argument, or a model without a tokenizer.
    """

    def __init__(
        self,
        pretrained: LLM | str | None = None,
        *,
        likelihood: str | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str = "cpu",
        dtype: str = "bfloat16",
        seed: int = 0,
        **knobs: Any,
    ) -> None:
        super().__init__()
        if likelihood not in (None, "ar"):
            raise ValueError(f"likelihood: expected None or 'ar', got {likelihood!r}")
        for name in _OF_A_TASK:
            if name in knobs:
                raise ValueError(f"{name}: belongs to a task (gen_kwargs), not to the model")
        if isinstance(pretrained, LLM):
            self.llm, self.name = pretrained, "custom"
        else:
            if dtype not in _DTYPES:
                raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
            if device.startswith("cuda") and not torch.cuda.is_available():
                device = "cpu"  # the harness says cuda:0 where the user says nothing
            self.llm = LLM(pretrained, dtype=_DTYPES[dtype], device=device)
            self.name = pretrained or "bundled"
        if self.llm.tokenizer is None:
            raise ValueError("pretrained: expected a model with a tokenizer")
        if str(batch_size).startswith("auto"):
            batch_size = max_batch_size or EngineConfig().max_requests
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: expected a number above 0 or 'auto', got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.likelihood = likelihood
        self.params = with_knobs(
            self.llm.default_params, knobs | {"seed": seed, "max_tokens": max_gen_toks}
        )
        self.finish_reasons: collections.Counter[str] = collections.Counter()
        self.usages: list[Usage] = []

    # --- text and tokens ---

    @property
    def tokenizer_name(self) -> str:
        """What tells cached requests of one model from those of another."""
        return f"pdiff-{self.name}"

    @property
    def eot_token_id(self) -> int:
        """The end of a text, and what stands before one that has no context."""
        return self.llm.tags.eos

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.llm.model.config.max_position

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; tags of the chat template become tokens, and nothing is added."""
        assert self.llm.tokenizer is not None
        return self.llm.tokenizer.encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model reads it.

        Raises:
            ValueError: A control tag in a message.
            NotImplementedError: The model's reply is begun by the caller.
        """
        if not add_generation_prompt:
            raise NotImplementedError("gen_prefix: a reply starts with the model's own plan")
        assert self.llm.tokenizer is not None
        return self.llm.tokenizer.decode(self.llm.encode(chat_history))

    # --- requests ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests ``(context, generation_kwargs)``."""
        num_seen: collections.Counter[int] = collections.Counter()
        params = []
        for request in requests:
            params.append(self._params(request.args[1], repeat=num_seen[id(request)]))
            num_seen[id(request)] += 1
        outputs, _ = answer(
            self.llm, [self.tok_encode(request.args[0]) for request in requests], params,
            batch=self.batch_size, progress=not disable_tqdm,
        )  # fmt: skip
        self.finish_reasons.update(output.finish_reason for output in outputs)
        self.usages += [output.usage for output in outputs]
        texts = [output.text if has_answer(output) else "" for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, gen_kwargs: Mapping[str, Any], *, repeat: int) -> GenerationParams:
        """Parameters of one request; its repeats differ by their seeds."""
        fields = dict(normalize_gen_kwargs(dict(gen_kwargs), self.params.max_tokens))
        del fields["do_sample"]  # the temperature is 0 where it is False
        fields.setdefault("temperature", 0.0)
        params = with_knobs(
            self.params,
            {"max_tokens": fields.pop("max_gen_toks"), "stop": fields.pop("until")} | fields,
        )
        return dataclasses.replace(params, seed=params.resolve_seed() + repeat)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether they are the likeliest."""
        self._need_likelihood()
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            pairs.append((context[-room:] if room > 0 else [], continuation))
        return self._log_likelihoods(pairs)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probabilities of whole texts, window by window."""
        self._need_likelihood()
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(value for value, _ in self._log_likelihoods(pairs)))
        return totals

    def _log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        tags = self.llm.tags
        banned = sorted(tags.control_ids - {tags.eos})
        return causal_log_likelihoods(self.llm.model, pairs, banned_ids=banned)

    def _need_likelihood(self) -> None:
        if self.likelihood is None:
            raise NotImplementedError(
                "pdiff: a plan with spans has no log-likelihood. likelihood=ar among the model "
                "arguments gives that of the same weights read as an autoregressive model."
            )

    # --- results ---

    def get_model_info(self) -> dict[str, Any]:
        """What results depend on, and what answers so far cost; the harness stores it."""
        begun = [usage for usage in self.usages if usage.num_forwards]
        info: dict[str, Any] = {
            "version": __version__,
            "model": self.name,
            "device": str(self.llm.model.lm_head.weight.device),
            "settings": dataclasses.asdict(self.params.resolved()),
            "likelihood": self.likelihood,
            "batch_size": self.batch_size,
            "finish_reasons": dict(self.finish_reasons),
        }
        if begun:
            info["mean_critical_path"] = statistics.fmean(u.critical_path for u in begun)
            info["median_seconds"] = statistics.median(usage.seconds for usage in begun)
        return {"pdiff": info}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
