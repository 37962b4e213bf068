#include "pdiff/page_allocator.h"

#include <algorithm>
#include <limits>

#include "pdiff/error.h"

namespace pdiff {
namespace {

constexpr int64_t kMaxPages = std::numeric_limits<int32_t>::max();

int64_t checked_num_pages(int64_t num_pages) {
  PDIFF_CHECK(num_pages >= 1 && num_pages <= kMaxPages, "num_pages: expected 1 to ", kMaxPages,
              ", got ", num_pages);
  return num_pages;
}

}  // namespace

Rings::Rings(int64_t size) : links_(size) {
  for (int64_t item = 0; item < size; ++item) links_[item] = {item, item};
}

void Rings::remove(int64_t item) {
  const auto [prev, next] = links_[item];
  links_[prev].next = next;
  links_[next].prev = prev;
  links_[item] = {item, item};
}

void Rings::insert_before(int64_t at, int64_t item) {
  const int64_t prev = links_[at].prev;
  links_[item] = {prev, at};
  links_[prev].next = links_[at].prev = item;
}

// If each item's next leads back to it, no two share a next, and every walk comes round.
bool Rings::is_consistent() const {
  const auto size = static_cast<int64_t>(links_.size());
  for (int64_t item = 0; item < size; ++item) {
    const int64_t next = links_[item].next;
    if (next < 0 || next >= size || links_[next].prev != item) return false;
  }
  return true;
}

PageAllocator::PageAllocator(int64_t num_pages)
    : pages_(checked_num_pages(num_pages)),
      free_(num_pages),
      evictable_(num_pages + 1),
      children_(2 * num_pages) {
  for (int64_t i = 0; i < num_pages; ++i) free_[i] = num_pages - 1 - i;
}

int64_t PageAllocator::reference_count(int64_t page) const {
  check_page("page", page);
  return pages_[page].num_references;
}

std::optional<std::vector<int64_t>> PageAllocator::allocate(int64_t count) {
  PDIFF_CHECK(count >= 0, "count: expected >= 0, got ", count);
  if (count > num_free()) return std::nullopt;
  std::vector<int64_t> pages(count);
  for (int64_t& page : pages) {
    if (free_.empty()) evict();
    page = free_.back();
    free_.pop_back();
    pages_[page].num_references = 1;
  }
  num_held_ += count;
  return pages;
}

void PageAllocator::retain(const std::vector<int64_t>& pages) {
  for (const int64_t page : pages) {
    check_page("pages", page);
    PDIFF_CHECK(pages_[page].num_references > 0 || pages_[page].serial != 0,
                "pages: expected ones that are held or cached, got ", page);
  }
  for (const int64_t page : pages) {
    if (pages_[page].num_references++ > 0) continue;
    evictable_.remove(page);
    ++num_held_;
  }
}

void PageAllocator::release(const std::vector<int64_t>& pages) {
  for (const int64_t page : pages) check_page("pages", page);
  std::vector<int64_t> unheld;
  unheld.reserve(pages.size());
  int64_t not_held = -1;
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
    const int64_t num_left = --pages_[*page].num_references;
    if (num_left == 0) unheld.push_back(*page);
    if (num_left < 0) not_held = *page;
  }
  if (not_held >= 0) {
    for (const int64_t page : pages) ++pages_[page].num_references;
  }
  PDIFF_CHECK(not_held < 0, "pages: expected none more often than it is held, got ", not_held);

  for (const int64_t page : unheld) {
    if (pages_[page].serial != 0) {
      evictable_.insert_before(evictable_head(), page);
    } else {
      free_.push_back(page);
    }
  }
  num_held_ -= static_cast<int64_t>(unheld.size());
}

int64_t PageAllocator::publish(int64_t page, int64_t parent, const int64_t* tokens,
                               int64_t num_tokens) {
  check_page("page", page);
  Page& entry = pages_[page];
  PDIFF_CHECK(entry.num_references > 0, "page: expected one that is held, got ", page);
  PDIFF_CHECK(entry.serial == 0, "page: expected one that is not cached, got ", page);
  PDIFF_CHECK(parent == 0 || is_alive(parent), "parent: expected 0 or the serial of an entry, got ",
              parent);
  PDIFF_CHECK(num_tokens > 0, "tokens: expected at least one, got none");
  if (find(parent, tokens, num_tokens)) return 0;

  entry.parent = parent;
  entry.tokens.assign(tokens, tokens + num_tokens);
  entry.hash = hash_key(parent, tokens, num_tokens);
  index_.emplace(entry.hash, page);
  entry.serial = num_published_++ * num_pages() + page + 1;
  if (parent != 0) children_.insert_before(children_head(page_of(parent)), page);
  return entry.serial;
}

std::optional<CachedPage> PageAllocator::find(int64_t parent, const int64_t* tokens,
                                              int64_t num_tokens) const {
  auto [it, end] = index_.equal_range(hash_key(parent, tokens, num_tokens));
  for (; it != end; ++it) {
    const Page& entry = pages_[it->second];
    if (entry.parent == parent &&
        std::equal(entry.tokens.begin(), entry.tokens.end(), tokens, tokens + num_tokens)) {
      return CachedPage{it->second, entry.serial};
    }
  }
  return std::nullopt;
}

