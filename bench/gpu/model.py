"""A model of 7 billion parameters with random weights: single steps, and whole answers.

Steps are timed as a captured graph (device time) and eager (time on the wall, issuing included).
Whole answers: prompt of 512 tokens, 8 topics of 40 tokens, half as many steps as a span has tokens,
batch 1, against the published algorithm over the same weights. The weights are arranged so that the
model writes that plan by itself.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from device import DEVICE, ON_GPU, Call, synchronize
from published import Published
from records import Bench, Work
from torch import Tensor

from pdiff_runtime import LLM, Decoder, EngineConfig, GenerationParams, ops
from pdiff_runtime.bench.models import TAGS, WORDS, planning_model, random_prompt
from pdiff_runtime.cache import KVCache
from pdiff_runtime.engine.paged_attention import PagedAttention
from pdiff_runtime.models import ModelConfig
from pdiff_runtime.models.joined_weights import JoinedWeights
from pdiff_runtime.plan import SpanLayout

DREAM_7B = ModelConfig(
    vocab_size=152_064, hidden_size=3584, num_layers=28, num_heads_q=28, num_heads_kv=4,
    head_dim=128, intermediate_size=18_944, rope_theta=1e6, qkv_bias=True, max_position=8192,
    model_type="Dream",
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=640, hidden_size=64, num_layers=2, num_heads_q=4, num_heads_kv=2, head_dim=16,
    intermediate_size=96, qkv_bias=True, max_position=2048, model_type="Dream",
)  # fmt: skip
NUM_TOPICS, NUMBER = 8, 4
PAGE_SIZE = 64
NAME = "cuda" if ON_GPU else "cpu"
"""The implementation that runs."""


def run(bench: Bench) -> None:
    """Steps first: they say more, and take less time."""
    with torch.inference_mode():
        config = TINY if bench.is_tiny else DREAM_7B
        model = planning_model(config, number=NUMBER, device=DEVICE)
    context, spans = (40, (8, 6)) if bench.is_tiny else (1024, (60,) * 5)
    body = functools.partial(_step, bench, "denoise step", model, context, spans)
    bench.case("denoise step", body)
    body = functools.partial(_step, bench, "autoregressive step", model, 2 * context, None)
    bench.case("autoregressive step", body)
    bench.case("whole answer", functools.partial(_answers, bench, model))


class Step:
    """One forward over the last rows of a request, its logits, and `unmask_`; can be captured.

    Args:
        model: The decoder.
        context: Tokens whose keys and values are there.
        spans: Lengths of the open spans, tags included; None for one new token.
    """

    def __init__(self, model: Decoder, context: int, spans: tuple[int, ...] | None) -> None:
        layout = SpanLayout.from_spans(context, spans) if spans else SpanLayout.causal(1, context)
        config = model.config
        num_keys, num_rows = layout.num_keys, layout.num_rows
        num_pages = -(-num_keys // PAGE_SIZE)
        cache = KVCache(
            num_layers=config.num_layers, num_pages=num_pages, page_size=PAGE_SIZE,
            num_heads_kv=config.num_heads_kv, head_dim=config.head_dim, dtype=torch.bfloat16,
            device=DEVICE,
        )  # fmt: skip
        for pages in (*cache.k, *cache.v):
            pages.normal_()
        plan = ops.AttentionPlan.pack(
            [layout], num_heads_q=config.num_heads_q, num_heads_kv=config.num_heads_kv,
            head_dim=config.head_dim, device=DEVICE, page_size=PAGE_SIZE,
            page_table=torch.arange(num_pages, dtype=torch.int32)[None],
        )  # fmt: skip
        self.model, self.project = model, JoinedWeights()  # as the engine
        self.token_ids = torch.randint(0, 500, (num_keys + 1,), device=DEVICE)
        self.positions = torch.arange(num_keys - num_rows, num_keys, device=DEVICE)
        self.attend = PagedAttention(plan, cache, model, self.positions, self.positions)
        first, rows, cu_rows = 0, [], [0]
        for length in spans or (1,):
            num = max(1, length - 2)  # the row before a position predicts it
            rows += range(first, first + num)
            cu_rows.append(cu_rows[-1] + num)
            first += length
        self.rows = torch.tensor(rows, device=DEVICE)
        self.row_position = (self.positions[self.rows] + 1).int()
        self.cu_rows = torch.tensor(cu_rows, dtype=torch.int32, device=DEVICE)
        self.num_unmask = torch.full_like(self.cu_rows[1:], 2)
        self.banned_ids = torch.tensor(sorted(TAGS.banned_in_span), device=DEVICE)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """The logits; the most certain tokens are written to `token_ids`."""
        hidden = self.model(self.token_ids[self.positions], self.attend, self.project)
        logits = self.model.logits(hidden[self.rows])
        ops.unmask_(
            self.token_ids, logits, self.row_position, self.cu_rows, self.num_unmask,
            banned_ids=self.banned_ids,
        )  # fmt: skip
        return logits

    def captured(self) -> Callable[[], object]:
        """The step as one graph; on a CPU as it is."""
        if not ON_GPU:
            return self
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                self()
        synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph.replay


def _step(
    bench: Bench, name: str, model: Decoder, context: int, spans: tuple[int, ...] | None
) -> None:
    step = Step(model, context, spans)
    token_ids = step.token_ids.clone()
    expected = step().float()
    eager_ms = wall_ms(step, 10)
    bench.value(f"{name}, eager, on the wall", NAME, eager_ms, "ms")
    replay = step.captured()
    step.token_ids.copy_(token_ids)
    replay()
    written = step.token_ids.clone()
    step.token_ids.copy_(token_ids)
    again = step().float()

    def check() -> None:
        # Products may be summed in another order in a graph, and positions be nearly tied.
        assert (written != step.token_ids).sum() <= 2, "replay and eager write different tokens"
        assert expected.isfinite().all(), "logits are not finite"
        torch.testing.assert_close(again, expected, rtol=2e-2, atol=5e-2)

    bench.check(f"{name}, captured", NAME, check)
    if spans:
        size = 2 * sum(p.numel() for p in model.model.layers.parameters())
        head = 2 * model.lm_head.weight.numel()
        work = Work(size * len(step.positions) + head * len(step.rows), "TFLOP/s")
    else:  # every weight is read once
        weights = [*model.model.layers.parameters(), model.lm_head.weight]
        work = Work(sum(p.nbytes for p in weights), "GB/s")
    bench.measure(f"{name}, captured", {NAME: Call(lambda _: replay())}, work)


def _answers(bench: Bench, model: Decoder) -> None:
    prompt = random_prompt(21 if bench.is_tiny else 513, seed=0)
    topic = [TAGS.topic_start, *WORDS, TAGS.digits[NUMBER], TAGS.topic_end]
    script = topic * NUM_TOPICS + [TAGS.eos]

    llm = LLM(
        model, tags=TAGS,
        config=EngineConfig(max_topics=NUM_TOPICS, kv_cache_tokens=8192, page_size=PAGE_SIZE),
    )  # fmt: skip
    params = GenerationParams(max_tokens=1024, steps_ratio=0.5, top_k=50, seed=0)
    published = Published(model, TAGS, steps_ratio=0.5, top_k=50)
    ours = lambda: llm.generate(prompt, params)[0]  # noqa: E731
    theirs = lambda: published.generate(prompt, script)  # noqa: E731

    output, sequence = ours(), theirs()
    print(f"ours {output.usage}, published {published.num_forwards} forwards")

    def check() -> None:
        lengths = [length for plan_round in output.rounds for length in plan_round.lengths]
        assert lengths == [10 * NUMBER] * NUM_TOPICS, f"another plan was written: {lengths}"
        assert len(prompt) + len(output.token_ids) == len(sequence), "answers differ in length"

    bench.check("whole answer", NAME, check)
    times: dict[str, list[float]] = {"ours": [], "published": []}
    for _ in range(5 if ON_GPU else 1):  # by turns
        times["ours"].append(wall_ms(ours, 1))
        times["published"].append(wall_ms(theirs, 1))
    medians = {who: sorted(ms)[len(ms) // 2] for who, ms in times.items()}
    bench.value("whole answer", NAME, medians["ours"], "ms")
    bench.value("whole answer", "published, eager torch", medians["published"], "ms")
    ratio = medians["published"] / medians["ours"]
    bench.value("whole answer against the published algorithm", NAME, ratio, "x")


def wall_ms(call: Callable[[], object], num_rounds: int) -> float:
    """Median milliseconds on the host's clock, from an idle device to an idle device."""
    samples = []
    for _ in range(num_rounds):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        samples.append(1e3 * (time.perf_counter() - start))
    return sorted(samples)[len(samples) // 2]
