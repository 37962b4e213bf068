"""Planned diffusion behind ``model.generate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pdiff_runtime.engine import EngineConfig, GenerationParams
from pdiff_runtime.engine.params import check_type, recommended
from pdiff_runtime.hf.sharing import llm_of
from pdiff_runtime.plan import ControlTokens

ENGINE_CONFIG = EngineConfig(prefix_cache=False, pack_weights=False)
"""Weights may be trained between two calls, so no keys outlive one; and they are not copied."""

_FILTERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
}
"""Processors that are settings of ours: the field, which is also their attribute."""

_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
_MODEL_KWARGS = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache")
_SAID_BY_GENERATE = {
    "max_tokens": "max_new_tokens",
    "temperature": "do_sample and temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "n": "num_return_sequences",
}
"""Fields of ``GenerationParams`` that ``generate`` has arguments of its own for."""


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Any,
    generation_config: Any,
    *,
    pdiff_params: GenerationParams | None = None,
    pdiff_tokenizer: Any = None,
    pdiff_tags: ControlTokens | None = None,
    pdiff_engine_config: EngineConfig = ENGINE_CONFIG,
    **model_kwargs: Any,
) -> Tensor:
    """Answer prompts by planned diffusion, from the model's own weights; none is copied.

    For ``model.generate(**inputs, custom_generate=pdiff_runtime.hf.generate, ...)``, which prepares
    the positional arguments. Its ``max_new_tokens``, ``max_length``, ``do_sample``,
    ``temperature``, ``top_p``, ``top_k``, ``num_return_sequences`` and ``pad_token_id`` mean what
    they always do; without ``do_sample`` the most likely tokens are taken. The engine is kept with
    the model for the next call.

    ``model.generate`` does not hand ``tokenizer``, ``streamer`` and ``assistant_model`` on to a
    callable: a streamer gets the prompt and nothing else, not even its end.

    Args:
        model: A model of a family that :class:`pdiff_runtime.Decoder` runs, not quantised and
            without adapters.
        input_ids: ``[batch, prompt_len]`` int64, padded on the left where ``attention_mask`` is 0.
        logits_processor: What ``generate`` made of its arguments.
        stopping_criteria: The same.
        generation_config: The same.
        pdiff_params: What ``generate`` has no words for: mode, rule, seed and so on. None takes
            what the checkpoint's ``generation_config.json`` recommends under "pdiff".
        pdiff_tokenizer: A fast tokenizer with the control tags. Stop strings need one, and with one
            its other special tokens are never written.
        pdiff_tags: Control tokens; None takes them from the tokenizer.
        pdiff_engine_config: Sizes of the engine. With a prefix cache, answers after training are
            wrong; packed weights are a copy.
        model_kwargs: ``attention_mask``, and others that change nothing here.

    Returns:
        ``[batch, prompt_len + new]`` int64: the prompts as they came, the answers with eos where
        they stopped by themselves within ``max_new_tokens``, padding on the right.

    Raises:
        ValueError: An argument that planned diffusion can not honour, by name; a model or prompt
            that the engine refuses.
        GenerationError: An answer failed.
    """
    _check(generation_config, stopping_criteria, model_kwargs)
    check_type("pdiff_engine_config", pdiff_engine_config, EngineConfig)
    if pdiff_tags is not None:
        check_type("pdiff_tags", pdiff_tags, ControlTokens)
    elif pdiff_tokenizer is None:
        raise ValueError(
            "pdiff_tags, pdiff_tokenizer: expected one of them, got neither "
            "(generate does not hand tokenizer= on)"
        )
    num_answers = generation_config.num_return_sequences or 1
    params = dataclasses.replace(
        recommended(getattr(generation_config, "pdiff", {}), "generation_config")
        if pdiff_params is None
        else _checked(pdiff_params),
        **_filters(logits_processor, bool(generation_config.do_sample)),
        max_tokens=stopping_criteria.max_length - input_ids.shape[1],
        n=num_answers,
    )
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))[::num_answers]
    llm = llm_of(model, pdiff_tokenizer, pdiff_tags, pdiff_engine_config)
    _check_eos(stopping_criteria, llm.tags.eos)
    answers = []
    for output in llm.generate(prompts, params):
        if output.error is not None:
            raise output.error
        eos = [llm.tags.eos] if output.finish_reason == "stop" else []
        answers.append([*output.token_ids, *eos][: params.max_tokens])
    pad = generation_config.pad_token_id
    return _side_by_side(input_ids, answers, llm.tags.eos if pad is None else pad)


def _check(
    generation_config: Any, stopping_criteria: Iterable[Any], model_kwargs: Mapping[str, Any]
) -> None:
    """Refuse what would be ignored otherwise."""
    mode = generation_config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise ValueError(
            f"generation mode: expected greedy_search or sample, got {mode} "
            f"(num_beams={generation_config.num_beams})"
        )
    if generation_config.return_dict_in_generate:
        raise ValueError("return_dict_in_generate: expected False, got True")
    for criterion in stopping_criteria:
        if type(criterion).__name__ not in _CRITERIA:
            raise ValueError(
                f"stopping_criteria: expected none but lengths and eos, got {criterion}"
            )
    for name, value in model_kwargs.items():
        if name not in _MODEL_KWARGS and value is not None and value is not False:
            raise ValueError(f"{name}: custom_generate=pdiff_runtime.hf.generate takes none")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values: expected an empty cache, got one with keys")


def _check_eos(stopping_criteria: Iterable[Any], eos: int) -> None:
    """Refuse other tokens that should end an answer, which would be text to us."""
    for criterion in stopping_criteria:
        if type(criterion).__name__ == "EosTokenCriteria":
            token_ids = criterion.eos_token_id.tolist()
            if set(token_ids) != {eos}:
                raise ValueError(f"eos_token_id: expected {eos}, the eos tag, got {token_ids}")


def _checked(params: GenerationParams) -> GenerationParams:
    """The caller's parameters, which must leave to ``generate`` what it has arguments for."""
    check_type("pdiff_params", params, GenerationParams)
    default = GenerationParams()
    for field, argument in _SAID_BY_GENERATE.items():
        if (value := getattr(params, field)) != getattr(default, field):
            raise ValueError(
                f"pdiff_params: expected {field} as generate's own {argument}, got {value!r}"
            )
    return params


