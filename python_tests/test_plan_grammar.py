"""The plan grammar against llguidance, and against all short plans that a regex accepts."""

import copy
import itertools
import os
import re

import numpy as np
import pytest
import torch

from pdiff_runtime.plan import ControlTokens, PlanError, PlanGrammar, Topic, parse_plan

TAGS = ControlTokens(
    topic_start=1, topic_end=3, async_start=2, async_end=4, sync=5, mask=6, pad=8, eos=7,
    digits=tuple(range(10, 20)),
)  # fmt: skip
START, END, SYNC, EOS = TAGS.topic_start, TAGS.topic_end, TAGS.sync, TAGS.eos
ZERO, ONE, TWO, FIVE = (TAGS.digits[d] for d in (0, 1, 2, 5))
WORD, VOCAB_SIZE = 20, 24
BANNED = [0, 9]
NEVER = {*BANNED, TAGS.async_start, TAGS.async_end, TAGS.mask, TAGS.pad}
NUM_RANDOM_STRINGS = int(os.environ.get("PDIFF_NUM_RANDOM_STRINGS", 100_000))


def grammar(**caps):
    return PlanGrammar(TAGS, VOCAB_SIZE, banned_ids=BANNED, **caps)


def legal(state):
    return set(state.allowed_mask().nonzero().flatten().tolist())


def advanced(state, token_ids):
    for token_id in token_ids:
        state.advance(token_id)
    return state


def plan_regex(max_topic_tokens, max_topics):
    """Whole plans, a letter per class: t text, 0, n digit 1-9, S E topic tags, Y sync, Z eos."""
    one_digit = f"[t0n]{{1,{max_topic_tokens - 1}}}n"
    two_digits = f"|[t0n]{{1,{max_topic_tokens - 2}}}n[0n]" if max_topic_tokens > 2 else ""
    topic = f"S(?:{one_digit}{two_digits})E[t0n]*"
    round_ = f"[t0n]*(?:{topic}){{1,{max_topics}}}Y"
    return re.compile(f"(?:{round_})*(?:{round_}|[t0n]*(?:{topic}){{0,{max_topics}}}Z)")


LETTERS = {"t": WORD, "0": ZERO, "n": FIVE, "S": START, "E": END, "Y": SYNC, "Z": EOS}


@pytest.mark.parametrize(("max_topic_tokens", "max_topics"), [(64, 32), (2, 1), (3, 1)])
def test_legal_tokens_are_those_from_which_a_plan_within_budget_is_reached(
    max_topic_tokens, max_topics
):
    max_budget = 6
    regex = plan_regex(max_topic_tokens, max_topics)
    plans = [
        "".join(letters)
        for length in range(1, max_budget + 1)
        for letters in itertools.product(LETTERS, repeat=length)
        if letters[-1] in "YZ" and regex.fullmatch("".join(letters))
    ]
    grammar_ = grammar(max_topic_tokens=max_topic_tokens, max_topics=max_topics)
    for budget in range(1, max_budget + 1):
        next_letters = {}
        for plan in plans:
            for i in range(len(plan) if len(plan) <= budget else 0):
                next_letters.setdefault(plan[:i], set()).add(plan[i])
        reached = 0
        stack = [("", grammar_.start(budget))]
        while stack:  # all that the state machine can write
            prefix, state = stack.pop()
            allowed = legal(state)
            assert allowed.isdisjoint(NEVER)
            letters = {letter for letter, token_id in LETTERS.items() if token_id in allowed}
            assert letters == next_letters.get(prefix, set()), (prefix, budget)
            reached += 1
            for letter in letters:
                fork = copy.copy(state)
                fork.advance(LETTERS[letter])
                stack.append((prefix + letter, fork))
        assert reached == len(next_letters) + sum(
            len(plan) <= budget and plan not in next_letters for plan in plans
        )


def llguidance_matcher(max_topic_tokens, max_topics):
    llguidance = pytest.importorskip("llguidance", reason="llguidance is the oracle here")

    class Vocabulary:
        eos_token_id, bos_token_id = 0, None
        tokens = tuple(f"<{i}>".encode() for i in range(VOCAB_SIZE))
        special_token_ids = tuple(range(VOCAB_SIZE))

        def __call__(self, text):
            return []

    # The lexer wants disjoint ranges; a digit is text or number by the rules above it.
    lark = f"""
        start: round* last
        round: text* with_text{{1,{max_topics}}} <[{SYNC}]>
        last: text* with_text{{0,{max_topics}}} <[{EOS}]>
        with_text: topic text*
        topic: <[{START}]> content <[{END}]>
        content: text{{1,{max_topic_tokens - 1}}} high | text{{1,{max_topic_tokens - 2}}} high digit
        text: word | digit
        digit: zero | high
        zero: <[{ZERO}]>
        high: <[{ZERO + 1}-{ZERO + 9}]>
        word: <[{WORD}-{VOCAB_SIZE - 1}]>
    """
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(lark))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


