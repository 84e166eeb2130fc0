// Elements of any dtype in a kernel: which one is known at run time only, so that one launch serves
// a list of mixed dtypes and a kernel is compiled for two arithmetics instead of every combination.
// The branches are the same for a whole block; memory is what such kernels wait for.
#pragma once

#include "../elements.h"
#include "device.h"

namespace orthonorm::cuda {

// Integers are numbers of a list that an op says is of them, so that no other kernel asks.
enum class Element : uint8_t { f16, bf16, f32, f64, i16 };

ORTHONORM_HD inline int size_of(Element type) {
  return type == Element::f64 ? 8 : type == Element::f32 ? 4 : 2;
}

__device__ inline float widened(Bf16 x) { return widen(x); }
__device__ inline float widened(Fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));  // one instruction for fourteen
#else
  return widen(x);
#endif
}

template <class T>
__device__ inline T rounded(float x) {
  T to;
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, Fp16>) {
      to.bits = __half_as_ushort(__float2half_rn(x));
    } else {
      to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    }
    return to;
  }
#endif
  narrow(x, to);
  return to;
}
template <class T>
__device__ inline T rounded(double x) {
  if constexpr (sizeof(T) == 2) return rounded<T>(to_odd(x));
  return static_cast<T>(x);
}

// One element.
template <class A>
__device__ inline A load(const char* at, Element type, bool integer = false) {
  if (integer) return static_cast<A>(*reinterpret_cast<const int16_t*>(at));
  switch (type) {
    case Element::f16: return static_cast<A>(widened(*reinterpret_cast<const Fp16*>(at)));
    case Element::bf16: return static_cast<A>(widened(*reinterpret_cast<const Bf16*>(at)));
    case Element::f32: return static_cast<A>(*reinterpret_cast<const float*>(at));
    default: return static_cast<A>(*reinterpret_cast<const double*>(at));
  }
}

// Eight elements, the k-th at `where(k)` if `is(k)`, else 0. All are loaded before any is used:
// with a choice of types around each, every load would be waited for.
template <class T, class A, class Is, class Where>
__device__ inline void load_each(A (&x)[8], const Is& is, const Where& where) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
  std::conditional_t<sizeof(T) == 2, uint32_t, T> raw[8] = {};  // a register each
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (is(k)) raw[k] = *reinterpret_cast<const Bits*>(where(k));
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if constexpr (sizeof(T) == 2) {
      x[k] = static_cast<A>(widened(T{static_cast<uint16_t>(raw[k])}));
    } else {
      x[k] = static_cast<A>(raw[k]);
    }
  }
}
template <class A, class Is, class Where>
__device__ inline void load_each(Element type, A (&x)[8], const Is& is, const Where& where) {
  switch (type) {
    case Element::f16: return load_each<Fp16>(x, is, where);
    case Element::bf16: return load_each<Bf16>(x, is, where);
    case Element::f32: return load_each<float>(x, is, where);
    default: return load_each<double>(x, is, where);
  }
}

template <class A>
__device__ inline void store(char* at, Element type, A x, bool integer = false) {
  if (integer) {
    *reinterpret_cast<int16_t*>(at) = static_cast<int16_t>(x);
    return;
  }
  switch (type) {
    case Element::f16: *reinterpret_cast<Fp16*>(at) = rounded<Fp16>(x); break;
    case Element::bf16: *reinterpret_cast<Bf16*>(at) = rounded<Bf16>(x); break;
    case Element::f32: *reinterpret_cast<float*>(at) = static_cast<float>(x); break;
    default: *reinterpret_cast<double*>(at) = static_cast<double>(x);
  }
}

// Eight elements as they lie in memory: two runs of four, `first` and `second` elements behind an
// address. Two-byte elements need the second run behind the first, for one access of 16 bytes.
template <class A>
struct Eight {
  static constexpr int accesses = sizeof(A) == 8 ? 4 : 2;  // an A is the widest element there is
  uint4 raw[accesses];

  __device__ void load(const char* at, Element type, int first, int second) {
    const int size = size_of(type);
    const uint4* a = reinterpret_cast<const uint4*>(at + int64_t{first} * size);
    const uint4* b = reinterpret_cast<const uint4*>(at + int64_t{second} * size);
    raw[0] = a[0];
    if (size == 4) raw[1] = b[0];
    if constexpr (sizeof(A) == 8) {
      if (size == 8) raw[1] = a[1], raw[2] = b[0], raw[3] = b[1];
    }
  }

