"""unmask_ against the float64 reference, and the laws of selection, filters and sampling."""

import itertools
import math
import re

import pytest
import torch
from on_backends import backend_fixture, isa_fixture

from pdiff_runtime import _C, ops
from pdiff_runtime.ops import Impl, Rule, reference
from pdiff_runtime.testing import Backend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
VOCAB_SIZES = [1, 7, 17, 1000, 4096, 33_003]
SETTINGS = {
    "greedy": {},
    "greedy_top_k": {"top_k": 5},
    "greedy_top_p": {"top_p": 0.8},
    "hot": {"temperature": 1.3},
    "cold_top_p": {"temperature": 0.2, "top_p": 0.95},
    "both_filters": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    "drawn_positions": {"alg_temp": 0.3},
}
THRESHOLDS = {Rule.THRESHOLD: 0.2, Rule.FACTOR: 2.2, Rule.ENTROPY_BUDGET: 3.0}
"""One that writes some of a few random rows, for each rule that reads it."""
PREFIX_RULES = [Rule.FACTOR, Rule.ENTROPY_BUDGET]
ISAS = ["generic", "avx2", "avx512"]
exhaustive = pytest.mark.exhaustive

backend = backend_fixture(ISAS, [Impl.CUDA, Impl.TRITON])


def settings_few(*few):
    """All settings, those not named marked exhaustive."""
    return [
        pytest.param(value, id=name, marks=[] if name in few else exhaustive)
        for name, value in SETTINGS.items()
    ]


isa = isa_fixture(ISAS)


def random_logits(rows, vocab_size, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3.0 * torch.randn(rows, vocab_size, generator=generator)).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def spans_of(*lengths, quotas):
    """row_position, cu_rows_span and num_unmask of spans with these numbers of masked rows."""
    rows = sum(lengths)
    position = 3 + 2 * torch.arange(rows, dtype=torch.int32)
    return position, int32(0, *itertools.accumulate(lengths)), int32(*quotas)


def written_by_rank(rule, confidences, threshold):
    """Which of a span's best, given in order of rank, a rule writes: word by word as it says."""
    written, entropy = [], 0.0
    for rank, c in enumerate(confidences, start=1):
        if rule == Rule.THRESHOLD:
            sure = c >= threshold
        elif rule == Rule.FACTOR:
            sure = all(written) and (rank + 1) * (1.0 - c) < threshold
        elif rule == Rule.ENTROPY_BUDGET:
            sure = all(written) and entropy <= threshold
        else:
            sure = True
        written.append(rank == 1 or sure)
        entropy -= c
    return written


def run(logits, spans, op=ops.unmask_, backend=None, **settings):
    """Token ids and statistics, on the CPU whichever backend ran."""
    if backend is not None:
        spans = [x.to(backend.device) for x in spans]
        settings = {
            name: x.to(backend.device) if isinstance(x, torch.Tensor) else x
            for name, x in settings.items()
        } | {"impl": backend.impl}
        logits = logits.to(backend.device)
    token_ids = torch.full((3 + 2 * len(logits),), -5, device=logits.device)
    stats = op(token_ids, logits, *spans, **settings)
    return token_ids.cpu(), ops.UnmaskStats(*(part.cpu() for part in stats))


def assert_agrees(logits, spans, backend, **settings):
    token_ids, stats = run(logits, spans, backend=backend, **settings)
    token_ids_ref, stats_ref = run(logits, spans, reference.unmask_, **settings)
    assert torch.equal(stats.is_nan, stats_ref.is_nan)
    assert torch.equal(stats.candidate, stats_ref.candidate)
    tolerance = 1e-4 * stats_ref.confidence.abs().clamp(min=1.0)
    difference = (stats.confidence - stats_ref.confidence).abs()
    assert (difference[~stats.is_nan] <= tolerance[~stats.is_nan]).all()
    assert stats.confidence[stats.is_nan].isnan().all()
    assert torch.equal(stats.is_written, stats_ref.is_written)
    assert torch.equal(token_ids, token_ids_ref)
    return stats


FEW_CASES = {
    *((Rule.ENTROPY, name, 1000, F16) for name in SETTINGS),
    (Rule.MARGIN, "hot", 1, F16),
    (Rule.MARGIN, "greedy", 7, F32),
    (Rule.MARGIN, "both_filters", 1000, F16),
    (Rule.THRESHOLD, "drawn_positions", 17, F32),
    (Rule.THRESHOLD, "cold_top_p", 17, F16),
    (Rule.FACTOR, "greedy", 17, F16),
    (Rule.FACTOR, "drawn_positions", 7, F32),
    (Rule.FACTOR, "both_filters", 1000, F16),
    (Rule.ENTROPY_BUDGET, "greedy", 1000, F16),
    (Rule.ENTROPY_BUDGET, "drawn_positions", 17, F32),
    (Rule.ENTROPY_BUDGET, "cold_top_p", 7, F32),
    (Rule.PROBABILITY, "greedy", 33_003, F16),
    (Rule.PROBABILITY, "hot", 33_003, F32),
}