@pytest.mark.parametrize(("max_topic_tokens", "max_topics"), [(64, 32), (5, 2), (3, 1)])
def test_random_walks_agree_with_llguidance(max_topic_tokens, max_topics):
    matcher = llguidance_matcher(max_topic_tokens, max_topics)
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    rng = np.random.default_rng(0)
    bitmask = allocate_token_bitmask(1, VOCAB_SIZE)
    grammar_ = grammar(max_topic_tokens=max_topic_tokens, max_topics=max_topics)
    for _ in range(100):
        matcher.reset()
        state = grammar_.start(10_000)
        for _ in range(60):
            fill_next_token_bitmask(matcher, bitmask, 0)
            allowed = {i for i in range(VOCAB_SIZE) if bitmask[0, 0] >> i & 1}
            assert legal(state) == allowed
            # Controls and digits often, eos rarely.
            ids = sorted(allowed)
            weights = np.array([0.05 if i == EOS else 0.2 if i >= WORD else 1.0 for i in ids])
            token_id = int(rng.choice(ids, p=weights / weights.sum()))
            state.advance(token_id)
            assert matcher.consume_token(token_id)
            if state.is_finished == "eos":
                break


def longest_number(content):
    """The rule for the number, read off the content of a topic; None if it has none."""
    for num_digits in (2, 1):
        words, digits = content[:-num_digits], content[-num_digits:]
        if words and all(token_id in TAGS.digits for token_id in digits):
            text = "".join(str(TAGS.digits.index(token_id)) for token_id in digits)
            if len(digits) == num_digits and text[0] != "0":
                return Topic(tuple(words), int(text))
    return None


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_a_topic_announces_the_longest_number_that_leaves_a_word(length):
    for content in itertools.product([WORD, ZERO, ONE, FIVE], repeat=length):
        state = advanced(grammar().start(100), [START, *content])
        expected = longest_number(content)
        assert (END in legal(state)) == (expected is not None)
        if expected is None:
            with pytest.raises(PlanError):
                parse_plan([START, *content, END], TAGS)
        else:
            state.advance(END)
            assert state.topics == parse_plan([START, *content, END], TAGS) == [expected]


@pytest.mark.parametrize("max_topic_tokens", [2, 3, 8])
def test_a_long_topic_is_closed_by_force(max_topic_tokens):
    state = advanced(
        grammar(max_topic_tokens=max_topic_tokens).start(100),
        [START] + [WORD] * (max_topic_tokens - 1),
    )
    assert legal(state) == set(TAGS.digits[1:])
    state.advance(FIVE)
    assert legal(state) == {END}


def test_at_the_topic_cap_no_topic_starts_until_the_next_round():
    topic = [START, WORD, FIVE, END]
    state = advanced(grammar(max_topics=2).start(100), topic * 2)
    assert START not in legal(state)
    assert {SYNC, EOS, WORD} <= legal(state)
    state.advance(SYNC)
    assert START in legal(state)
    assert SYNC not in legal(state)
    assert START not in legal(grammar(max_topics=0).start(100))


@pytest.mark.parametrize("budget", range(1, 40))
def test_every_walk_ends_within_its_budget(budget):
    rng = np.random.default_rng(budget)
    grammar_ = grammar(max_topic_tokens=5, max_topics=3)
    for _ in range(20):
        state, token_ids, rounds = grammar_.start(budget), [], []
        while allowed := sorted(legal(state)):
            token_ids.append(int(rng.choice(allowed)))
            state.advance(token_ids[-1])
            if state.is_finished:
                rounds.append((token_ids[-1], len(token_ids), state.topics))
        assert len(token_ids) == budget - state.budget <= budget
        assert state.is_finished
        for closing, end, topics in rounds:
            assert closing in (SYNC, EOS)
            assert parse_plan(token_ids[:end], TAGS) == topics
            assert len(topics) <= 3
            assert all(1 <= topic.number <= 99 for topic in topics)


def test_masks_are_one_table_that_a_batch_gathers_from():
    grammar_ = grammar()
    states = [
        grammar_.start(100),
        advanced(grammar_.start(100), [START]),
        advanced(grammar_.start(100), [START, WORD, FIVE]),
        advanced(grammar_.start(100), [EOS]),
    ]
    assert grammar_.masks.dtype == torch.bool
    assert grammar_.masks.shape[1] == VOCAB_SIZE
    assert not grammar_.masks[:, sorted(NEVER)].any()
    gathered = grammar_.masks[[state.mask_idx for state in states]]
    assert torch.equal(gathered, torch.stack([state.allowed_mask() for state in states]))
    assert not gathered[3].any()
    assert len(set(map(tuple, grammar_.masks.tolist()))) == len(grammar_.masks)


