"""The page allocator and its prefix cache: each rule, and random courses against a plain model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pdiff_runtime.cache import OutOfPagesError, PageAllocator

hypothesis = pytest.importorskip("hypothesis")
stateful = pytest.importorskip("hypothesis.stateful")
st = pytest.importorskip("hypothesis.strategies")


def tokens(*values):
    return np.array(values, dtype=np.int64)


def publish_chain(allocator, pages):
    """Cache pages one below the other, each under its own number; their serials."""
    serials = [0]
    for page in pages:
        serials.append(allocator.publish(page, serials[-1], tokens(page)))
    return serials[1:]


def counts(allocator):
    return (
        allocator.num_free,
        allocator.num_cached,
        allocator.num_evictions,
        [allocator.reference_count(page) for page in range(allocator.num_pages)],
    )


@pytest.fixture
def allocator():
    """Page 0 is held and cached, 1 evictable, 2 held, 3 free."""
    allocator = PageAllocator(4)
    assert allocator.allocate(3) == [0, 1, 2]
    publish_chain(allocator, [0, 1])
    allocator.release([1])
    assert counts(allocator) == (2, 2, 0, [1, 0, 1, 0])
    yield allocator
    allocator.check_integrity()


def test_pages_come_in_order_and_last_freed_first():
    allocator = PageAllocator(5)
    assert allocator.num_pages == allocator.num_free == 5
    assert allocator.allocate(3) == [0, 1, 2]
    assert allocator.allocate(0) == []
    allocator.release([0, 1])
    assert allocator.allocate(4) == [0, 1, 3, 4]
    assert allocator.num_free == 0


def test_evictable_pages_come_last_and_leave_the_cache(allocator):
    assert allocator.allocate(2) == [3, 1]
    assert counts(allocator) == (0, 1, 1, [1, 1, 1, 1])
    assert allocator.find(1, tokens(1)) is None


def test_the_page_released_longest_ago_is_evicted_first_and_a_tail_before_its_head():
    allocator = PageAllocator(4)
    allocator.allocate(4)
    publish_chain(allocator, [0, 1])
    publish_chain(allocator, [2, 3])
    allocator.release([2, 3])
    allocator.release([0, 1])
    allocator.retain([2])
    allocator.release([2])
    assert allocator.find(0, tokens(0)) is not None  # no use
    assert allocator.allocate(4) == [3, 1, 0, 2]


def test_out_of_pages_takes_nothing(allocator):
    before = counts(allocator)
    with pytest.raises(OutOfPagesError, match="^pages: 3 asked for, 2 free$"):
        allocator.allocate(3)
    assert counts(allocator) == before
    assert issubclass(OutOfPagesError, RuntimeError)
    assert not issubclass(OutOfPagesError, ValueError)


def test_references_are_counted(allocator):
    allocator.retain([2, 0, 2])
    assert counts(allocator) == (2, 2, 0, [2, 0, 3, 0])
    allocator.release([2, 2, 0])
    assert counts(allocator) == (2, 2, 0, [1, 0, 1, 0])
    allocator.release([2])
    assert allocator.allocate(1) == [2]


def test_an_evictable_page_can_be_retained(allocator):
    allocator.retain([1])
    assert counts(allocator) == (1, 2, 0, [1, 1, 1, 0])
    with pytest.raises(OutOfPagesError):
        allocator.allocate(2)


def test_a_second_page_of_the_same_key_stays_private(allocator):
    before = counts(allocator)
    assert allocator.publish(2, 0, tokens(0)) == 0
    assert counts(allocator) == before
    assert allocator.find(0, tokens(0))[0] == 0
    allocator.release([2])
    assert allocator.allocate(1) == [2]


def test_keys_are_parent_and_all_tokens():
    allocator = PageAllocator(4)
    pages = allocator.allocate(4)
    keys = [(1, 2), (1, 2, 3), (2, 1), (-(2**63), 2**63 - 1)]
    serials = [
        allocator.publish(page, 0, tokens(*key)) for page, key in zip(pages, keys, strict=True)
    ]
    assert len({0, *serials}) == 5
    for page, serial, key in zip(pages, serials, keys, strict=True):
        assert allocator.find(0, tokens(*key)) == (page, serial)
        assert allocator.find(serial, tokens(*key)) is None
    for key in [(1,), (1, 3), (), (1, 2, 3, 0)]:
        assert allocator.find(0, tokens(*key)) is None


def test_serials_never_come_again():
    allocator = PageAllocator(2)
    serials = set()
    for _ in range(100):
        (page,) = allocator.allocate(1)
        serials.add(allocator.publish(page, 0, tokens(0)))
        allocator.release([page])
        allocator.clear_cache()
    assert len(serials - {0}) == 100


def test_tokens_may_be_anything_that_casts_to_int64(allocator):
    serial = allocator.publish(2, 0, [8, 9])
    strided = np.array([8, 0, 9, 0], dtype=np.int32)[::2]
    assert allocator.find(0, strided) == allocator.find(0, tokens(8, 9)) == (2, serial)
    with pytest.raises(TypeError):
        allocator.find(0, np.array([8.0, 9.0]))


def test_what_is_below_an_evicted_page_leaves_with_it():
    allocator = PageAllocator(4)
    allocator.allocate(4)
    serials = publish_chain(allocator, [0, 1, 2])
    allocator.publish(3, serials[0], tokens(9))
    allocator.release([0])  # against the rule: its children are held
    allocator.release([2])
    assert allocator.allocate(1) == [0]
    assert counts(allocator) == (1, 0, 4, [1, 1, 0, 1])
    allocator.check_integrity()


def test_clear_cache_keeps_what_is_held(allocator):
    allocator.clear_cache()
    assert counts(allocator) == (2, 0, 0, [1, 0, 1, 0])
    assert allocator.find(0, tokens(0)) is None
    with pytest.raises(ValueError, match="pages: expected ones that are held or cached, got 1"):
        allocator.retain([1])
    assert allocator.publish(0, 0, tokens(0)) > 0


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("allocate", [-1], "count: expected >= 0, got -1"),
        ("retain", [[0, 3]], "pages: expected ones that are held or cached, got 3"),
        ("retain", [[0, 4]], "pages: expected 0 to 3, got 4"),
        ("retain", [[0, -1]], "pages: expected 0 to 3, got -1"),
        ("release", [[0, 3]], "pages: expected none more often than it is held, got 3"),
        ("release", [[0, 1]], "pages: expected none more often than it is held, got 1"),
        ("release", [[2, 0, 2]], "pages: expected none more often than it is held, got 2"),
        ("release", [[0, 1 << 40]], "pages: expected 0 to 3, got 1099511627776"),
        ("reference_count", [4], "page: expected 0 to 3, got 4"),
        ("publish", [3, 0, tokens(5)], "page: expected one that is held, got 3"),
        ("publish", [1, 0, tokens(5)], "page: expected one that is held, got 1"),
        ("publish", [0, 0, tokens(5)], "page: expected one that is not cached, got 0"),
        ("publish", [-1, 0, tokens(5)], "page: expected 0 to 3, got -1"),
        ("publish", [2, 999, tokens(5)], "parent: expected 0 or the serial of an entry, got 999"),
        ("publish", [2, -1, tokens(5)], "parent: expected 0 or the serial of an entry, got -1"),
        ("publish", [2, 0, tokens()], "tokens: expected at least one, got none"),
        ("publish", [2, 0, tokens(5)[None]], "tokens: expected 1 dimension, got 2"),
        ("find", [0, tokens(5)[None]], "tokens: expected 1 dimension, got 2"),
    ],
)
def test_a_wrong_argument_is_named_and_changes_nothing(allocator, method, arguments, message):
    before = counts(allocator)
    with pytest.raises(ValueError, match=f"^{message}$"):
        getattr(allocator, method)(*arguments)
    assert counts(allocator) == before


@pytest.mark.parametrize("num_pages", [0, -1, 1 << 31])
def test_an_allocator_has_pages(num_pages):
    with pytest.raises(ValueError, match=f"num_pages: expected 1 to 2147483647, got {num_pages}"):
        PageAllocator(num_pages)


def test_everything_public_is_explained():
    for cls in (PageAllocator, OutOfPagesError):
        assert cls.__doc__
        assert all(vars(cls)[name].__doc__ for name in vars(cls) if not name.startswith("_"))


@dataclasses.dataclass
class Entry:
    serial: int
    parent: int
    key: tuple[int, ...]


class Model:
    """The rules in the plainest words: lists, and a look at everything."""

    def __init__(self, num_pages):
        self.references = [0] * num_pages
        self.free = list(reversed(range(num_pages)))
        self.evictable = []
        self.cache = {}  # page -> Entry, in the order of publication
        self.num_evictions = 0

    @property
    def num_free(self):
        return self.references.count(0)

    def allocate(self, count):
        pages = []
        while len(pages) < count:
            if not self.free:
                num_cached = len(self.cache)
                self.uncache(self.evictable[0])
                self.num_evictions += num_cached - len(self.cache)
            pages.append(self.free.pop())
            self.references[pages[-1]] = 1
        return pages

    def can_retain(self, pages):
        return all(
            page in range(len(self.references)) and (self.references[page] or page in self.cache)
            for page in pages
        )

    def retain(self, pages):
        for page in pages:
            self.references[page] += 1
            if page in self.evictable:
                self.evictable.remove(page)

    def can_release(self, pages):
        return all(
            page in range(len(self.references)) and pages.count(page) <= self.references[page]
            for page in pages
        )

    def release(self, pages):
        for page in reversed(pages):
            self.references[page] -= 1
            if self.references[page] == 0:
                (self.evictable if page in self.cache else self.free).append(page)

    def can_publish(self, page, parent):
        return (
            page in range(len(self.references))
            and self.references[page] > 0
            and page not in self.cache
            and parent in {0, *(entry.serial for entry in self.cache.values())}
        )

    def find(self, parent, key):
        for page, entry in self.cache.items():
            if (entry.parent, entry.key) == (parent, key):
                return page, entry.serial
        return None

    def uncache(self, page):
        serial = self.cache[page].serial
        for child in [child for child, entry in self.cache.items() if entry.parent == serial]:
            self.uncache(child)
        del self.cache[page]
        if page in self.evictable:
            self.evictable.remove(page)
            self.free.append(page)

    def clear_cache(self):
        for page in range(len(self.references)):
            if page in self.cache:
                self.uncache(page)


class AllocatorMachine(stateful.RuleBasedStateMachine):
    """The allocator does what the model does, and refuses what the model can not do."""

    keys = st.lists(st.integers(0, 1), max_size=2).map(tuple)
    page_lists = st.lists(st.integers(-1, 6), max_size=5)

    @stateful.initialize(num_pages=st.integers(1, 6))
    def start(self, num_pages):
        self.allocator, self.model = PageAllocator(num_pages), Model(num_pages)
        self.serials = [0, 1 << 40]  # of all entries ever, the root's and one that never was

    def agree(self, is_legal, method, pages):
        if is_legal:
            getattr(self.allocator, method)(pages)
            getattr(self.model, method)(pages)
        else:
            with pytest.raises(ValueError, match="pages: expected"):
                getattr(self.allocator, method)(pages)

    @stateful.rule(count=st.integers(-1, 7))
    def allocate(self, count):
        if count < 0:
            with pytest.raises(ValueError, match="count: expected >= 0"):
                self.allocator.allocate(count)
        elif count > self.model.num_free:
            with pytest.raises(OutOfPagesError, match=f"{count} asked for"):
                self.allocator.allocate(count)
        else:
            assert self.allocator.allocate(count) == self.model.allocate(count)

    @stateful.rule(pages=page_lists)
    def retain(self, pages):
        self.agree(self.model.can_retain(pages), "retain", pages)

    @stateful.rule(pages=page_lists)
    def release(self, pages):
        self.agree(self.model.can_release(pages), "release", pages)

    @stateful.rule(data=st.data())
    def release_what_is_held(self, data):
        held = [page for page, count in enumerate(self.model.references) for _ in range(count)]
        pages = data.draw(st.permutations(held))
        self.agree(True, "release", pages[: data.draw(st.integers(0, len(pages)))])

    @stateful.rule(page=st.integers(-1, 6), data=st.data(), key=keys)
    def publish(self, page, data, key):
        parent = data.draw(st.sampled_from(self.serials))
        if not self.model.can_publish(page, parent) or not key:
            with pytest.raises(ValueError, match="(page|parent|tokens): expected"):
                self.allocator.publish(page, parent, tokens(*key))
            return
        is_taken = self.model.find(parent, key) is not None
        serial = self.allocator.publish(page, parent, tokens(*key))
        if is_taken:
            assert serial == 0
        else:
            assert serial >= 1
            assert serial not in self.serials
            self.serials.append(serial)
            self.model.cache[page] = Entry(serial, parent, key)

    @stateful.rule(data=st.data(), key=keys)
    def find(self, data, key):
        parent = data.draw(st.sampled_from(self.serials))
        assert self.allocator.find(parent, tokens(*key)) == self.model.find(parent, key)

    @stateful.rule()
    def clear_cache(self):
        self.allocator.clear_cache()
        self.model.clear_cache()

    @stateful.invariant()
    def the_books_agree(self):
        model = self.model
        self.allocator.check_integrity()
        assert counts(self.allocator) == (
            model.num_free,
            len(model.cache),
            model.num_evictions,
            model.references,
        )
        for page, entry in model.cache.items():
            assert self.allocator.find(entry.parent, tokens(*entry.key)) == (page, entry.serial)


def test_random_courses_agree_with_the_model():
    settings = hypothesis.settings(max_examples=150, stateful_step_count=40, deadline=None)
    stateful.run_state_machine_as_test(AllocatorMachine, settings=settings)
