#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

namespace pdiff {

/// Circular lists through the numbers 0 .. size - 1, each in one list, at first alone in its own.
class Rings {
 public:
  explicit Rings(int64_t size);

  int64_t next(int64_t item) const { return links_[item].next; }
  bool is_alone(int64_t item) const { return next(item) == item; }
  void remove(int64_t item);                     // alone again
  void insert_before(int64_t at, int64_t item);  // `item` is alone
  bool is_consistent() const;

 private:
  struct Link {
    int64_t prev, next;
  };
  std::vector<Link> links_;  // [size]
};

struct CachedPage {
  int64_t page, serial;
};

/// Who holds which page of a KV cache, and which pages hold prefixes that may come again.
/// State     a page is held (references > 0), evictable (cached, no reference) or free.
/// Cache     a tree. Its entries are pages, by what determines their content: the serial of the
///           parent, 0 for none, and tokens. Keys are compared in full: a hash only saves time.
///           A serial is >= 1, belongs to one entry and never comes again.
/// Eviction  takes the page released longest ago. What is below a page in the tree leaves the cache
///           with it: nothing, where callers hold a page's parents as long as the page.
/// Errors    pdiff::Error for a wrong argument, and nothing is changed.
class PageAllocator {
 public:
  explicit PageAllocator(int64_t num_pages);  // >= 1; page tables hold int32_t

  int64_t num_pages() const { return static_cast<int64_t>(pages_.size()); }
  int64_t num_free() const { return num_pages() - num_held_; }                // free or evictable
  int64_t num_cached() const { return static_cast<int64_t>(index_.size()); }  // held or not
  int64_t num_evictions() const { return num_evictions_; }  // entries that allocate() took
  int64_t reference_count(int64_t page) const;

  /// Pages with one reference each: free ones, last freed first, then evicted ones. None, and no
  /// change, where fewer than `count` are free or evictable.
  std::optional<std::vector<int64_t>> allocate(int64_t count);

  /// One reference more for each page, held or cached.
  void retain(const std::vector<int64_t>& pages);

  /// One reference less for each page. `pages` are in the order of positions and given back from
  /// the last to the first, so the tail of a sequence is evicted before its head.
  void release(const std::vector<int64_t>& pages);

  /// Enters a held page that is not cached under `parent`; its serial, or 0 and no change where
  /// there is an entry of the same key.
  int64_t publish(int64_t page, int64_t parent,
                  const int64_t* tokens,  // [num_tokens], any numbers
                  int64_t num_tokens);

  /// The entry of this key. Takes no reference and is no use that would delay an eviction.
  std::optional<CachedPage> find(int64_t parent,
                                 const int64_t* tokens,  // [num_tokens]
                                 int64_t num_tokens) const;

  /// Empties the cache: evictable pages become free, held ones stay held.
  void clear_cache();

  /// Throws pdiff::Error, naming what contradicts what. O(num_pages).
  void check_integrity() const;

 protected:  // for the test, which makes hashes collide and breaks the books
  struct Page {
    int64_t num_references = 0;
    int64_t serial = 0;  // 0: not cached, and what follows means nothing
    int64_t parent = 0;
    uint64_t hash = 0;  // of parent and tokens
    std::vector<int64_t> tokens{};
  };

  static uint64_t hash_key(int64_t parent, const int64_t* tokens, int64_t num_tokens);

  std::vector<Page> pages_;
  std::vector<int64_t> free_;  // the next one last
  Rings evictable_;            // one list, from evictable_head() on, oldest first
  Rings children_;             // of each page, from children_head(page) on
  std::unordered_multimap<uint64_t, int64_t> index_;  // hash -> page
  int64_t num_held_ = 0;
  int64_t num_published_ = 0;
  int64_t num_evictions_ = 0;

 private:
  int64_t evictable_head() const { return num_pages(); }
  int64_t children_head(int64_t page) const { return num_pages() + page; }

  // A serial tells its page: number of publications before * num_pages + page + 1.
  int64_t page_of(int64_t serial) const { return (serial - 1) % num_pages(); }
  bool is_alive(int64_t serial) const {
    return serial > 0 && pages_[page_of(serial)].serial == serial;
  }

  void check_page(const char* name, int64_t page) const;
  void uncache(int64_t page);
  void evict();
  void check_states() const;
  void check_entries() const;
  void check_children() const;
};

}  // namespace pdiff