def test_every_mask_is_reached():
    rng = np.random.default_rng(0)
    grammar_, reached = grammar(max_topic_tokens=4, max_topics=2), set()
    for _ in range(300):
        state = grammar_.start(int(rng.integers(1, 20)))
        reached.add(state.mask_idx)
        while allowed := sorted(legal(state)):
            state.advance(int(rng.choice(allowed)))
            reached.add(state.mask_idx)
    assert reached == set(range(len(grammar_.masks)))


def test_topics_and_finish_belong_to_the_round():
    first = [WORD, START, WORD, ONE, FIVE, END, START, WORD, WORD, FIVE, END, WORD]
    state = advanced(grammar().start(100), first)
    topics = [Topic((WORD,), 15), Topic((WORD, WORD), 5)]
    assert state.topics == topics
    assert state.is_finished is None
    state.advance(SYNC)
    assert state.topics == topics
    assert state.is_finished == "sync"
    state.advance(START)
    assert state.topics == []
    assert state.is_finished is None
    advanced(state, [WORD, FIVE, END, EOS])
    assert state.topics == [Topic((WORD,), 5)]
    assert state.is_finished == "eos"


@pytest.mark.parametrize("fork", [copy.copy, copy.deepcopy])
def test_a_copy_goes_its_own_way(fork):
    state = advanced(grammar().start(100), [START, WORD])
    other = fork(state)
    advanced(other, [WORD, FIVE, END])
    advanced(state, [FIVE, END])
    assert state.topics == [Topic((WORD,), 5)]
    assert other.topics == [Topic((WORD, WORD), 5)]
    assert (state.budget, other.budget) == (96, 95)


@pytest.mark.parametrize(
    ("before", "token_id", "message"),
    [
        ([], SYNC, r"expected text or topic_start or eos outside a topic, got 5 \(sync\)"),
        ([START], END, r"expected text inside topic 1 after 0 tokens, got 3 \(topic_end\)"),
        ([START, WORD], EOS, r"inside topic 1 after 1 tokens, got 7 \(eos\)"),
        ([START, WORD] * 1 + [FIVE, END], TAGS.mask, r"got 6 \(a banned token\)"),
        ([EOS], WORD, r"expected nothing more after eos, got 20 \(text\)"),
        ([START, WORD, WORD], WORD, r"expected a digit 1 to 9 inside topic 1"),
        ([START, WORD, FIVE, END] * 2, START, r"got 1 \(topic_start\)"),
        ([], VOCAB_SIZE, "token_id: expected 0 to 23, got 24"),
        ([], -1, "token_id: expected 0 to 23, got -1"),
    ],
)
def test_an_illegal_token_is_named_and_changes_nothing(before, token_id, message):
    state = advanced(grammar(max_topic_tokens=3, max_topics=2).start(20), before)
    allowed, budget, topics = legal(state), state.budget, state.topics
    with pytest.raises(ValueError, match=message):
        state.advance(token_id)
    assert (legal(state), state.budget, state.topics) == (allowed, budget, topics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_topic_tokens": 1}, "max_topic_tokens: expected 2 to"),
        ({"max_topics": -1}, "max_topics: expected 0 to"),
        ({"banned_ids": [EOS]}, r"banned_ids: expected no id that plans need, got 7 \(eos\)"),
        ({"banned_ids": [FIVE]}, r"got 15 \(digit 5\)"),
        ({"banned_ids": [VOCAB_SIZE]}, "vocab_size: expected all ids from 0 to 23"),
        ({"vocab_size": 19}, "vocab_size: expected all ids from 0 to 18, got 1 to 19"),
    ],
)
def test_a_grammar_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlanGrammar(TAGS, **{"vocab_size": VOCAB_SIZE, **arguments})


@pytest.mark.parametrize("budget", [0, -3, 2**30 + 1])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget: expected 1 to 1073741824, got {budget}"):
        grammar().start(budget)


TOPIC = [START, WORD, FIVE, END]
SPAN = [TAGS.async_start, WORD, TAGS.async_end]


@pytest.mark.parametrize(
    ("token_ids", "topics"),
    [
        ([], []),
        ([WORD, WORD], []),
        ([WORD, EOS], []),
        (TOPIC, [Topic((WORD,), 5)]),
        ([*TOPIC, SYNC], [Topic((WORD,), 5)]),
        ([WORD, *TOPIC, WORD, *TOPIC, EOS], [Topic((WORD,), 5)] * 2),
        ([*TOPIC, *SPAN, SYNC, WORD, START, WORD, ONE, TWO, END, SYNC], [Topic((WORD,), 12)]),
        ([START, TWO, WORD, FIVE, END], [Topic((TWO, WORD), 5)]),
    ],
)
def test_parse_plan_reads_the_last_round(token_ids, topics):
    assert parse_plan(token_ids, TAGS) == topics
    assert parse_plan(np.array(token_ids, dtype=np.int64), TAGS) == topics