def _filters(processors: Iterable[Any], do_sample: bool) -> dict[str, Any]:
    """Temperature and filters, as the processors have them that ``generate`` made."""
    fields = {"temperature": 1.0 if do_sample else 0.0, "top_p": 1.0, "top_k": 0}
    for processor in processors:
        field = _FILTERS.get(type(processor).__name__)
        if field is None or not do_sample:
            raise ValueError(
                "logits_processor: expected none but temperature, top_k and top_p with do_sample, "
                f"got {type(processor).__name__}"
            )
        fields[field] = getattr(processor, field)
    return fields


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Token ids of each row without its padding."""
    if attention_mask is None:
        return input_ids.tolist()
    is_token = attention_mask.bool()
    if bool((is_token[:, :-1] & ~is_token[:, 1:]).any()):
        raise ValueError("attention_mask: expected padding on the left, got some behind tokens")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, is_token, strict=True)]


def _side_by_side(input_ids: Tensor, answers: Sequence[Sequence[int]], pad: int) -> Tensor:
    """``[batch, prompt_len]`` and ragged answers -> ``[batch, prompt_len + longest]``."""
    longest = max(map(len, answers))
    new = torch.full((len(answers), longest), pad, dtype=input_ids.dtype, device="cpu")
    for row, answer in zip(new, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer, dtype=input_ids.dtype, device="cpu")
    return torch.cat((input_ids, new.to(input_ids.device)), dim=1)
