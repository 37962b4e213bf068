"""Options that commands share, and the model and parameters they stand for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pdiff_runtime.engine import LLM, GenerationParams

Command = TypeVar("Command", bound=Callable[..., Any])

SPINNER = "line"  # in ASCII: terminals need not know Unicode

threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads; default: all cores."
)
device_option = click.option(
    "--device", default="cpu", metavar="NAME", help="cpu (default), cuda or cuda:N."
)


def set_threads(threads: int | None) -> None:
    """Let torch use this many threads; None leaves it as it is."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_device(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: It is no device's name, or torch sees none.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    num_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_seen:
        seen = f"{num_seen} CUDA devices" if num_seen else "no CUDA device"
        raise ValueError(f"device: torch {torch.__version__} sees {seen}, got {name!r}")


def generation_options(*, seed: int | None = None) -> Callable[[Command], Command]:
    """Declare a model and how it generates; :func:`load` takes all of these options.

    Args:
        seed: Of the random numbers unless the user gives one; None has it drawn.
    """
    options = (
        click.option(
            "--model",
            metavar="PATH_OR_ID",
            help="Model folder, GGUF file or hub id; default: bundled.",
        ),
        click.option("--revision", metavar="NAME", help="Branch, tag or commit of the hub id."),
        click.option(
            "--mode",
            metavar="MODE",
            help="planned (default), ar, diffusion, fast_dllm or skeleton.",
        ),
        click.option(
            "--max-tokens",
            type=int,
            metavar="N",
            help="Tokens after the prompt: plan, tags, spans with their pads; default 256.",
        ),
        click.option(
            "--temperature", type=float, metavar="T", help="0 (default): the likeliest token."
        ),
        click.option(
            "--top-p", type=float, metavar="P", help="Sample from this share of probability."
        ),
        click.option("--top-k", type=int, metavar="K", help="Sample from the K likeliest tokens."),
        click.option(
            "--seed",
            type=int,
            default=seed,
            metavar="N",
            help=f"Of the random numbers; default: {'drawn' if seed is None else seed}.",
        ),
        click.option(
            "--unmask",
            metavar="RULE",
            help="Which positions a step writes: entropy, maskgit_plus, topk_margin, origin, "
            "confidence_threshold, factor or entropy_budget; default: what the model recommends, "
            "else entropy.",
        ),
        click.option(
            "--steps-ratio",
            type=float,
            metavar="R",
            help="Denoising steps per token of the longest span or of a block; default 1. Implies "
            "--unmask entropy unless that says otherwise.",
        ),
        click.option("--num-steps", type=int, metavar="N", help="Steps in place of --steps-ratio."),
        click.option(
            "--threshold",
            type=float,
            metavar="X",
            help="Of confidence_threshold (a probability), factor, or entropy_budget (nats).",
        ),
        click.option(
            "--alg-temp",
            type=float,
            metavar="T",
            help="Temperature of the order of positions; default 0.",
        ),
        click.option(
            "--length-scale",
            type=float,
            metavar="X",
            help="Tokens per unit of a topic's number; default: the model's own.",
        ),
        click.option(
            "--block-len", type=int, metavar="N", help="Tokens of a block in fast_dllm; default 32."
        ),
        click.option(
            "--block-cache",
            metavar="WHICH",
            help="What fast_dllm keeps while it fills a block: prefix (default), dual or off.",
        ),
        click.option(
            "--joint/--isolated",
            "joint",
            default=None,
            help="Whether the spans of a round see one another; default: what the model "
            "recommends, else isolated.",
        ),
        click.option(
            "--kv-commit",
            metavar="HOW",
            help="Keys and values of finished spans: clean (default) or published.",
        ),
        click.option(
            "--compat",
            metavar="HOW",
            help="published: answer as the published implementation does, its quirks included.",
        ),
        click.option(
            "--grammar/--no-grammar",
            "grammar",
            default=None,
            help="Whether plans are kept from being malformed; default: yes.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["bfloat16", "float16", "float32"]),
            default="bfloat16",
            help="Of weights and computation; default bfloat16.",
        ),
        device_option,
        threads_option,
    )

    def declare(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return declare


def load(
    *, model: str | None, revision: str | None, dtype: str, device: str, threads: int | None,
    joint: bool | None, grammar: bool | None, **knobs: Any,
) -> tuple[LLM, GenerationParams]:  # fmt: skip
    """The model that :func:`generation_options` name, and its parameters where they say nothing.

    Raises:
        ValueError: No such model or device, or a parameter out of its range.
    """
    import torch

    from pdiff_runtime.engine import LLM
    from pdiff_runtime.eval.knobs import with_knobs

    set_threads(threads)
    check_device(device)
    llm = LLM(
        model, dtype=getattr(torch, dtype), device=device, revision=revision,
        progress=model is not None and sys.stderr.isatty(),
    )  # fmt: skip
    knobs |= {"isolate_spans": None if joint is None else not joint, "use_grammar": grammar}
    return llm, with_knobs(llm.default_params, knobs)
