"""Captured forwards and denoising steps give what eager ones do.

Without a GPU the kernels are emulated, and a stand-in takes the place of graphs: what it replays
goes through the same buffers, rounded up as on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import types

import pytest
import torch
from torch import nn

from pdiff_runtime import _C, LLM, Decoder, EngineConfig, GenerationParams, ops
from pdiff_runtime.bench.models import TAGS, planning_model, random_prompt
from pdiff_runtime.engine.graphs import Captured, CapturedForwards, Graphs, Recent
from pdiff_runtime.models import ModelConfig

ON_GPU = torch.cuda.is_available()
CONFIG = ModelConfig(
    vocab_size=640, hidden_size=64, num_layers=2, num_heads_q=2, num_heads_kv=1, head_dim=64,
    intermediate_size=96,
)  # fmt: skip
PLAN = [[([200], 20), ([201], 10)], [([200], 10)]]
CASES = {
    "planned": {"max_tokens": 60, "steps_ratio": 0.6},
    "threshold": {
        "max_tokens": 60, "unmask": "confidence_threshold", "threshold": 0.02, "temperature": 4.0,
        "top_k": 100, "seed": 3,
    },
    "ar": {"max_tokens": 10, "mode": "ar", "temperature": 0.8, "seed": 1},
    "skeleton": {"max_tokens": 40, "mode": "skeleton"},
    "diffusion": {"max_tokens": 12, "mode": "diffusion"},
    "joint": {"max_tokens": 90, "plan": PLAN, "isolate_spans": False, "alg_temp": 0.5, "seed": 2},
}  # fmt: skip


class StandIn:
    """Replays by running again; like a graph's, what it returns is the same memory each time."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def capture(self, run):
        self.num_captured += 1
        result = None

        def replay():
            nonlocal result
            self.num_replayed += 1
            new = run()
            result = new.clone() if result is None else result.copy_(new)
            return result

        return replay


class Counted(Graphs):
    """Graphs that are counted."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", torch.cuda.current_device()))
        self.num_captured = self.num_replayed = 0

    def capture(self, run):
        self.num_captured += 1
        replay = super().capture(run)

        def counted():
            self.num_replayed += 1
            return replay()

        return counted


@pytest.fixture(scope="module")
def model() -> Decoder:
    return planning_model(CONFIG, number=1, device="cuda" if ON_GPU else "cpu")


@pytest.fixture
def kernels(monkeypatch) -> None:
    """CUDA's, which take rounded plans."""
    if ON_GPU:
        return
    if not _C.emulates_cuda:
        pytest.skip("needs a GPU, or emulated kernels")
    pack = ops.AttentionPlan.pack
    monkeypatch.setattr(ops.AttentionPlan, "pack", functools.partial(pack, impl="cuda"))
    for name in ("rope_kv_write_", "unmask_"):
        monkeypatch.setattr(ops, name, functools.partial(getattr(ops, name), impl="cuda"))


@pytest.fixture
def graphs() -> Counted | StandIn:
    return Counted() if ON_GPU else StandIn()


def engine_of(model: Decoder, graphs, *, split_keys: bool = False) -> LLM:
    """Products by tiles, so that rows that were added to fill a size change no bit."""
    config = EngineConfig(
        max_topics=2, page_size=64, kv_cache_tokens=4096, batch_invariant=True, run_ahead=True,
        cuda_graphs=False,
    )  # fmt: skip
    llm = LLM(model, tags=TAGS, config=config)
    runner = llm.engine.runner
    runner.split_keys = split_keys
    if graphs is not None:
        runner.graphs = graphs
        runner._captured = CapturedForwards(model, runner.project, graphs)
    return llm


@pytest.mark.parametrize("case", CASES)
def test_replayed_answers_are_the_eager_ones(model, kernels, graphs, case):
    token_ids, keys = [], []
    for llm in (engine_of(model, None), engine_of(model, graphs)):
        outputs = []
        for size in (40, 20):  # the second time with what the first one captured
            prompts = [random_prompt(size, seed=0), random_prompt(size - 7, seed=1)]
            outputs += llm.generate(prompts, GenerationParams(**CASES[case]))
        token_ids.append([output.token_ids for output in outputs])
        assert llm.engine.allocator.num_free == llm.engine.allocator.num_pages
        keys.append(torch.stack(llm.engine.runner.cache.k))
    assert token_ids[0] == token_ids[1]
    assert torch.equal(keys[0], keys[1])
    assert max(map(len, token_ids[0])) > 8
    assert graphs.num_replayed > graphs.num_captured > 0


