"""What topics, sync and isolated spans are worth: the bundled model, trained on without each.

    python bench/ablations.py [--num-tokens 2500000] [--out bench/results/cpu/ablations.json]

Four copies of the bundled weights go on training for the same number of tokens, with the same
schedule and seed, on the same documents written in four ways:

    control   as they are
    sync      the parts of a coupled answer come in rounds of one, so that later ones see earlier
    no topic  every topic says "it" in place of its words; its number stays
    joint     as they are, but the spans of a round see each other, in training and at inference

The other rows are the bundled weights under other parameters: "bundled", the recommended ones;
spans that see each other though none did in training; other tokens per unit of a topic's number
than the model's own 4; the plan given, with true topics and lengths; token by token without a plan.

The bundled documents have no sync, so that "control" is also the arm without it. Only a fiftieth of
them are coupled ("Name two neighbours of Peru."), which is too few to learn from in a short run:
here it is a tenth, in all four arms. Coupled questions are recall, as neighbours cannot be held
out; there are more of them than in the bundled evaluation. "no topic" is marked by order, and its
`topics_exact` says how often the number of parts is right. A span can still find its part there:
prompts name the parts in the order of the plan.

This is one run per arm with one seed, of a model of 2 M parameters that recites small facts, whose
weights learned to plan with topics before the arms part. It shows which way an effect goes, not how
large it is in a model that writes prose.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pdiff_runtime import LLM, GenerationParams, load_model
from pdiff_runtime.bench.measure import machine
from pdiff_runtime.eval.atlas import COUPLED, Record, evaluate, held_out_records, true_plan
from pdiff_runtime.eval.files import prepare as prepare_file
from pdiff_runtime.eval.files import write_json
from pdiff_runtime.train.recipe import Recipe, load_recipe
from pdiff_runtime.train.run import ATLAS, export, prepare, tokenizer_dir
from pdiff_runtime.train.synth import EVAL_SEED, compose_documents, compose_eval, load_facts
from pdiff_runtime.train.synth.tokenizer import ASSETS, CONTROL

SEED = 2
NUM_DOCUMENTS = 40_000
COUPLED_SHARE = 0.1
NUM_COUPLED_QUESTIONS = 200
MAX_TOKENS = 400  # of an answer; the longest spans have 70
BATCH = 16

UNINFORMATIVE = "it"  # one token, as the words of all topics are: plans stay as long
TOPIC = re.compile(f"{CONTROL['topic_start']}(.*?)([0-9]+){CONTROL['topic_end']}")
SPAN = re.compile(f"{CONTROL['async_start']}.*?{CONTROL['async_end']}")


# --- the same documents in other words -----------------------------------------------------------


def as_is(record: Record) -> Record:
    return record


def without_topic_words(document: Record) -> Record:
    """All topics say the same; their numbers stay."""
    topic = f"{CONTROL['topic_start']}{UNINFORMATIVE}\\2{CONTROL['topic_end']}"
    return document | {"text": TOPIC.sub(topic, document["text"])}


def with_sync(document: Record) -> Record:
    """A coupled answer in rounds of one topic and its span."""
    if document["family"] != COUPLED:
        return document
    text = document["text"]
    topics = [match.group() for match in TOPIC.finditer(text)]
    rounds = [topic + span for topic, span in zip(topics, SPAN.findall(text), strict=True)]
    return document | {"text": CONTROL["sync"].join(rounds)}


def by_order(record: Record) -> Record:
    """A question whose parts are told apart by their order alone."""
    parts = [part | {"topic": UNINFORMATIVE} for part in record["parts"]]
    return record | {"parts": parts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to write documents, to attend to them, and to mark answers."""

    write: Callable[[Record], Record] = as_is
    isolate_spans: bool = True
    question: Callable[[Record], Record] = as_is


ARMS = {
    "control": Arm(),
    "sync": Arm(write=with_sync),
    "no topic": Arm(write=without_topic_words, question=by_order),
    "joint": Arm(isolate_spans=False),
}
UNTRAINED: dict[str, dict[str, Any]] = {
    "bundled": {},
    "joint at inference": {"isolate_spans": False},
    **{f"length_scale {scale}": {"length_scale": scale} for scale in (2, 3, 5, 6, 8, 10)},
    "autoregressive": {"mode": "ar"},
}


# --- data ----------------------------------------------------------------------------------------


def documents() -> Iterator[Record]:
    """Training documents of all families, with coupled ones added up to their share."""
    facts = load_facts(ASSETS / "facts.jsonl")
    base = list(compose_documents(facts, num_documents=NUM_DOCUMENTS, seed=SEED))
    num_coupled = sum(document["family"] == COUPLED for document in base)
    num_missing = round((COUPLED_SHARE * len(base) - num_coupled) / (1 - COUPLED_SHARE))
    yield from base
    further = compose_documents(facts, num_documents=100 * num_missing, seed=SEED + 1)
    coupled = (document for document in further if document["family"] == COUPLED)
    yield from itertools.islice(coupled, num_missing)


