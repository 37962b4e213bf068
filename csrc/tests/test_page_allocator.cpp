#include <random>
#include <string>
#include <utility>
#include <vector>

#include "pdiff/page_allocator.h"
#include "tests/check.h"

namespace {

using pdiff::PageAllocator;
using Pages = std::vector<int64_t>;
using Tokens = std::vector<int64_t>;

int64_t publish(PageAllocator& allocator, int64_t page, int64_t parent, const Tokens& tokens) {
  return allocator.publish(page, parent, tokens.data(), static_cast<int64_t>(tokens.size()));
}

// The page of the entry, or -1.
int64_t find(const PageAllocator& allocator, int64_t parent, const Tokens& tokens) {
  const auto found = allocator.find(parent, tokens.data(), static_cast<int64_t>(tokens.size()));
  return found ? found->page : -1;
}

// A chain of cached pages from the root, page i under the token i.
Tokens publish_chain(PageAllocator& allocator, const Pages& pages) {
  Tokens serials;
  for (const int64_t page : pages) {
    serials.push_back(publish(allocator, page, serials.empty() ? 0 : serials.back(), {page}));
  }
  return serials;
}

TEST(pages_come_in_order_and_last_freed_first) {
  PageAllocator allocator(5);
  CHECK(allocator.allocate(3) == (Pages{0, 1, 2}));
  CHECK(allocator.allocate(0) == Pages{});
  allocator.release({0, 1});
  CHECK_EQ(allocator.num_free(), 4);
  CHECK(!allocator.allocate(5));
  CHECK_EQ(allocator.num_free(), 4);
  CHECK(allocator.allocate(4) == (Pages{0, 1, 3, 4}));
  allocator.check_integrity();
}

TEST(a_page_is_free_when_its_last_reference_is_gone) {
  PageAllocator allocator(2);
  allocator.allocate(1);
  allocator.retain({0, 0});
  CHECK_EQ(allocator.reference_count(0), 3);
  allocator.release({0, 0});
  CHECK_EQ(allocator.num_free(), 1);
  CHECK_THROWS(allocator.release({0, 0}), "pages: expected none more often than it is held, got 0");
  CHECK_EQ(allocator.reference_count(0), 1);
  allocator.release({0});
  CHECK_EQ(allocator.num_free(), 2);
  allocator.check_integrity();
}

TEST(wrong_pages_are_named_and_change_nothing) {
  PageAllocator allocator(3);
  allocator.allocate(2);
  CHECK_THROWS(allocator.allocate(-1), "count: expected >= 0, got -1");
  CHECK_THROWS(allocator.retain({0, 2}), "pages: expected ones that are held or cached, got 2");
  CHECK_THROWS(allocator.retain({0, 3}), "pages: expected 0 to 2, got 3");
  CHECK_THROWS(allocator.release({0, 2, 1}), "more often than it is held, got 2");
  CHECK_THROWS(allocator.release({0, -1}), "pages: expected 0 to 2, got -1");
  CHECK_THROWS(allocator.reference_count(3), "page: expected 0 to 2, got 3");
  CHECK_EQ(allocator.reference_count(0), 1);
  CHECK_EQ(allocator.reference_count(1), 1);
  CHECK_EQ(allocator.num_free(), 1);
  CHECK_THROWS(PageAllocator(0), "num_pages: expected 1 to 2147483647, got 0");
  CHECK_THROWS(PageAllocator(int64_t{1} << 31), "num_pages: expected 1 to");
  allocator.check_integrity();
}

TEST(a_published_page_is_found_by_its_whole_key) {
  PageAllocator allocator(4);
  allocator.allocate(3);
  const int64_t root = publish(allocator, 0, 0, {7, 8});
  const int64_t child = publish(allocator, 1, root, {7, 8});
  CHECK(root >= 1 && child >= 1 && root != child);
  CHECK_EQ(find(allocator, 0, {7, 8}), 0);
  CHECK_EQ(find(allocator, root, {7, 8}), 1);
  const Tokens tokens_of_both{7, 8};
  const auto found = allocator.find(root, tokens_of_both.data(), 2);
  CHECK(found && found->serial == child);
  for (const Tokens& tokens : {Tokens{7}, {7, 8, 9}, {8, 7}, {7, 9}, {}}) {
    CHECK_EQ(find(allocator, 0, tokens), -1);
  }
  CHECK_EQ(find(allocator, child, {7, 8}), -1);
  CHECK_EQ(find(allocator, 999, {7, 8}), -1);
  CHECK_EQ(publish(allocator, 2, 0, {7, 8}), 0);
  CHECK_EQ(allocator.num_cached(), 2);
  allocator.check_integrity();
}

TEST(what_can_not_be_published_is_named) {
  PageAllocator allocator(4);
  allocator.allocate(3);
  const int64_t serial = publish(allocator, 0, 0, {1});
  CHECK_THROWS(publish(allocator, 3, 0, {2}), "page: expected one that is held, got 3");
  CHECK_THROWS(publish(allocator, 4, 0, {2}), "page: expected 0 to 3, got 4");
  CHECK_THROWS(publish(allocator, 0, 0, {1}), "page: expected one that is not cached, got 0");
  CHECK_THROWS(publish(allocator, 1, 0, {}), "tokens: expected at least one");
  for (const int64_t parent : {serial + 1, serial + 4, int64_t{-1}}) {
    CHECK_THROWS(publish(allocator, 1, parent, {2}),
                 "parent: expected 0 or the serial of an entry, got " + std::to_string(parent));
  }
  allocator.clear_cache();
  CHECK_THROWS(publish(allocator, 1, serial, {2}), "parent: expected 0");
  CHECK_EQ(allocator.num_cached(), 0);
  allocator.check_integrity();
}

TEST(free_pages_go_first_then_the_longest_released_tail) {
  PageAllocator allocator(7);
  allocator.allocate(5);
  publish_chain(allocator, {0, 1});
  publish_chain(allocator, {2, 3});
  allocator.release({2, 3});
  allocator.release({0, 1});
  CHECK_EQ(allocator.num_free(), 6);
  allocator.retain({2});  // a use
  allocator.release({2});
  CHECK(allocator.allocate(3) == (Pages{5, 6, 3}));
  CHECK_EQ(allocator.num_evictions(), 1);
  CHECK(allocator.allocate(3) == (Pages{1, 0, 2}));
  CHECK_EQ(allocator.num_evictions(), 4);
  CHECK_EQ(allocator.num_cached(), 0);
  CHECK_EQ(find(allocator, 0, {0}), -1);
  allocator.check_integrity();
}

TEST(an_evictable_page_can_be_retained) {
  PageAllocator allocator(2);
  allocator.allocate(2);
  publish(allocator, 0, 0, {1});
  allocator.release({0});
  CHECK_EQ(allocator.num_free(), 1);
  allocator.retain({0, 0});
  CHECK_EQ(allocator.num_free(), 0);
  CHECK_EQ(allocator.reference_count(0), 2);
  CHECK(!allocator.allocate(1));
  CHECK_EQ(find(allocator, 0, {1}), 0);
  allocator.check_integrity();
}

TEST(what_is_below_an_evicted_page_leaves_with_it) {
  PageAllocator allocator(5);
  allocator.allocate(5);
  const Tokens serials = publish_chain(allocator, {0, 1, 2, 3});
  publish(allocator, 4, serials[0], {9});
  allocator.release({0});  // a caller that breaks the rule: 1 and 3 are held
  allocator.release({2});
  allocator.release({4});
  CHECK(allocator.allocate(1) == Pages{0});
  CHECK_EQ(allocator.num_cached(), 0);
  CHECK_EQ(allocator.num_evictions(), 5);
  CHECK_EQ(allocator.num_free(), 2);
  CHECK_EQ(allocator.reference_count(1), 1);
  CHECK_EQ(find(allocator, serials[0], {1}), -1);
  allocator.check_integrity();
  allocator.release({1, 3});
  CHECK_EQ(allocator.num_free(), 4);
  allocator.check_integrity();
}

TEST(clear_cache_keeps_what_is_held) {
  PageAllocator allocator(4);
  allocator.allocate(3);
  publish_chain(allocator, {2, 1, 0});  // children before their parents
  allocator.release({1, 0});
  allocator.clear_cache();
  CHECK_EQ(allocator.num_cached(), 0);
  CHECK_EQ(allocator.num_evictions(), 0);
  CHECK_EQ(allocator.num_free(), 3);
  CHECK_EQ(allocator.reference_count(2), 1);
  CHECK_EQ(find(allocator, 0, {2}), -1);
  allocator.check_integrity();
  CHECK(publish(allocator, 2, 0, {2}) != 0);
}

TEST(a_deep_chain_takes_no_stack) {
  PageAllocator allocator(200'000);
  const Pages pages = *allocator.allocate(allocator.num_pages());
  publish_chain(allocator, pages);
  for (const int64_t page : pages) allocator.release({page});  // the head is evicted first
  allocator.allocate(1);
  CHECK_EQ(allocator.num_evictions(), 200'000);
  CHECK_EQ(allocator.num_free(), 199'999);
  allocator.check_integrity();
}

// Sequences of shared beginnings come, hold what they find, publish the rest and go.
TEST(random_sequences_leave_the_books_in_order) {
  std::mt19937 random(0);
  PageAllocator allocator(40);
  std::vector<Pages> sequences;
  int64_t num_found = 0;
  for (int turn = 0; turn < 20'000; ++turn) {
    if (random() % 2 == 0 && !sequences.empty()) {
      std::swap(sequences[random() % sequences.size()], sequences.back());
      allocator.release(sequences.back());
      sequences.pop_back();
    } else {
      Pages pages;
      int64_t parent = 0;
      bool is_shared = true;
      for (size_t length = random() % 8; pages.size() < length;) {
        const Tokens tokens{static_cast<int64_t>(random() % 2), 5};
        const auto found = allocator.find(parent, tokens.data(), 2);
        is_shared = is_shared && found;
        if (is_shared) {
          allocator.retain({found->page});
          pages.push_back(found->page);
          parent = found->serial;
          ++num_found;
          continue;
        }
        const auto page = allocator.allocate(1);
        if (!page) break;
        pages.push_back(page->front());
        parent = publish(allocator, page->front(), parent, tokens);
        CHECK(parent != 0);
      }
      sequences.push_back(pages);
    }
    if (turn % 16 == 0) allocator.check_integrity();
    if (turn % 1000 == 999) allocator.clear_cache();
  }
  for (const Pages& pages : sequences) allocator.release(pages);
  CHECK_EQ(allocator.num_free(), 40);
  CHECK(num_found > 1000);
  CHECK(allocator.num_evictions() > 1000);
  allocator.check_integrity();
}

struct Opened : PageAllocator {
  using PageAllocator::children_;
  using PageAllocator::evictable_;
  using PageAllocator::free_;
  using PageAllocator::hash_key;
  using PageAllocator::index_;
  using PageAllocator::num_held_;
  using PageAllocator::PageAllocator;
  using PageAllocator::pages_;
};

TEST(keys_of_one_hash_are_kept_apart) {
  // The last token is mixed with the hash of what is before it.
  const Tokens first{3, 4};
  const int64_t other_start = 5;
  const uint64_t other_end =
      Opened::hash_key(0, &first[0], 1) ^ Opened::hash_key(0, &other_start, 1) ^ 4;
  const Tokens second{other_start, static_cast<int64_t>(other_end)};
  CHECK_EQ(Opened::hash_key(0, first.data(), 2), Opened::hash_key(0, second.data(), 2));

  PageAllocator allocator(2);
  allocator.allocate(2);
  publish(allocator, 0, 0, first);
  CHECK_EQ(find(allocator, 0, second), -1);
  CHECK(publish(allocator, 1, 0, second) != 0);
  CHECK_EQ(find(allocator, 0, first), 0);
  CHECK_EQ(find(allocator, 0, second), 1);
  allocator.check_integrity();
  allocator.release({0});
  allocator.allocate(1);
  CHECK_EQ(find(allocator, 0, first), -1);
  CHECK_EQ(find(allocator, 0, second), 1);
  allocator.check_integrity();
}

// Pages 0 to 2 are a cached chain, of which 2 is evictable; 3 is held, 4 and 5 are free.
Opened in_order() {
  Opened allocator(6);
  allocator.allocate(4);
  publish_chain(allocator, {0, 1, 2});
  allocator.release({2});
  allocator.check_integrity();
  return allocator;
}

TEST(check_integrity_notices) {
  const struct {
    void (*damage)(Opened&);
    const char* message;
  } cases[] = {
      {[](Opened& b) { b.free_.pop_back(); }, "page 4: not held and in no list"},
      {[](Opened& b) { b.free_.push_back(5); }, "page 5: free and listed before"},
      {[](Opened& b) { b.free_.push_back(6); }, "free list: expected 0 to 5, got 6"},
      {[](Opened& b) { b.free_.push_back(3); }, "page 3: held and in a list"},
      {[](Opened& b) { b.pages_[4].serial = 5; }, "page 4: free and cached"},
      {[](Opened& b) { b.pages_[3].num_references = -1; }, "page 3: -1 references"},
      {[](Opened& b) { b.evictable_.remove(2); }, "page 2: not held and in no list"},
      {[](Opened& b) { b.evictable_.insert_before(6, 3); }, "page 3: evictable and not cached"},
      {[](Opened& b) { b.evictable_.insert_before(6, 1); }, "page 1: held and in a list"},
      {[](Opened& b) { b.evictable_.insert_before(6, 2); }, "evictable list: its links"},
      {[](Opened& b) { ++b.num_held_; }, "num_held: 4 with 3 pages held"},
      {[](Opened& b) { b.pages_[2].serial += 1; }, "page 2: serial 16 is none of its own"},
      {[](Opened& b) { b.pages_[1].parent = 2; }, "page 1: parent 2 is not cached"},
      {[](Opened& b) { b.pages_[1].tokens = {5}; }, "page 1: the index does not find it"},
      {[](Opened& b) { b.index_.clear(); }, "page 0: the index does not find it"},
      {[](Opened& b) { b.index_.begin()->second = 3; }, "the index does not find it"},
      {[](Opened& b) { b.index_.emplace(0, 3); }, "index: 4 pages with 3 cached"},
      {[](Opened& b) { b.children_.remove(2); }, "lists of children: too few by 1"},
      {[](Opened& b) { b.children_.insert_before(6, 3); }, "page 0: its list of children has 3"},
      {[](Opened& b) { b.children_.insert_before(6, 11); }, "page 0: its list of children has 11"},
      {[](Opened& b) { b.children_.insert_before(6, 2); }, "lists of children: their links"},
  };
  for (const auto& [damage, message] : cases) {
    Opened allocator = in_order();
    damage(allocator);
    CHECK_THROWS(allocator.check_integrity(), message);
  }
}

}  // namespace

int main() { return pdiff::test::run_all(); }
