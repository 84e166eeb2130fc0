// What a thread does with results below the normal numbers; torch-free.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace orthonorm {

#if defined(__x86_64__) || defined(_M_X64)
inline uint64_t float_mode() { return _mm_getcsr(); }
inline void set_float_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
inline constexpr uint64_t FLUSH_TO_ZERO = _MM_FLUSH_ZERO_ON;
#elif defined(__aarch64__) && defined(__GNUC__)
inline uint64_t float_mode() {
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
inline constexpr uint64_t FLUSH_TO_ZERO = uint64_t{1} << 24;
#else
inline uint64_t float_mode() { return 0; }
inline void set_float_mode(uint64_t) {}
inline constexpr uint64_t FLUSH_TO_ZERO = 0;
#endif

// A mode for as long as it lives, on the thread that made it.
class FloatMode {
 public:
  explicit FloatMode(uint64_t mode) : before_(float_mode()) { set_float_mode(mode); }
  ~FloatMode() { set_float_mode(before_); }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  uint64_t before_;
};

}  // namespace orthonorm
