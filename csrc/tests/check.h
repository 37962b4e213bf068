#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "pdiff/error.h"

// A test is a program: TEST(name) { CHECK(...); CHECK_EQ(a, b); CHECK_THROWS(expr, "part of the
// message"); } The program prints each failed check with its line and ends with the number of
// failures as its status.
namespace pdiff::test {

struct Case {
  const char* name;
  void (*body)();
  Case* next;
};

inline Case*& first_case() {
  static Case* first = nullptr;
  return first;
}

inline int& num_failures() {
  static int count = 0;
  return count;
}

struct Registration {
  explicit Registration(Case* test_case) {
    Case** end = &first_case();  // in the order of the file
    while (*end != nullptr) end = &(*end)->next;
    *end = test_case;
  }
};

inline void report(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  ++num_failures();
}

template <typename A, typename B>
std::string describe(const char* text_a, const char* text_b, const A& a, const B& b) {
  std::ostringstream out;
  out << text_a << " == " << text_b << ": got " << a << " and " << b;
  return out.str();
}

inline int run_all() {
  for (Case* c = first_case(); c != nullptr; c = c->next) {
    const int before = num_failures();
    try {
      c->body();
    } catch (const std::exception& error) {
      report(c->name, 0, std::string("unexpected exception: ") + error.what());
    }
    std::printf("%s %s\n", num_failures() == before ? "ok  " : "FAIL", c->name);
  }
  return num_failures() == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace pdiff::test

#define TEST(name)                                                      \
  static void test_##name();                                            \
  static ::pdiff::test::Case case_##name{#name, &test_##name, nullptr}; \
  static ::pdiff::test::Registration registration_##name(&case_##name); \
  static void test_##name()

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) ::pdiff::test::report(__FILE__, __LINE__, "expected " #condition); \
  } while (false)

#define CHECK_EQ(a, b)                                                          \
  do {                                                                          \
    const auto& value_a = (a);                                                  \
    const auto& value_b = (b);                                                  \
    if (!(value_a == value_b)) {                                                \
      ::pdiff::test::report(__FILE__, __LINE__,                                 \
                            ::pdiff::test::describe(#a, #b, value_a, value_b)); \
    }                                                                           \
  } while (false)

#define CHECK_NEAR(a, b, tolerance)                                             \
  do {                                                                          \
    const double value_a = (a);                                                 \
    const double value_b = (b);                                                 \
    if (!(std::fabs(value_a - value_b) <= (tolerance))) {                       \
      ::pdiff::test::report(__FILE__, __LINE__,                                 \
                            ::pdiff::test::describe(#a, #b, value_a, value_b)); \
    }                                                                           \
  } while (false)

#define CHECK_THROWS(expression, message_part)                                              \
  do {                                                                                      \
    try {                                                                                   \
      (void)(expression);                                                                   \
      ::pdiff::test::report(__FILE__, __LINE__, "expected pdiff::Error from " #expression); \
    } catch (const ::pdiff::Error& error) {                                                 \
      if (std::string(error.what()).find(message_part) == std::string::npos) {              \
        ::pdiff::test::report(__FILE__, __LINE__, std::string("message: ") + error.what()); \
      }                                                                                     \
    }                                                                                       \
  } while (false)

// In exactly one place per program: `int main() { return pdiff::test::run_all(); }`.