def agreement_cases():
    """Every combination; a few of them for backends that are slow."""
    for rule, name, vocab_size, dtype in itertools.product(
        Rule, SETTINGS, VOCAB_SIZES, [F32, BF16, F16]
    ):
        is_few = (rule, name, vocab_size, dtype) in FEW_CASES
        yield pytest.param(
            rule, SETTINGS[name], vocab_size, dtype, marks=[] if is_few else exhaustive,
            id=f"{rule}-{name}-{vocab_size}-{str(dtype).removeprefix('torch.')}",
        )  # fmt: skip


@pytest.mark.parametrize(("rule", "settings", "vocab_size", "dtype"), [*agreement_cases()])
def test_agrees_with_reference(rule, settings, vocab_size, dtype, backend):
    spans = spans_of(4, 0, 1, 5, quotas=[2, 3, 9, 0])
    banned = torch.tensor([0, 5, 6] if vocab_size >= 17 else [], dtype=torch.int64)
    assert_agrees(
        random_logits(10, vocab_size, dtype), spans, backend, rule=rule,
        threshold=THRESHOLDS.get(rule), step_idx=4, banned_ids=banned,
        seeds=torch.arange(10) * 977 + (3 << 40), **settings,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{}, SETTINGS["both_filters"]], ids=["greedy", "filtered"])
def test_a_vocabulary_of_300_000(settings, isa):
    logits = random_logits(3, 300_001)
    assert_agrees(logits, spans_of(1, 2, quotas=[1, 1]), Backend(Impl.CPU), **settings)


def test_published_names_of_rules():
    assert Rule("maskgit_plus") is Rule.PROBABILITY
    assert Rule("topk_margin") is Rule.MARGIN
    assert Rule("confidence_threshold") is Rule.THRESHOLD


@pytest.mark.parametrize("rule", THRESHOLDS)
def test_each_span_has_its_own_settings(rule, backend):
    logits, seeds = random_logits(12, 513), torch.arange(12)
    per_span = {
        "temperature": torch.tensor([0.0, 0.7, 1.5]),
        "top_p": torch.tensor([1.0, 0.9, 0.5]),
        "top_k": int32(3, 0, 40),
        "alg_temp": torch.tensor([0.0, 0.3, 0.0]),
        "threshold": THRESHOLDS[rule] * torch.tensor([0.5, 1.0, 4.0]),
        "step_idx": int32(0, 7, 2),
    }
    spans = spans_of(5, 4, 3, quotas=[2, 3, 3])
    token_ids, stats = run(logits, spans, backend=backend, rule=rule, seeds=seeds, **per_span)
    position, cu_rows, quotas = spans
    for span, (lo, hi) in enumerate(itertools.pairwise(cu_rows.tolist())):
        own_span = position[lo:hi] - position[lo], int32(0, hi - lo), quotas[span : span + 1]
        alone, own = run(
            logits[lo:hi], own_span, backend=backend, rule=rule, seeds=seeds[lo:hi],
            positions=position[lo:hi],
            **{name: values[span].item() for name, values in per_span.items()},
        )  # fmt: skip
        assert torch.equal(alone[own_span[0]], token_ids[position[lo:hi]])
        for actual, expected in zip(stats, own, strict=True):
            assert torch.equal(actual[lo:hi], expected)


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [
        (Rule.THRESHOLD, 0.5),
        (Rule.FACTOR, 29.0),
        (Rule.ENTROPY_BUDGET, 90.0),
        pytest.param(Rule.ENTROPY_BUDGET, 9.0, marks=exhaustive),
        *(pytest.param(r, None, marks=exhaustive) for r in Rule if r not in THRESHOLDS),
    ],
)
def test_selection_follows_the_confidences_given(rule, threshold, backend):
    lengths, quotas = [40, 1, 0, 200, 17], [7, 1, 2, 199, 40]
    spans = spans_of(*lengths, quotas=quotas)
    # Few distinct rows, so that many confidences are exactly equal.
    logits = random_logits(6, 33)[torch.arange(sum(lengths)) % 6]
    token_ids, stats = run(logits, spans, backend=backend, rule=rule, threshold=threshold)
    written = torch.zeros_like(stats.is_written)
    first = 0
    for length, quota in zip(lengths, quotas, strict=True):
        rows = sorted(range(first, first + length), key=lambda r: (-stats.confidence[r].item(), r))
        best = rows[:quota]
        by_rank = written_by_rank(rule, stats.confidence[best].tolist(), threshold)
        written[best] = torch.tensor(by_rank, dtype=torch.bool)
        first += length
    assert torch.equal(stats.is_written, written)
    expected = torch.full_like(token_ids, -5)
    expected[spans[0][written]] = stats.candidate[written]
    assert torch.equal(token_ids, expected)


