#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

// A test framework of one page, so that the core's tests need nothing but a compiler.
namespace chunkft::test {

struct Case {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, std::function<void()> body) { cases().push_back({name, std::move(body)}); }
};

inline void report(const char* file, int line, const std::string& what) {
  ++failures();
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

}  // namespace chunkft::test

#define TEST(name)                                                    \
  static void name();                                                 \
  static const chunkft::test::Register register_##name(#name, &name); \
  static void name()

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) chunkft::test::report(__FILE__, __LINE__, "CHECK(" #condition ")");  \
  } while (false)

#define REQUIRE(condition)                                                                \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      chunkft::test::report(__FILE__, __LINE__, "REQUIRE(" #condition ")");               \
      return;                                                                             \
    }                                                                                     \
  } while (false)