  __device__ void store(char* at, Element type, int first, int second) const {
    const int size = size_of(type);
    uint4* a = reinterpret_cast<uint4*>(at + int64_t{first} * size);
    uint4* b = reinterpret_cast<uint4*>(at + int64_t{second} * size);
    a[0] = raw[0];
    if (size == 4) b[0] = raw[1];
    if constexpr (sizeof(A) == 8) {
      if (size == 8) a[1] = raw[1], b[0] = raw[2], b[1] = raw[3];
    }
  }

  // The same of runs that are there; others are zeros, and stay where they are.
  __device__ void load(const char* at, Element type, int first, int second,
                       const bool (&there)[2]) {
    const int size = size_of(type);
    const uint4* a = reinterpret_cast<const uint4*>(at + int64_t{first} * size);
    const uint4* b = reinterpret_cast<const uint4*>(at + int64_t{second} * size);
#pragma unroll
    for (int i = 0; i < accesses; ++i) raw[i] = {0, 0, 0, 0};
    if (there[0]) raw[0] = a[0];
    if (there[1] && size == 4) raw[1] = b[0];
    if constexpr (sizeof(A) == 8) {
      if (there[0] && size == 8) raw[1] = a[1];
      if (there[1] && size == 8) raw[2] = b[0], raw[3] = b[1];
    }
  }

  __device__ void store(char* at, Element type, int first, int second,
                        const bool (&there)[2]) const {
    const int size = size_of(type);
    uint4* a = reinterpret_cast<uint4*>(at + int64_t{first} * size);
    uint4* b = reinterpret_cast<uint4*>(at + int64_t{second} * size);
    if (there[0]) a[0] = raw[0];
    if (there[1] && size == 4) b[0] = raw[1];
    if constexpr (sizeof(A) == 8) {
      if (there[0] && size == 8) a[1] = raw[1];
      if (there[1] && size == 8) b[0] = raw[2], b[1] = raw[3];
    }
  }

  __device__ void get(Element type, A (&x)[8], bool integers = false) const {
    if (integers) return get<int16_t>(x);
    switch (type) {
      case Element::f16: return get<Fp16>(x);
      case Element::bf16: return get<Bf16>(x);
      case Element::f32: return get<float>(x);
      default: if constexpr (sizeof(A) == 8) return get<double>(x);
    }
  }

  __device__ void put(Element type, const A (&x)[8], bool integers = false) {
    if (integers) return put<int16_t>(x);
    switch (type) {
      case Element::f16: return put<Fp16>(x);
      case Element::bf16: return put<Bf16>(x);
      case Element::f32: return put<float>(x);
      default: if constexpr (sizeof(A) == 8) return put<double>(x);
    }
  }

 private:
  template <class T>
  __device__ void get(A (&x)[8]) const {
    constexpr int words = sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 4;
    T values[8];
    memcpy(values, raw, words * sizeof(uint4));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (sizeof(T) == 2 && !std::is_integral_v<T>) {
        x[i] = static_cast<A>(widened(values[i]));
      } else {
        x[i] = static_cast<A>(values[i]);
      }
    }
  }

  template <class T>
  __device__ void put(const A (&x)[8]) {
    constexpr int words = sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 4;
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (sizeof(T) == sizeof(A) || std::is_integral_v<T>) {
        values[i] = static_cast<T>(x[i]);
      } else {
        values[i] = rounded<T>(x[i]);
      }
    }
    memcpy(raw, values, words * sizeof(uint4));
  }
};

// A number that the host knew, or numbers in a tensor on the device.
struct Number {
  double value = 0;
  const char* at = nullptr;
  Element type = Element::f64;
  int64_t stride = 0;

  Number(double known) : value(known) {}
  Number(const char* data, Element element, int64_t step) : at(data), type(element), stride(step) {}

  __device__ double read(int64_t index = 0) const {
    return at ? load<double>(at + index * stride * size_of(type), type) : value;
  }
};

}  // namespace orthonorm::cuda