void PageAllocator::clear_cache() {
  for (int64_t page = 0; page < num_pages(); ++page) {
    if (pages_[page].serial != 0) uncache(page);
  }
}

// splitmix64 (Steele et al., 2014), chained over the numbers of the key.
uint64_t PageAllocator::hash_key(int64_t parent, const int64_t* tokens, int64_t num_tokens) {
  const auto mix = [](uint64_t state, int64_t number) {
    uint64_t x = (state ^ static_cast<uint64_t>(number)) + 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
  };
  uint64_t hash = mix(0, parent);
  for (int64_t i = 0; i < num_tokens; ++i) hash = mix(hash, tokens[i]);
  return hash;
}

void PageAllocator::check_page(const char* name, int64_t page) const {
  PDIFF_CHECK(page >= 0 && page < num_pages(), name, ": expected 0 to ", num_pages() - 1, ", got ",
              page);
}

// `root` and all below it leave the cache, each after its children.
void PageAllocator::uncache(int64_t root) {
  for (int64_t page = root;;) {
    if (const int64_t head = children_head(page); !children_.is_alone(head)) {
      page = children_.next(head);
      continue;
    }
    Page& entry = pages_[page];
    auto it = index_.find(entry.hash);
    while (it->second != page) ++it;
    index_.erase(it);
    entry.serial = 0;
    children_.remove(page);
    evictable_.remove(page);
    if (entry.num_references == 0) free_.push_back(page);
    if (page == root) return;
    page = page_of(entry.parent);
  }
}

void PageAllocator::evict() {
  const int64_t before = num_cached();
  uncache(evictable_.next(evictable_head()));
  num_evictions_ += before - num_cached();
}

void PageAllocator::check_integrity() const {
  check_states();
  check_entries();
  check_children();
}

// Each page is held, evictable or free, and nothing else.
void PageAllocator::check_states() const {
  std::vector<bool> is_listed(num_pages());
  const auto list = [&](int64_t page, const char* name) {
    PDIFF_CHECK(!is_listed[page], "page ", page, ": ", name, " and listed before");
    is_listed[page] = true;
  };
  for (const int64_t page : free_) {
    check_page("free list", page);
    list(page, "free");
    PDIFF_CHECK(pages_[page].serial == 0, "page ", page, ": free and cached");
  }
  PDIFF_CHECK(evictable_.is_consistent(), "evictable list: its links contradict each other");
  for (int64_t page = evictable_.next(evictable_head()); page != evictable_head();
       page = evictable_.next(page)) {
    list(page, "evictable");
    PDIFF_CHECK(pages_[page].serial != 0, "page ", page, ": evictable and not cached");
  }
  int64_t num_held = 0;
  for (int64_t page = 0; page < num_pages(); ++page) {
    const int64_t num_references = pages_[page].num_references;
    PDIFF_CHECK(num_references >= 0, "page ", page, ": ", num_references, " references");
    PDIFF_CHECK(num_references == 0 || !is_listed[page], "page ", page, ": held and in a list");
    PDIFF_CHECK(num_references > 0 || is_listed[page], "page ", page, ": not held and in no list");
    num_held += num_references > 0;
  }
  PDIFF_CHECK(num_held == num_held_, "num_held: ", num_held_, " with ", num_held, " pages held");
}

// The index leads to each entry by its key, and to nothing else.
void PageAllocator::check_entries() const {
  int64_t num_entries = 0;
  for (int64_t page = 0; page < num_pages(); ++page) {
    const Page& entry = pages_[page];
    if (entry.serial == 0) continue;
    ++num_entries;
    PDIFF_CHECK(entry.serial > 0 && page_of(entry.serial) == page, "page ", page, ": serial ",
                entry.serial, " is none of its own");
    PDIFF_CHECK(entry.parent == 0 || is_alive(entry.parent), "page ", page, ": parent ",
                entry.parent, " is not cached");
    const auto found =
        find(entry.parent, entry.tokens.data(), static_cast<int64_t>(entry.tokens.size()));
    PDIFF_CHECK(found, "page ", page, ": the index does not find it");
    PDIFF_CHECK(found->page == page, "page ", page, ": the index finds ", found->page);
  }
  PDIFF_CHECK(num_entries == num_cached(), "index: ", num_cached(), " pages with ", num_entries,
              " cached");
}

// Each entry with a parent is in that parent's list, and in no other.
void PageAllocator::check_children() const {
  PDIFF_CHECK(children_.is_consistent(), "lists of children: their links contradict each other");
  int64_t num_missing = 0;
  for (int64_t page = 0; page < num_pages(); ++page) {
    num_missing += pages_[page].serial != 0 && pages_[page].parent != 0;
    const int64_t head = children_head(page);
    for (int64_t child = children_.next(head); child != head; child = children_.next(child)) {
      PDIFF_CHECK(child < num_pages() && is_alive(pages_[page].serial) &&
                      pages_[child].serial != 0 && pages_[child].parent == pages_[page].serial,
                  "page ", page, ": its list of children has ", child, ", which is none");
      --num_missing;
    }
  }
  PDIFF_CHECK(num_missing == 0, "lists of children: too few by ", num_missing);
}

}  // namespace pdiff
