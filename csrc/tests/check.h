// What every test program counts and prints: a condition that does not hold is a failure of its own
// line, and the program goes on.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition, ...)                                   \
  if (!(condition)) {                                           \
    ++failures;                                                 \
    std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
    std::printf(__VA_ARGS__);                                   \
    std::printf("\n");                                          \
  }