def test_what_is_written_is_taken_off_the_masks_left(backend):
    spans = spans_of(6, 1, 0, 300, quotas=[2, 5, 3, 100])
    masked = int32(6, 1, 0, 300).to(backend.device)
    logits = random_logits(307, 9)
    _, stats = run(logits, spans, backend=backend, num_masked=masked)
    assert masked.tolist() == [4, 0, 0, 200]
    assert stats.is_written.sum() == 103
    _, stats = run(
        logits, spans, backend=backend, num_masked=masked, rule="threshold", threshold=0.9
    )
    written = [stats.is_written[lo:hi].sum().item() for lo, hi in ((0, 6), (6, 7), (7, 307))]
    assert masked.tolist() == [4 - written[0], -written[1], 0, 200 - written[2]]
    assert 1 <= written[2] < 100


@pytest.mark.parametrize("alg_temp", [0.0, 0.5])
@pytest.mark.parametrize("rule", THRESHOLDS)
def test_a_threshold_goes_from_one_position_to_the_quota(rule, alg_temp, backend):
    lengths, quotas = [11, 1, 0, 10], [11, 9, 2, 6]
    thresholds = [0.0, 0.5, 0.8, 2.0, math.inf]
    if rule is Rule.THRESHOLD:
        thresholds.reverse()
    written = [
        run(
            random_logits(22, 5), spans_of(*lengths, quotas=quotas), backend=backend, rule=rule,
            threshold=threshold, alg_temp=alg_temp, seeds=torch.arange(22),
        )[1].is_written
        for threshold in thresholds
    ]  # fmt: skip
    for fewer, more in itertools.pairwise(written):
        assert (fewer <= more).all()
    assert [part.sum().item() for part in written[0].split(lengths)] == [1, 1, 0, 1]
    assert [part.sum().item() for part in written[-1].split(lengths)] == [11, 1, 0, 6]
    assert len({rows.sum().item() for rows in written}) >= 4


def test_factor_writes_the_most_that_its_published_condition_allows(backend):
    rows, factor = 40, 1.0
    logits = random_logits(rows, 3) * 2
    spans = spans_of(rows, quotas=[rows])
    _, stats = run(logits, spans, backend=backend, rule="factor", threshold=factor)
    sorted_confidence = stats.confidence.double().sort(descending=True).values
    n = torch.arange(1, rows + 1)
    holds = (n + 1) * (1 - sorted_confidence) < factor
    num = stats.is_written.sum().item()
    assert num == n[holds].max()
    assert 2 < num < rows


def test_entropy_budget_bounds_the_joint_error(backend):
    rows, budget = 40, 1.5
    logits = random_logits(rows, 4) * 2
    spans = spans_of(rows, quotas=[rows])
    _, stats = run(logits, spans, backend=backend, rule="entropy_budget", threshold=budget)
    entropy = -stats.confidence.double()
    written = entropy[stats.is_written]
    assert written.sum() - written.max() <= budget < written.sum()
    assert 2 < len(written) < rows
    assert written.max() <= entropy[~stats.is_written].min()


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_certain_positions_cost_no_entropy(threshold, backend):
    if threshold < 0 and backend.impl is ops.Impl.CPU:
        pytest.skip("a CPU refuses it, on a GPU it counts as 0")
    logits = torch.full((5, 9), -math.inf)
    logits[:, 3] = 0.0
    logits[3:, 4] = 0.0
    for rule, num_written in ("entropy_budget", 4), ("factor", 1):
        _, stats = run(
            logits, spans_of(5, quotas=[9]), backend=backend, rule=rule,
            threshold=torch.tensor([threshold]),
        )  # fmt: skip
        assert stats.is_written.tolist() == [True] * num_written + [False] * (5 - num_written)


@pytest.mark.parametrize("alg_temp", [0.0, 0.4])
@pytest.mark.parametrize("rule", PREFIX_RULES)
def test_a_prefix_is_of_rows_that_have_a_rank_and_of_the_quota(rule, alg_temp, backend):
    lengths = [14, 0, 26, 10]
    logits = random_logits(50, 6)
    logits[[0, 7, 13, 20], 3] = torch.tensor([math.nan, math.inf, math.nan, math.nan])
    logits[4] = -math.inf
    logits[40:] = math.nan  # nothing to write
    stats = assert_agrees(
        logits, spans_of(*lengths, quotas=[14, 3, 3, 10]), backend, rule=rule, threshold=2.0,
        alg_temp=alg_temp, seeds=torch.arange(50),
    )  # fmt: skip
    ragged, empty, limited, broken = (x.sum().item() for x in stats.is_written.split(lengths))
    assert 2 <= ragged < 10
    assert [empty, limited, broken] == [0, 3, 0]