@pytest.mark.parametrize(
    ("token_ids", "position", "message"),
    [
        ([START, WORD, END], 2, r"token_ids\[2\]: .*expected text inside topic 1"),
        ([START, WORD, FIVE], 3, "expected topic_end, got the end at 3 with a topic open"),
        ([START, WORD, START], 2, "topic_start"),
        ([WORD, SYNC], 1, r"got 5 \(sync\)"),
        ([*TOPIC, SYNC, SYNC], 5, r"got 5 \(sync\)"),
        ([WORD, EOS, WORD], 2, "nothing more after eos"),
        ([*TOPIC, *SPAN], 4, r"got 2 \(a banned token\)"),
        ([END], 0, "topic_end"),
        ([WORD, -1], 1, "got -1"),
    ],
)
def test_parse_plan_names_the_position(token_ids, position, message):
    with pytest.raises(PlanError, match=message) as error:
        parse_plan(token_ids, TAGS)
    assert error.value.position == position


@pytest.mark.parametrize(
    ("token_ids", "topics"),
    [
        ([START, TWO, WORD, FIVE, END], [Topic((WORD, FIVE), 2)]),
        ([START, WORD, ONE, TWO, FIVE, END], [Topic((WORD, FIVE), 12)]),
        ([START, ONE, END], [Topic((), 1)]),
        ([START, WORD, ZERO, END], [Topic((WORD,), 0)]),
        ([START, WORD, ZERO, FIVE, END], [Topic((WORD,), 5)]),
        ([END, *TOPIC, WORD, START, WORD], [Topic((WORD,), 5)]),
        ([START, WORD, *TOPIC], [Topic((WORD, START, WORD), 5)]),
        ([*TOPIC, SYNC, START, TWO, END], [Topic((), 2)]),
    ],
)
def test_parse_plan_as_the_published_models_do(token_ids, topics):
    assert parse_plan(token_ids, TAGS, compat="published") == topics


@pytest.mark.parametrize(
    ("token_ids", "position"),
    [([], 0), ([WORD], 0), ([*TOPIC, SYNC], 5), ([START, FIVE], 0), ([WORD, START, WORD, END], 1)],
)
def test_a_published_plan_needs_a_topic_with_a_digit(token_ids, position):
    with pytest.raises(PlanError) as error:
        parse_plan(token_ids, TAGS, compat="published")
    assert error.value.position == position


def test_compat_is_checked():
    with pytest.raises(ValueError, match="compat: expected None or 'published', got 'ours'"):
        parse_plan([], TAGS, compat="ours")


def random_strings(num_strings):
    """Token strings, half of them of controls and digits only, so that some come far."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 14, num_strings)
    ids = rng.integers(-1, VOCAB_SIZE + 1, lengths.sum())
    likely = rng.choice([START, END, SYNC, EOS, WORD, ZERO, FIVE], lengths.sum())
    ids = np.where(np.repeat(rng.random(num_strings) < 0.5, lengths), ids, likely).tolist()
    ends = np.cumsum(lengths).tolist()
    return (ids[end - n : end] for n, end in zip(lengths.tolist(), ends, strict=True))


def test_random_strings_parse_or_raise_plan_error():
    num_parsed = 0
    for token_ids in random_strings(NUM_RANDOM_STRINGS):
        for compat in (None, "published"):
            try:
                topics = parse_plan(token_ids, TAGS, compat=compat)
            except PlanError as error:
                position = error.position
            else:
                position = len(token_ids)
                num_parsed += len(topics) > 0
            assert 0 <= position <= len(token_ids)
    assert num_parsed > NUM_RANDOM_STRINGS // 1000


def test_random_strings_leave_the_state_machine_sound():
    grammar_ = grammar(max_topic_tokens=4, max_topics=2)
    num_legal = grammar_.masks.sum(1).tolist()
    num_advanced = 0
    for token_ids in random_strings(NUM_RANDOM_STRINGS):
        state = grammar_.start(9)
        for token_id in token_ids:
            budget = state.budget
            try:
                state.advance(token_id)
                num_advanced += 1
                assert state.budget == budget - 1 >= 0
            except ValueError:
                assert state.budget == budget
        assert state.is_finished or num_legal[state.mask_idx] > 0
    assert num_advanced > NUM_RANDOM_STRINGS