def test_replayed_rows_share_the_keys_of_long_contexts(model, kernels, graphs):
    token_ids = []
    for llm in (engine_of(model, None, split_keys=True), engine_of(model, graphs, split_keys=True)):
        params = GenerationParams(mode="ar", max_tokens=6, temperature=0.7, seed=0)
        prompts = [random_prompt(700, seed=0), random_prompt(300, seed=1)]
        token_ids.append([output.token_ids for output in llm.generate(prompts, params)])
        kept = llm.engine.runner._prepared
        assert kept is not None
        assert kept[1].plan.num_slots > 0
    assert token_ids[0] == token_ids[1]
    assert graphs.num_replayed > graphs.num_captured > 0


def test_rows_of_an_earlier_batch_are_gone(model, kernels, graphs):
    later = (
        random_prompt(30, seed=1),
        GenerationParams(plan=[[([200], 10)]], max_tokens=40, record_steps=True),
    )
    expected = engine_of(model, None).generate(*later)[0].rounds
    llm = engine_of(model, graphs)
    params = GenerationParams(plan=PLAN, max_tokens=90)
    rounds = llm.encode_plan(PLAN)
    for num_steps in (4, 7):  # of a batch that leaves masks: eager, then replayed
        llm.engine.add("goes", random_prompt(50, seed=0), params, rounds)
        for _ in range(num_steps):
            llm.engine.step()
        llm.engine.abort(["goes"])
        assert llm.generate(*later)[0].rounds == expected
    assert graphs.num_replayed > 0


def test_steps_of_callers_in_inference_mode_and_of_others(model, kernels, graphs):
    params = GenerationParams(**CASES["planned"])
    llm = engine_of(model, graphs)
    token_ids = []
    for is_inference in (True, False, True):
        for _ in range(2):  # of which the second one is captured
            with torch.inference_mode(is_inference):
                output = llm.generate(random_prompt(40, seed=0), params)[0]
            token_ids.append(output.token_ids)
    assert all(each == token_ids[0] for each in token_ids)


@pytest.fixture
def recorded(monkeypatch) -> Graphs:
    """Graphs as torch's: a capture ends with what was recorded, whatever is raised in it."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())
    graphs = object.__new__(Graphs)
    graphs._pool = graphs._stream = None
    return graphs


def test_a_capture_short_of_memory_leaves_no_graph(recorded):
    is_short = False
    num_run = 0

    def run():
        nonlocal num_run
        num_run += 1
        if is_short:
            raise torch.OutOfMemoryError("none left")
        return torch.tensor(num_run)

    captured = Captured(run, recorded, nn.Linear(1, 1))
    assert [captured().item() for _ in range(2)] == [1, 2]
    is_short = True
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            captured()
    is_short = False
    assert [captured().item() for _ in range(3)] == [5, 5, 5]  # the result of the capture
    assert num_run == 5


def test_weights_that_were_replaced_are_captured_anew(recorded):
    linear = nn.Linear(1, 1, bias=False)

    def run():
        nonlocal num_run
        num_run += 1
        return linear.weight.detach().clone()

    captured = Captured(run, recorded, linear)
    weight = linear.weight
    replace = (
        lambda: None,
        lambda: setattr(weight, "data", torch.full((1, 1), 2.0)),
        lambda: setattr(linear, "weight", nn.Parameter(torch.full((1, 1), 3.0))),
        lambda: linear.load_state_dict({"weight": torch.full((1, 1), 4.0)}, assign=True),
    )
    for change in replace:
        change()
        num_run = 0
        for _ in range(5):
            assert torch.equal(captured(), linear.weight)
        assert num_run == 3  # the third time for the graph


def test_the_least_recent_goes():
    made = []
    recent: Recent[int, str] = Recent(2)

    def make(key: int) -> str:
        made.append(key)
        return str(key)

    for key in (1, 2, 1, 3, 1, 2):
        assert recent.get(key, lambda key=key: make(key)) == str(key)
    assert made == [1, 2, 3, 2]