@exhaustive
@pytest.mark.parametrize(("rule", "threshold"), [("factor", 700.0), ("entropy_budget", 900.0)])
def test_a_prefix_of_a_span_of_thousands(rule, threshold, backend):
    lengths = [2100, 5, 300]
    rows = sum(lengths)
    stats = assert_agrees(
        random_logits(rows, 4), spans_of(*lengths, quotas=[2090, 3, 5000]), backend, rule=rule,
        threshold=torch.tensor([threshold, 1.0, math.inf]), alg_temp=0.2, seeds=torch.arange(rows),
    )  # fmt: skip
    long, short, whole = (x.sum().item() for x in stats.is_written.split(lengths))
    assert 300 < long < 2000
    assert 1 <= short <= 3
    assert whole == 300


def test_lowest_id_wins_a_tie(backend):
    logits = torch.zeros(3, 9000)
    logits[0, [8000, 70, 4500]] = 2.0
    logits[1, [4096, 4095]] = 2.0
    stats = assert_agrees(logits, spans_of(3, quotas=[3]), backend, rule="margin")
    assert stats.candidate.tolist() == [70, 4095, 0]
    assert stats.confidence.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("num_rows", "top_p"),
    [(4, 0.3), *(pytest.param(300, p, marks=exhaustive) for p in (0.0, 0.1, 0.3, 0.97))],
)
def test_top_p_keeps_the_lowest_ids_of_equal_logits(num_rows, top_p, backend):
    vocab_size = 4500
    num_kept = max(1, math.ceil(top_p * vocab_size))
    logits = torch.full((num_rows, vocab_size), 2.5)
    _, stats = run(
        logits, spans_of(num_rows, quotas=[1]), backend=backend, top_p=top_p, temperature=1.0,
        seeds=torch.arange(num_rows),
    )  # fmt: skip
    # Mass is summed in fp32, so the last of many equal tokens may fall on either side.
    assert stats.confidence[0] == pytest.approx(-math.log(num_kept), abs=1.5 / num_kept + 1e-5)
    assert stats.candidate.max() <= num_kept


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_top_k_keeps_what_ties_with_the_last(top_p, backend):
    logits = torch.zeros(1, 6000)
    logits[0, [5, 4097, 5999]] = 3.0
    logits[0, [70, 71]] = 5.0
    for top_k, kept in [(1, 2), (2, 2), (3, 5), (4, 5), (5, 5), (6, 6000), (5999, 6000)]:
        stats = assert_agrees(
            logits, spans_of(1, quotas=[1]), backend, rule="probability", top_k=top_k, top_p=top_p
        )
        if top_p == 1.0:
            mass = logits[0].sort(descending=True).values[:kept].exp().sum().item()
            assert stats.confidence[0] == pytest.approx(math.exp(5.0) / mass, rel=1e-5), top_k


def test_keeps_what_crosses_top_p(backend):
    probs = torch.tensor([[0.125, 0.5, 0.25, 0.0625, 0.0625]])
    for top_p, kept in [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (0.99, 5)]:
        logits = probs.log()
        mass = probs.sort(descending=True).values[0, :kept].sum().item()
        spans = spans_of(1, quotas=[1])
        _, stats = run(logits, spans, backend=backend, top_p=top_p, rule="probability")
        assert stats.confidence[0] == pytest.approx(0.5 / mass, rel=1e-5), top_p


@pytest.mark.parametrize("settings", settings_few("both_filters"))
def test_rows_that_are_no_distribution_are_flagged_and_disturb_nobody(settings, backend):
    clean = random_logits(8, 5000)
    spans, seeds = spans_of(4, 4, quotas=[2, 9]), torch.arange(8)
    broken = clean.clone()
    broken[1, 4999] = math.nan
    broken[3] = -math.inf
    broken[4, 17] = math.inf
    broken[6, :] = math.nan
    stats = assert_agrees(broken, spans, backend, seeds=seeds, **settings)
    assert stats.is_nan.tolist() == [False, True, False, True, True, False, True, False]
    assert (stats.candidate[stats.is_nan] == -1).all()
    assert not stats.is_written[stats.is_nan].any()
    _, expected = run(clean, spans, backend=backend, seeds=seeds, **settings)
    assert torch.equal(stats.confidence[~stats.is_nan], expected.confidence[~stats.is_nan])
    assert torch.equal(stats.candidate[~stats.is_nan], expected.candidate[~stats.is_nan])


