// Which instruction set runs, chosen once per process; torch-free.
//
// A kernel is written once as a plain loop in a lambda; `specialized(body)` runs the copy compiled
// for the processor at hand. Explicit micro-kernels switch on `isa()` themselves.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ORTHONORM_X86 1
#else
#define ORTHONORM_X86 0
#endif

#if ORTHONORM_X86 && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define ORTHONORM_HAS_AMX 1
#else
#define ORTHONORM_HAS_AMX 0
#endif

namespace orthonorm {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

// Whether the processor has AMX for bfloat16 and Linux lets this process use it: that has to be
// asked for.
inline bool amx_permitted() {
#if ORTHONORM_HAS_AMX
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return bf16 && tile && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

inline Isa detect_isa() {
#if ORTHONORM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return amx_permitted() ? Isa::amx : Isa::avx512bf16;
  }
  return avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

// The processor's set, or a lower one named by ORTHONORM_ISA.
inline Isa isa() {
  static const Isa chosen = [] {
    const Isa best = detect_isa();
    const char* wish = std::getenv("ORTHONORM_ISA");
    if (wish == nullptr) return best;
    const char* names[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
    for (int i = 0; i <= static_cast<int>(best); ++i) {
      if (std::strcmp(wish, names[i]) == 0) return static_cast<Isa>(i);
    }
    return best;
  }();
  return chosen;
}

#if ORTHONORM_X86
#define ORTHONORM_AVX2 [[gnu::target("arch=x86-64-v3")]]
#define ORTHONORM_AVX512 [[gnu::target("arch=x86-64-v4,prefer-vector-width=512")]]
#define ORTHONORM_AVX512BF16 \
  [[gnu::target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")]]
#define ORTHONORM_AMX \
  [[gnu::target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")]]
#endif

// What a body is told if it takes an argument: the instruction set its copy is compiled for.
template <Isa set>
using For = std::integral_constant<Isa, set>;

template <Isa set, class Body>
inline void call(const Body& body) {
  if constexpr (std::is_invocable_v<Body, For<set>>) {
    body(For<set>());
  } else {
    body();
  }
}

#if ORTHONORM_X86
// `flatten` inlines the body, whose loops are then vectorized for the function's own target.
template <class Body>
ORTHONORM_AVX2 [[gnu::flatten, gnu::noinline]] void run_avx2(const Body& body) {
  call<Isa::avx2>(body);
}
template <class Body>
ORTHONORM_AVX512 [[gnu::flatten, gnu::noinline]] void run_avx512(const Body& body) {
  call<Isa::avx512>(body);
}
#endif

template <class Body>
void specialized(const Body& body) {
#if ORTHONORM_X86
  if (isa() >= Isa::avx512) return run_avx512(body);
  if (isa() == Isa::avx2) return run_avx2(body);
#endif
  call<Isa::portable>(body);
}

}  // namespace orthonorm
