// Runs of elements of any dtype and stride, seen as contiguous float or double.
//
// A kernel works on blocks that fit L1: `load` gives a pointer to contiguous values (the tensor's
// own memory when nothing needs converting), `store` rounds them back once.
#pragma once

#include <bit>

#include "../elements.h"
#include "../orthonorm.h"
#include "isa.h"

#if ORTHONORM_X86
#include <immintrin.h>
#endif

namespace orthonorm {

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Byte: return 1;
    default: return 2;
  }
}

inline bool floating(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

[[noreturn]] inline void refuse() {
  STD_TORCH_CHECK(false, "orthonorm: tensors must be float32, float64, bfloat16 or float16");
}

// f(element{}) with the element type that stores `dtype`.
template <class F>
void with_element(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(Bf16{});
    case ScalarType::Half: return f(Fp16{});
    default:
      STD_TORCH_CHECK(false, op, ": tensors must be float32, float64, bfloat16 or float16");
  }
}

template <class A>
constexpr ScalarType dtype_of() {
  return sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
}

// bfloat16 on integers and without branches, so that loops over it vectorize. AVX512-BF16's own
// instruction would flush denormals.
inline float widen(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
}

inline BFloat16 narrow(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(nan ? 0x7fc0 : rounded), BFloat16::from_bits()};
}

template <class A, class T>
inline A element(T value) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, BFloat16>) {
    return static_cast<A>(widen(value));
  } else if constexpr (std::is_same_v<T, Half>) {
    return static_cast<A>(static_cast<float>(value));
  } else {
    return static_cast<A>(value);
  }
}

template <class T, class A>
inline T rounded(A value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(value);
  } else if constexpr (sizeof(T) == 2) {
    float once;
    if constexpr (sizeof(A) == 8) {
      once = to_odd(value);
    } else {
      once = value;
    }
    if constexpr (std::is_same_v<T, BFloat16>) {
      return narrow(once);
    } else {
      return Half(once);
    }
  } else {
    return static_cast<T>(value);
  }
}

#if ORTHONORM_X86
// F16C converts eight halves at a time; compilers do not find it in torch's portable conversion.
ORTHONORM_AVX2 [[gnu::noinline]] inline int64_t halves_to_floats(const Half* from, int64_t count,
                                                                 float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

ORTHONORM_AVX2 [[gnu::noinline]] inline int64_t floats_to_halves(const float* from, int64_t count,
                                                                 Half* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}
#endif

template <class T, class A>
inline void gather(const T* from, int64_t stride, int64_t count, A* to) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = element<A>(from[i * stride]);
    return;
  }
  int64_t done = 0;
#if ORTHONORM_X86
  if constexpr (std::is_same_v<T, Half> && sizeof(A) == 4) {
    if (isa() >= Isa::avx2) done = halves_to_floats(from, count, to);
  }
#endif
  specialized([=] {
    for (int64_t i = done; i < count; ++i) to[i] = element<A>(from[i]);
  });
}

template <class T, class A>
inline void scatter(const A* from, T* to, int64_t stride, int64_t count) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = rounded<T>(from[i]);
    return;
  }
  int64_t done = 0;
#if ORTHONORM_X86
  if constexpr (std::is_same_v<T, Half> && sizeof(A) == 4) {
    if (isa() >= Isa::avx2) done = floats_to_halves(from, count, to);
  }
#endif
  specialized([=] {
    for (int64_t i = done; i < count; ++i) to[i] = rounded<T>(from[i]);
  });
}

// `count` elements from `data` (an address already offset), `stride` elements apart, as A.
template <class A>
inline void load_into(const void* data, ScalarType dtype, int64_t stride, int64_t count, A* to) {
  switch (dtype) {
    case ScalarType::Double: gather(static_cast<const double*>(data), stride, count, to); break;
    case ScalarType::Float: gather(static_cast<const float*>(data), stride, count, to); break;
    case ScalarType::BFloat16: gather(static_cast<const BFloat16*>(data), stride, count, to); break;
    case ScalarType::Half: gather(static_cast<const Half*>(data), stride, count, to); break;
    case ScalarType::Short: gather(static_cast<const int16_t*>(data), stride, count, to); break;
    case ScalarType::Byte: gather(static_cast<const uint8_t*>(data), stride, count, to); break;
    default: refuse();
  }
}

// The same without a copy where memory already holds contiguous A; else in `scratch`.
template <class A>
inline const A* load(const void* data, ScalarType dtype, int64_t stride, int64_t count,
                     A* scratch) {
  if (dtype == dtype_of<A>() && stride == 1) return static_cast<const A*>(data);
  load_into(data, dtype, stride, count, scratch);
  return scratch;
}

// Where to compute the values that `store` will put at `data`: the memory itself or scratch.
template <class A>
inline A* target(void* data, ScalarType dtype, int64_t stride, A* scratch) {
  return dtype == dtype_of<A>() && stride == 1 ? static_cast<A*>(data) : scratch;
}

template <class A>
inline void store(const A* values, void* data, ScalarType dtype, int64_t stride, int64_t count) {
  if (static_cast<const void*>(values) == data) return;
  switch (dtype) {
    case ScalarType::Double: scatter(values, static_cast<double*>(data), stride, count); break;
    case ScalarType::Float: scatter(values, static_cast<float*>(data), stride, count); break;
    case ScalarType::BFloat16: scatter(values, static_cast<BFloat16*>(data), stride, count); break;
    case ScalarType::Half: scatter(values, static_cast<Half*>(data), stride, count); break;
    case ScalarType::Short: scatter(values, static_cast<int16_t*>(data), stride, count); break;
    case ScalarType::Byte: scatter(values, static_cast<uint8_t*>(data), stride, count); break;
    default: refuse();
  }
}

}  // namespace orthonorm