@pytest.mark.parametrize(
    "temperature", [1e-30, *(pytest.param(t, marks=exhaustive) for t in (0.0, 1e-3, 1.0, 1e30))]
)
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
def test_extreme_logits_and_temperatures(filters, temperature, backend):
    logits = random_logits(5, 5000)
    logits[0] *= 1e30
    logits[1] -= 1e38
    logits[2, 1:] = -math.inf
    logits[3] *= 1e-38
    spans = spans_of(5, quotas=[5])
    _, stats = run(logits, spans, backend=backend, temperature=temperature, **filters)
    assert not stats.is_nan.any()
    assert ((stats.candidate >= 0) & (stats.candidate < 5000)).all()
    assert torch.isfinite(stats.confidence).all()
    assert stats.candidate[2] == 0
    assert stats.confidence[2] == 0
    if temperature == 0:
        assert torch.equal(stats.candidate, logits.argmax(1))


@pytest.mark.parametrize("settings", settings_few("hot", "both_filters"))
def test_banned_ids_are_as_if_minus_infinity(settings, backend):
    logits = random_logits(6, 9001)
    banned = torch.cat([torch.arange(4200), logits.argmax(1), torch.tensor([9000])])
    masked = logits.clone()
    masked[:, banned] = -math.inf
    logits[0, 17] = math.nan  # banned before anything looks at it
    spans = spans_of(6, quotas=[6])
    token_ids, stats = run(logits, spans, backend=backend, banned_ids=banned, **settings)
    token_ids_masked, expected = run(masked, spans, backend=backend, **settings)
    assert torch.equal(token_ids, token_ids_masked)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))
    assert not torch.isin(stats.candidate, banned).any()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_thread_count_changes_no_bit(settings, rows, isa):
    logits, spans = random_logits(rows, 100_003), spans_of(rows, quotas=[rows])
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(run(logits, spans, **settings)[1])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("num_rows", [3, pytest.param(24, marks=exhaustive)])
@pytest.mark.parametrize("settings", settings_few("hot", "both_filters"))
def test_a_row_does_not_depend_on_its_batch(settings, num_rows, backend):
    logits, seeds = random_logits(num_rows, 40_001), torch.arange(num_rows)
    position, cu_rows, quotas = spans_of(num_rows, quotas=[num_rows])
    _, whole = run(logits, (position, cu_rows, quotas), backend=backend, seeds=seeds, **settings)
    for row in range(0, num_rows, 5):
        token_ids, alone = run(
            logits[row : row + 1], (int32(0), int32(0, 1), int32(1)), backend=backend,
            seeds=seeds[row : row + 1], positions=position[row : row + 1], **settings,
        )  # fmt: skip
        assert torch.equal(alone.confidence[0], whole.confidence[row])
        assert token_ids[0] == whole.candidate[row]


def test_rows_may_be_any_stride_apart(backend):
    wide, spans = random_logits(5, 1000), spans_of(5, quotas=[3])
    for start in (0, 1, 13):
        view = wide[:, start : start + 777]
        actual = run(view, spans, backend=backend)[1]
        expected = run(view.contiguous(), spans, backend=backend)[1]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_nothing_to_do(backend):
    empty = spans_of(quotas=[])
    token_ids, stats = run(random_logits(0, 50), empty, backend=backend)
    assert [len(part) for part in stats] == [0, 0, 0, 0]
    token_ids, stats = run(random_logits(2, 50), spans_of(2, quotas=[-1]), backend=backend)
    assert not stats.is_written.any()
    assert (token_ids == -5).all()


def test_on_a_gpu_what_is_out_of_range_is_not_written(backend):
    if backend.impl is ops.Impl.CPU:
        pytest.skip("a CPU refuses it")
    logits = random_logits(6, 40)
    _, expected = run(logits, spans_of(6, quotas=[6]), backend=backend)
    spans = int32(-1, 3, 15, 2**31 - 1, 4, 5), int32(0, 4), int32(4)
    banned = torch.tensor([-1, 40, -(2**40), 2**40])
    token_ids, stats = run(logits, spans, backend=backend, banned_ids=banned)
    assert stats.is_written.tolist() == [False, True, False, False, False, False]
    assert torch.equal(stats.candidate, expected.candidate)
    assert token_ids[3] == stats.candidate[1]
    assert (token_ids == -5).sum() == len(token_ids) - 1


def test_on_a_gpu_a_row_of_no_span_is_not_written(backend):
    if backend.impl is ops.Impl.CPU:
        pytest.skip("a CPU refuses it")
    logits, position = random_logits(6, 40), spans_of(6, quotas=[6])[0]
    settings = {
        "temperature": torch.full((2,), 0.7), "top_p": torch.full((2,), 0.9),
        "top_k": int32(5, 5), "alg_temp": torch.full((2,), 0.5), "step_idx": int32(3, 3),
    }  # fmt: skip
    writes_all = {"entropy": 0.0, "threshold": 0.0, "factor": math.inf, "entropy_budget": math.inf}
    for rule, threshold in writes_all.items():
        spans = position, int32(2, 3, 5), int32(9, 9)
        thresholds = torch.full((2,), threshold)
        token_ids, stats = run(
            logits, spans, backend=backend, rule=rule, threshold=thresholds, **settings
        )
        assert stats.is_written.tolist() == [False, False, True, True, True, False]
        assert (token_ids == -5).sum() == len(token_ids) - 3


