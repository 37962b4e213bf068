#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pdiff {

/// The one exception the library throws: a wrong argument, or what this build or machine cannot do.
/// Python sees a ValueError, C a status and pdiff_last_error().
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

template <typename... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

}  // namespace detail
}  // namespace pdiff

/// PDIFF_CHECK(page_size > 0, "page_size: expected > 0, got ", page_size);
/// The parts are only put together when the condition fails.
#define PDIFF_CHECK(condition, ...)              \
  do {                                           \
    if (!(condition)) [[unlikely]]               \
      ::pdiff::detail::throw_error(__VA_ARGS__); \
  } while (false)
