"""``batch_invariant``: every bit of an answer is its own, whatever runs beside it or before it."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from conftest import TINY_TAGS, spread_model
from tiny_engine import Case, answer, answer_alone, finished, make_engine, preempt, step, user_plan
from torch import nn

from pdiff_runtime import Decoder, GenerationParams
from pdiff_runtime.engine import Engine, RequestOutput
from pdiff_runtime.models import ModelConfig
from pdiff_runtime.models.decoder import Project, project_at_once
from pdiff_runtime.models.packed_weights import PackedWeights
from pdiff_runtime.models.row_tiles import SIZES, RowTiles, agreeing_sizes

DTYPES = [torch.float32, torch.bfloat16]
TEMPERATURES = [0.0, 0.7]
NUM_MIXES = {torch.float32: 9, torch.bfloat16: 16}  # for each temperature; 50 in all


@functools.cache
def _model(dtype: torch.dtype, hidden_size: int = 512) -> Decoder:
    """Wide enough that a matrix library picks kernels by the number of rows."""
    config = ModelConfig(
        vocab_size=640, hidden_size=hidden_size, num_layers=2, num_heads_q=hidden_size // 64,
        num_heads_kv=max(1, hidden_size // 128), head_dim=64, intermediate_size=3 * hidden_size,
        max_position=512, length_unit=2,
    )  # fmt: skip
    model = spread_model(config, 3.0).to(dtype)
    model.reset_rope()
    return model


def _cases(temperature: float) -> list[Case]:
    def params(**fields: object) -> GenerationParams:
        fields = {"max_tokens": 10, "seed": 5, "temperature": temperature, **fields}
        return GenerationParams(logprobs=True, **fields)

    def plan(*rounds: list[int]) -> list[list[int]]:
        return user_plan(TINY_TAGS, *rounds)

    shared = [300 + 7 * idx for idx in range(30)]
    return [
        Case([5, 600], params(mode="ar")),
        Case([*shared, 1], params(mode="ar", seed=8)),
        Case([*shared, 2], params()),
        Case([70] * 17, params(mode="diffusion", steps_ratio=0.5)),
        Case([80, 90], params(max_tokens=36, steps_ratio=0.5), plan([3, 1], [2])),
        Case(
            shared[:9],
            params(max_tokens=36, steps_ratio=0.5, isolate_spans=False),
            plan([2, 2], [1]),
        ),
        Case(
            [101, 99, 3],
            params(max_tokens=36, steps_ratio=0.5, kv_commit="published"),
            plan([2, 3], [2]),
        ),
        Case([4] * 33, params(max_tokens=30, unmask="topk_margin", alg_temp=0.5), plan([4])),
    ]


def _bits(output: RequestOutput) -> tuple[object, ...]:
    assert len(output.logprobs) == len(output.token_ids)
    return output.token_ids, output.logprobs, output.text, output.finish_reason


@functools.cache
def _alone(dtype: torch.dtype, temperature: float) -> list[tuple[object, ...]]:
    return [_bits(answer(_engine(dtype), [case])[0]) for case in _cases(temperature)]


_TILES: dict[torch.dtype, Project] = {}


def _engine(dtype: torch.dtype, **config: object) -> Engine:
    engine = make_engine(_model(dtype), TINY_TAGS, batch_invariant=True, **config)
    assert isinstance(engine.runner.project, RowTiles)
    engine.runner.project = _TILES.setdefault(dtype, engine.runner.project)  # try sizes once
    return engine


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_company_changes_a_bit(dtype, temperature):
    """Mixes of requests, chunks, pools, caches and preemptions: the same bits as alone."""
    cases, expected = _cases(temperature), _alone(dtype, temperature)
    chooser = random.Random(f"{dtype} {temperature}")
    num_preemptions = num_cached = 0
    for mix in range(NUM_MIXES[dtype]):
        config = {
            "max_batch_tokens": chooser.choice([7, 33, 2048]),
            "page_size": chooser.choice([4, 16]),
            "kv_cache_tokens": chooser.choice([64, 80, 1024]),
            "prefix_cache": chooser.random() < 0.7,
            "max_logits_rows": chooser.choice([3, 2048]),
            "draft_plan": chooser.random() < 0.5,
        }
        members = [chooser.randrange(len(cases)) for _ in range(3)]
        outputs = _with_preemptions(_engine(dtype, **config), cases, members, chooser)
        for idx, output in zip(members, outputs, strict=True):
            assert _bits(output) == expected[idx], f"case {idx} in mix {mix}: {members}, {config}"
            num_preemptions += output.usage.num_preemptions
            num_cached += output.usage.cached_tokens > 0
    assert num_preemptions > 0
    assert num_cached > 0


def _with_preemptions(
    engine: Engine, cases: list[Case], members: list[int], chooser: random.Random
) -> list[RequestOutput]:
    """Answers of requests that come one after another and lose their pages now and then."""
    outputs: dict[str, RequestOutput] = {}
    waiting = list(enumerate(members))
    for _ in range(1000):
        if waiting and chooser.random() < 0.3:
            at, idx = waiting.pop(0)
            engine.add(str(at), cases[idx].prompt, cases[idx].params, cases[idx].rounds)
        outputs |= finished(step(engine))
        losers = [request for request in engine.scheduler.running if not request.is_pinned]
        if losers and chooser.random() < 0.05:
            preempt(engine, chooser.choice(losers).request_id)
        if not (waiting or engine.has_work):
            break
    return [outputs[str(at)] for at in range(len(members))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_preemption_and_cached_pages_change_no_bit(dtype):
    """Each by itself, on the request it bears on most."""
    cases, expected = _cases(0.7), _alone(dtype, 0.7)
    for idx in (1, 4, 5):
        (chunked,) = answer(_engine(dtype, max_batch_tokens=5), [cases[idx]])
        assert _bits(chunked) == expected[idx]
        engine = _engine(dtype, page_size=4)
        engine.add("x", cases[idx].prompt, cases[idx].params, cases[idx].rounds)
        outputs: dict[str, RequestOutput] = {}
        for at in range(200):
            if not engine.has_work:
                break
            outputs |= finished(step(engine))
            if at in (1, 4, 7) and engine.has_work:
                preempt(engine, "x")
        assert outputs["x"].usage.num_preemptions > 0
        assert _bits(outputs["x"]) == expected[idx]
        (cached,) = answer(engine, [cases[idx]])
        assert cached.usage.cached_tokens > 0
        assert _bits(cached) == expected[idx]


def test_without_it_company_can_show():
    """The control: on some model here, a library picks another kernel for more rows."""
    for dtype in DTYPES:
        for hidden_size in (512, 256, 768):
            model = _model(dtype, hidden_size)
            cases = [case for case in _cases(0.0) if case.params.mode != "planned"]
            alone = answer_alone(model, TINY_TAGS, cases)
            together = answer(make_engine(model, TINY_TAGS), cases)
            if list(map(_bits, alone)) != list(map(_bits, together)):
                return
    pytest.skip("this machine's matrix products are the same bits for any number of rows")


# --- the tiles ---


def _linear(
    dtype: torch.dtype, in_features: int, out_features: int, *, bias: bool = False, seed: int = 3
) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / in_features**0.5)
    return linear.to(dtype).requires_grad_(False)


def _rows(num_rows: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(num_rows, in_features, generator=generator).to(dtype)


def _cancelling(linear: nn.Linear, x: torch.Tensor) -> None:
    """Make every sum zero but for its rounding, which another order of summation changes."""
    half = linear.in_features // 2
    linear.weight[:, half : 2 * half] = -linear.weight[:, :half]
    x[:, half : 2 * half] = x[:, :half]


PRODUCTS = [(dtype, project_at_once) for dtype in (*DTYPES, torch.float16)]
if PackedWeights.is_available():
    PRODUCTS.append((torch.bfloat16, PackedWeights()))
_NAMES = [f"{dtype}-{type(inner).__name__}" for dtype, inner in PRODUCTS]
each_product = pytest.mark.parametrize(("dtype", "inner"), PRODUCTS, ids=_NAMES)
SHAPES = [(512, 640, False), (512, 256, False), (1536, 512, False), (96, 33, True), (1, 1, True)]


@each_product
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_equal_the_product(shape, dtype, inner):
    """For any number of rows, the last tile filled up with zeros."""
    in_features, out_features, bias = shape
    linears = [_linear(dtype, in_features, n, bias=bias) for n in (out_features, 24)]
    project = RowTiles(inner)
    for num_rows in (0, 1, 2, 15, 16, 17, 24, 63, 64, 65, 130, 255, 256, 257, 511, 600):
        x = _rows(num_rows, in_features, dtype)
        for linear, actual in zip(linears, project(linears, x), strict=True):
            expected = linear(x)
            assert actual.shape == expected.shape
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_tiles_are_within_rounding_of_the_exact_product(num_rows):
    linear, x = _linear(torch.float32, 512, 64, bias=True), _rows(num_rows, 512, torch.float32)
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    (actual,) = RowTiles()([linear], x)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@each_product
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_a_row_has_its_bits_in_any_company(shape, dtype, inner):
    in_features, out_features, bias = shape
    linear, project = _linear(dtype, in_features, out_features, bias=bias), RowTiles(inner)
    project.sizes([linear])
    x = _rows(600, in_features, dtype)
    _cancelling(linear, x)
    (expected,) = project([linear], x)
    chooser = random.Random(0)
    for num_rows in [*range(1, 40), 63, 64, 65, 100, 255, 256, 257, 300, 511, 600]:
        lo = chooser.randrange(601 - num_rows)
        (actual,) = project([linear], x[lo : lo + num_rows])
        assert torch.equal(actual, expected[lo : lo + num_rows])


@each_product
@pytest.mark.parametrize("out_features", [96, 128, 256])
def test_sizes_agree(dtype, out_features, inner):
    """In every bit, as seen where nothing but rounding is left of the sums.

    Whatever the weights are: where products round to bfloat16, few of them show another order.
    """
    for seed in range(6):
        linear, project = _linear(dtype, 512, out_features, seed=seed), RowTiles(inner)
        sizes = project.sizes([linear])
        assert sizes == agreeing_sizes([linear], inner)
        assert list(sizes) == sorted(set(sizes), reverse=True)
        assert set(sizes) <= set(SIZES)
        x = _rows(256, 512, dtype)
        _cancelling(linear, x)
        tiled = [torch.cat([inner([linear], tile)[0] for tile in x.split(size)]) for size in sizes]
        assert all(torch.equal(tiled[0], other) for other in tiled[1:]), f"seed {seed}: {sizes}"


class _Fake(nn.Linear):
    """Adds to each row what it may not depend on: its place, or the number of rows."""

    def __init__(self, blemish) -> None:
        super().__init__(8, 8, bias=False)
        self.requires_grad_(False)
        self.blemish = blemish

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.blemish(len(x))


def test_rows_that_depend_on_their_position_are_an_error():
    linear = _Fake(lambda num_rows: torch.arange(num_rows)[:, None] * 1e-3)
    with pytest.raises(RuntimeError, match=r"batch_invariant: rows of a product of \[8, 8\] in"):
        RowTiles()([linear], torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("blemish", "sizes"),
    [
        (lambda n: 0.0, (256, 64, 16)),
        (lambda n: n * 1e-3, (64,)),  # all differ: a wide one, and of those the smallest
        (lambda n: float(n == 16), (256, 64)),
        (lambda n: float(n == 64), (256, 16)),
        (lambda n: float(n == 256), (64, 16)),
        (lambda n: torch.arange(n)[:, None] * float(n == 64), (256, 16)),
        (lambda n: torch.arange(n)[:, None] * float(n != 16), (16,)),
        (lambda n: torch.arange(n)[:, None] * float(n != 256), (256,)),
    ],
)
def test_only_sizes_that_agree_are_used_together(blemish, sizes, monkeypatch):
    monkeypatch.setattr("pdiff_runtime.models.row_tiles.SIZES", (16, 64, 256))
    linear, project = _Fake(blemish), RowTiles()
    assert project.sizes([linear]) == sizes
    x = _rows(600, 8, torch.float32)
    (expected,) = project([linear], x)
    for num_rows in (1, 16, 33, 64, 100, 256, 300):
        assert torch.equal(project([linear], x[:num_rows])[0], expected[:num_rows])


def test_one_of_several_layers_may_exclude_a_size(monkeypatch):
    """Layers of one input are one product to some libraries, so they go through the same tiles."""
    monkeypatch.setattr("pdiff_runtime.models.row_tiles.SIZES", (16, 64, 256))
    plain, odd = _Fake(lambda n: 0.0), _Fake(lambda n: float(n == 64))
    assert RowTiles().sizes([plain, odd]) == (256, 16)


def test_shapes_are_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(
        "pdiff_runtime.models.row_tiles.agreeing_sizes",
        lambda linears, project: tried.append(linears[0].weight.shape) or (16,),
    )
    project = RowTiles()
    for out_features in (8, 8, 9, 8, 9):
        project([nn.Linear(4, out_features)], torch.zeros(2, 4))
    assert tried == [(8, 4), (9, 4)]