def test_on_a_gpu_settings_of_no_span_are_not_read(backend):
    if backend.impl is ops.Impl.CPU:
        pytest.skip("a CPU refuses it")
    # Each setting is the empty end of a tensor in which the last element would be a NaN or huge.
    floats, ints = torch.full((4,), math.nan), torch.full((4,), 2**31 - 1, dtype=torch.int32)
    floats, ints = floats.to(backend.device), ints.to(backend.device)
    settings = {
        **dict.fromkeys(("temperature", "top_p", "alg_temp", "threshold"), floats[4:]),
        **dict.fromkeys(("top_k", "step_idx"), ints[4:]),
    }
    spans = spans_of(6, quotas=[6])[0], int32(0), int32()
    token_ids, stats = run(random_logits(6, 40), spans, backend=backend, **settings)
    assert not stats.is_written.any()
    assert (token_ids == -5).all()
    if backend.impl is ops.Impl.TRITON:  # 0 of each, as what is out of range counts
        assert stats.confidence.isfinite().all()
        assert torch.equal(stats.candidate, random_logits(6, 40).argmax(1))


@pytest.mark.parametrize("settings", settings_few("hot", "both_filters"))
def test_a_captured_graph_unmasks_again(settings, backend):
    if backend.device.type != "cuda":
        pytest.skip("no GPU")
    spans = [x.to(backend.device) for x in spans_of(4, 2, quotas=[2, 1])]
    logits = random_logits(6, 5000).to(backend.device)
    token_ids = torch.full((15,), -5, device=backend.device)

    def step():
        return ops.unmask_(token_ids, logits, *spans, impl=backend.impl, **settings)

    step()  # whatever is compiled or loaded at the first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = step()
    for seed in range(2):
        logits.copy_(random_logits(6, 5000, seed=seed))
        token_ids.fill_(-5)
        graph.replay()
        actual = [token_ids.clone(), *(part.clone() for part in stats)]
        token_ids.fill_(-5)
        expected = step()
        for a, b in zip(actual, [token_ids, *expected], strict=True):
            assert torch.equal(a, b)


# -- sampling ------------------------------------------------------------------------------------


def assert_drawn_from(probs, counts):
    """Chi-square: within 4.5 standard deviations of what the distribution gives."""
    expected = probs.double() * counts.sum()
    enough = expected > 5
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected)[enough] ** 2 / expected[enough]).sum()
    freedom = max(1, int(enough.sum()) - 1)
    assert abs(statistic - freedom) < 4.5 * math.sqrt(2 * freedom) + 1, (statistic, freedom)


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.8}, {"top_k": 20}, {"top_p": 0.9, "top_k": 11}], ids=str
)
@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_candidates_are_drawn_from_the_filtered_distribution(vary, settings, isa):
    num_draws, temperature = 20_000, 1.4
    row = random_logits(1, 60)[0] / 2
    values = torch.arange(num_draws)
    address = {"seeds": values * 7919} if vary == "seeds" else {"positions": values.int()}
    _, stats = run(
        row.expand(num_draws, -1), spans_of(num_draws, quotas=[0]), temperature=temperature,
        **address, **settings,
    )  # fmt: skip
    scaled = row.double() / temperature
    kept = reference.keep_prefix(scaled, settings.get("top_p", 1.0), settings.get("top_k", 0))
    probs = torch.softmax(scaled.masked_fill(~kept, -math.inf), -1)
    assert_drawn_from(probs, torch.bincount(stats.candidate, minlength=60))


def test_steps_and_seeds_draw_different_tokens():
    logits, spans = torch.zeros(64, 5000), spans_of(64, quotas=[64])
    draws = [
        run(logits, spans, temperature=1.0, seeds=torch.full((64,), seed), step_idx=step)[1]
        for seed, step in [(0, 0), (0, 1), (1, 0), (1 << 32, 0), (-1, 0), (0, 0)]
    ]
    for a, b in itertools.combinations(draws[:5], 2):
        assert (a.candidate == b.candidate).float().mean() < 0.1
    assert torch.equal(draws[0].candidate, draws[5].candidate)