def questions() -> list[Record]:
    """The held-out prompts, with more coupled ones."""
    facts = load_facts(ASSETS / "facts.jsonl")
    coupled = compose_eval(facts, seed=EVAL_SEED, counts={COUPLED: NUM_COUPLED_QUESTIONS})
    return [record for record in held_out_records() if record["family"] != COUPLED] + list(coupled)


# --- training ------------------------------------------------------------------------------------


def recipe_of(name: str, arm: Arm, data: Path, num_tokens: int) -> Recipe:
    """The second stage of the bundled model's recipe with a lower learning rate."""
    recipe = load_recipe(ATLAS)
    stage = dataclasses.replace(
        recipe.stages[-1], num_tokens=num_tokens, learning_rate=3e-4, final_learning_rate=3e-5,
        warmup_steps=50,
    )  # fmt: skip
    return dataclasses.replace(
        recipe, name=name, data=str(data), stages=(stage,), isolate_spans=arm.isolate_spans,
        generation=recipe.generation | {"isolate_spans": arm.isolate_spans},
        seed=SEED, compile=False, log_every=10, save_every=200,
    )  # fmt: skip


def train(recipe: Recipe, folder: Path) -> Path:
    """Train on from the bundled weights, or from where the folder stands; the model's folder."""
    trainer = prepare(recipe, folder, log=lambda record: print(json.dumps(record), flush=True))
    if not trainer.checkpoint.is_file():
        trainer.model.load_state_dict(load_model(dtype=torch.float32).state_dict())
    trainer.train()
    return export(trainer, tokenizer_dir(recipe.tokenizer), folder / "model")


def training_of(folder: Path) -> dict[str, float]:
    """Tokens, steps and seconds at the end of a run's log, and mean losses of its last tenth."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    last = log[-max(1, len(log) // 10) :]
    return {
        "tokens": log[-1]["tokens"],
        "steps": log[-1]["step"],
        "seconds": log[-1]["seconds"],
        **{
            name: statistics.fmean(record[name] for record in last)
            for name in ("loss", "loss_ar", "loss_span")
        },
    }


# --- evaluation ----------------------------------------------------------------------------------


def measure(
    llm: LLM, records: Sequence[Record], params: Sequence[GenerationParams]
) -> dict[str, Any]:
    """Accuracy and cost; seconds are left out, as answers come in batches."""
    report = evaluate(llm, records, params, batch=BATCH)
    families, overall = report.families, report.overall
    coupled = families[COUPLED]
    return {
        "accuracy": {name: scores.exact for name, scores in families.items()},
        "macro_exact": report.macro_exact,
        "num_facts": {name: scores.num_facts for name, scores in families.items()},
        "critical_path": {name: scores.critical_path for name, scores in families.items()},
        "topics_exact": overall.topics_exact,
        "room": overall.room,
        "pad_share": overall.padding,
        "coupled_repeated": coupled.repeated,
        "finish_reasons": report.finish_reasons,
    }


def params_of(llm: LLM, **fields: Any) -> GenerationParams:
    """The model's own parameters with some fields replaced."""
    return dataclasses.replace(llm.default_params, max_tokens=MAX_TOKENS, **fields)


def show(name: str, result: dict[str, Any]) -> None:
    accuracy = "  ".join(f"{k} {100 * v:5.1f}" for k, v in result["accuracy"].items())
    path = result["critical_path"]
    print(
        f"{name:20} {accuracy}  path: sheet {path['sheet']:.1f}, coupled {path[COUPLED]:.1f}",
        flush=True,
    )


def main() -> None:
    """Measure the bundled weights, then train and measure the arms; one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tokens", type=int, default=2_500_000, help="of each arm")
    parser.add_argument("--work", type=Path, default=Path("build/ablations"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/ablations.json"))
    args = parser.parse_args()
    prepare_file(args.out)
    args.work.mkdir(parents=True, exist_ok=True)
    records, llm, shared = questions(), LLM(), list(documents())
    header = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "num_tokens": args.num_tokens,
        "num_documents": len(shared),
        "coupled_share": COUPLED_SHARE,
        "seed": SEED,
        "num_prompts": len(records),
        "length_unit": llm.model.config.length_unit,
    }
    results: dict[str, Any] = {}

    def keep(name: str, result: dict[str, Any]) -> None:
        show(name, result)
        results[name] = result
        write_json(args.out, {"header": header, "results": results})

    for name, fields in UNTRAINED.items():
        keep(name, measure(llm, records, [params_of(llm, **fields)] * len(records)))
    plans = [params_of(llm, plan=true_plan(llm, record)) for record in records]
    keep("true plan", measure(llm, records, plans))

    for name, arm in ARMS.items():
        folder = args.work / name.replace(" ", "_")
        data = folder.with_suffix(".jsonl")
        data.write_text("".join(json.dumps(arm.write(each)) + "\n" for each in shared), "utf-8")
        llm = LLM(train(recipe_of(name, arm, data, args.num_tokens), folder))
        asked = [arm.question(record) for record in records]
        result = measure(llm, asked, [params_of(llm)] * len(asked))
        keep(name, {"training": training_of(folder)} | result)


if __name__ == "__main__":
    main()