@pytest.mark.parametrize("quota", [1, 2])
def test_alg_temp_draws_positions_without_replacement(quota):
    num_draws, alg_temp = 8000, 0.3
    logits = torch.tensor([[3.0, 0, 0], [2.0, 0, 0], [1.0, 0, 0], [0.5, 0, 0]])
    rows = logits.repeat(num_draws, 1)
    spans = spans_of(*[4] * num_draws, quotas=[quota] * num_draws)
    _, stats = run(
        rows, spans, rule="probability", alg_temp=alg_temp,
        seeds=torch.arange(num_draws).repeat_interleave(4),
    )  # fmt: skip
    p = torch.softmax(stats.confidence[:4].double() / alg_temp, 0)
    written = stats.is_written.view(num_draws, 4)
    assert (written.sum(1) == quota).all()
    if quota == 1:
        assert_drawn_from(p, written.sum(0))
        return
    pairs = list(itertools.combinations(range(4), 2))
    expected = [p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]) for a, b in pairs]
    counts = [(written[:, a] & written[:, b]).sum() for a, b in pairs]
    assert_drawn_from(torch.stack(expected), torch.stack(counts))


def test_reference_philox_known_answer():
    words = reference.philox(
        (torch.tensor(0x243F6A88), 0x85A308D3, 0x13198A2E, 0x03707344),
        torch.tensor(0x299F31D0A4093822),
    )
    assert [int(w) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


# -- the op in torch -----------------------------------------------------------------------------


def arguments(vocab_size=40, dtype=F32):
    return {
        "token_ids": torch.zeros(20, dtype=torch.int64),
        "logits": random_logits(6, vocab_size, dtype),
        "row_position": int32(1, 2, 5, 7, 8, 9),
        "cu_rows_span": int32(0, 2, 6),
        "num_unmask": int32(1, 2),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_unmask": torch.tensor([1, 2])}, "expected int32 [num_spans], got int64 [2]"),
        ({"token_ids": torch.zeros(20)}, "expected int64 [total_tokens], got float32 [20]"),
        ({"logits": torch.zeros(6, 40).double()}, "expected float32 or bfloat16 or float16"),
        ({"logits": torch.zeros(40, 6).T}, "expected rows without gaps, got strides (1, 6)"),
        ({"row_position": int32(1, 2, 3)}, "expected int32 [6], got int32 [3]"),
        ({"row_position": int32(1, 2, 5, 7, 8, 20)}, "[5]: expected 0 to 19, got 20"),
        ({"row_position": int32(-1, 2, 5, 7, 8, 9)}, "[0]: expected 0 to 19, got -1"),
        ({"row_position": int32(2, 2, 5, 7, 8, 9)}, "[1]: expected ascending positions"),
        ({"cu_rows_span": int32(0, 2, 5)}, "expected to end at num_rows = 6, got 5"),
        ({"cu_rows_span": int32(1, 2, 6)}, "expected to start at 0, got 1"),
        ({"cu_rows_span": int32(0, 7, 6)}, "expected ascending values, got 0 before 7"),
        ({"cu_rows_span": int32(0, 6)}, "expected int32 [3], got int32 [2]"),
        (
            {"rule": "best"},
            "expected one of entropy, probability, margin, threshold, factor, "
            "entropy_budget, got 'best'",
        ),
        *(
            ({"threshold": None, "rule": rule}, f"expected a value with rule '{rule}', got None")
            for rule in THRESHOLDS
        ),
        *(
            ({"threshold": value, "rule": "factor"}, f"expected >= 0, got {value}")
            for value in (-0.5, -math.inf, math.nan)
        ),
        ({"threshold": torch.tensor([0.5, -1.0]), "rule": "factor"}, "expected >= 0, got -1"),
        ({"threshold": torch.tensor([math.nan, 1.0])}, "expected >= 0, got nan"),
        ({"temperature": -1.0}, "expected a finite number >= 0, got -1"),
        ({"temperature": math.nan}, "expected a finite number >= 0, got nan"),
        ({"temperature": math.inf}, "expected a finite number >= 0, got inf"),
        ({"temperature": 1e39}, "expected a finite number >= 0, got 1e+39"),
        ({"temperature": "hot"}, "expected a number or a tensor [num_spans], got 'hot'"),
        ({"temperature": torch.zeros(3)}, "expected float32 [2], got float32 [3]"),
        ({"top_p": -0.5}, "expected >= 0, got -0.5"),
        ({"top_k": -3}, "expected 0 to 2147483647, got -3"),
        ({"top_k": 2**40}, "expected 0 to 2147483647, got 1099511627776"),
        ({"step_idx": 2**31}, "expected 0 to 2147483647, got 2147483648"),
        ({"step_idx": -1}, "expected 0 to 2147483647, got -1"),
        ({"top_k": 1.5}, "expected an integer or a tensor [num_spans], got 1.5"),
        ({"top_p": math.nan}, "expected >= 0, got nan"),
        ({"top_p": None}, "expected a number or a tensor [num_spans], got None"),
        ({"alg_temp": -1.0}, "expected >= 0, got -1"),
        ({"alg_temp": math.nan}, "expected >= 0, got nan"),
        ({"threshold": math.nan}, "expected >= 0, got nan"),
        ({"threshold": math.nan, "rule": "threshold"}, "expected >= 0, got nan"),
        ({"logits": torch.zeros(6, 0)}, "expected a vocab_size >= 1, got 0"),
        ({"banned_ids": torch.tensor([3, 40])}, "[1]: expected 0 to 39, got 40"),
        ({"seeds": torch.zeros(5, dtype=torch.int64)}, "expected int64 [6], got int64 [5]"),
        ({"positions": torch.zeros(6)}, "expected int32 [6], got float32 [6]"),
        ({"impl": "gpu"}, "expected one of auto, cpu, cuda, triton, reference, got 'gpu'"),
        pytest.param(
            {"impl": "cuda"},
            "cuda is not available on cpu",
            marks=pytest.mark.skipif(_C.emulates_cuda, reason="it is emulated on the CPU"),
        ),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(changed, message):
    inputs = arguments() | changed
    before = inputs["token_ids"].clone()
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(message)}"):
        ops.unmask_(**inputs)
    assert torch.equal(inputs["token_ids"], before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1"),
        ({"temperature": math.inf}, "temperature: expected a finite number >= 0, got inf"),
        ({"top_p": math.nan}, "top_p: expected >= 0, got nan"),
        ({"alg_temp": math.nan}, "alg_temp: expected >= 0, got nan"),
        ({"threshold": math.nan}, "threshold: expected >= 0, got nan"),
        ({"threshold": -1.0, "rule": "entropy_budget"}, "threshold: expected >= 0, got -1"),
        ({"top_k": 2**40}, "top_k: expected 0 to 2147483647, got 1099511627776"),
        ({"step_idx": 2**31}, "step_idx: expected 0 to 2147483647, got 2147483648"),
        ({"logits": torch.zeros(6, 0)}, "logits: expected a vocab_size >= 1, got 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", Impl)
def test_every_implementation_refuses_numbers_and_sizes_alike(impl, changed, message):
    backend = Backend(impl)
    if backend.missing:
        pytest.skip(backend.missing)
    inputs = {
        name: x.to(backend.device) if isinstance(x, torch.Tensor) else x
        for name, x in (arguments() | changed).items()
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.unmask_(**inputs, impl=impl)
    assert not inputs["token_ids"].any()


def test_a_compiled_step_refuses_numbers_too():
    compiled = torch.compile(lambda inputs: ops.unmask_(**inputs, top_k=2**40))
    inputs = arguments()
    with pytest.raises(ValueError, match="top_k: expected 0 to 2147483647, got 1099511627776"):
        compiled(inputs)
    assert not inputs["token_ids"].any()


def test_logits_that_require_grad_are_refused():
    inputs = arguments()
    inputs["logits"].requires_grad_()
    with pytest.raises(RuntimeError, match="unmask_: logits requires grad"):
        ops.unmask_(**inputs)
    with torch.no_grad():
        ops.unmask_(**inputs)


def test_reference_impl_is_the_reference():
    actual, expected = arguments(), arguments()
    stats = ops.unmask_(**actual, impl="reference", temperature=0.9, top_p=0.9)
    stats_ref = reference.unmask_(**expected, temperature=0.9, top_p=0.9)
    assert torch.equal(actual["token_ids"], expected["token_ids"])
    assert torch.equal(stats.confidence, stats_ref[0])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_opcheck(dtype):
    settings = [
        torch.ones(2),
        torch.ones(2),
        int32(0, 9),
        torch.zeros(2),
        torch.zeros(2),
        int32(0, 1),
    ]
    torch.library.opcheck(
        torch.ops.pdiff.unmask_,
        (
            *arguments(dtype=dtype).values(),
            "entropy",
            *settings,
            None,
            None,
            None,
            int32(3, 4),
            "auto",
        ),
    )


def test_compiles_without_graph_breaks():
    def step(inputs, top_p):
        logits = inputs["logits"] * 1.5
        return ops.unmask_(**{**inputs, "logits": logits}, temperature=0.7, top_p=top_p, top_k=9)

    actual, expected = ({**arguments(), "num_masked": int32(5, 5)} for _ in range(2))
    top_p = torch.tensor([0.9, 0.5])
    stats = torch.compile(step, fullgraph=True)(actual, top_p)
    stats_eager = step(expected, top_p)
    for name in ("token_ids", "num_masked"):
        assert torch.equal(actual[name], expected[name])
    assert all(torch.equal(a, b) for a, b in zip(stats, stats_eager, strict=True))
