// AdamW on lists: one small launch counts the steps, one pass updates everything.
#pragma once

#include "../adamw_step.h"

#include "elementwise.h"
#include "rounding.h"

namespace orthonorm::cuda {

struct AdamWOp {
  static constexpr int lists = 4;
  static constexpr unsigned reads = 0b1111, writes = 0b1101;  // params, grads, exp_avg, exp_avg_sq
  static constexpr Measure measure = Measure::nothing;
  template <class A>
  struct Constants {
    AdamWStep<A> rule;
    Rounding rounding;
  };

  const AdamWStep<double>* made;  // for every item
  Seed seed = {};
  Number found_inf = 0;

  template <class A>
  __device__ Constants<A> prepare(const Entry<4>& entry, int64_t) const {
    return {AdamWStep<A>(made[entry.item]), {seed, entry.type[0]}};
  }

  template <class A>
  __device__ static A apply(const Constants<A>& c, A (&x)[4], int64_t place) {
    adamw_step(c.rule, x[0], x[1], x[2], x[3]);
    return x[0] = c.rounding(x[0], place);
  }
};

// Of float32 weights kept as halves, lists 0 and 1.
struct HalvesAdamWOp {
  static constexpr int lists = 5;  // params, mantissas, grads, exp_avg, exp_avg_sq
  static constexpr unsigned reads = 0b11111, writes = 0b11011, integers = 0b00010;
  static constexpr Measure measure = Measure::nothing;
  template <class A>
  using Constants = AdamWStep<A>;

  const AdamWStep<double>* made;  // for every item
  Number found_inf = 0;

  template <class A>
  __device__ AdamWStep<A> prepare(const Entry<5>& entry, int64_t) const {
    return AdamWStep<A>(made[entry.item]);
  }

  template <class A>
  __device__ static A apply(const AdamWStep<A>& c, A (&x)[5], int64_t) {
    adamw_step(c, x[0], x[2], x[3], x[4], x[1]);
    return x[0];
  }
};

// The numbers of a list that are read on the device.
struct AdamWNumbers {
  Number lr, weight_decay, grad_scale = 1, found_inf = 0;
};

// Adds 1 to every step count on the device, but for an infinity that was found, and makes each
// item's constants. An entry without data has its count, already this step's, in `extra`.
__global__ void advance_kernel(ORTHONORM_CONSTANT(Table<1>) table,
                               ORTHONORM_CONSTANT(AdamWNumbers) numbers, AdamWRule rule,
                               AdamWStep<double>* made) {
  const int i = static_cast<int>(blockIdx.x * threads + threadIdx.x);
  if (i >= table.entries_used) return;
  const Entry<1>& entry = table.entries[i];
  const int one = numbers.found_inf.read() == 0;
  double t = bit_cast<double>(entry.extra);
  if (entry.data[0]) {
    if (entry.type[0] == Element::f64) {
      t = *reinterpret_cast<double*>(entry.data[0]) += one;
    } else {
      t = *reinterpret_cast<float*>(entry.data[0]) += one;
    }
  }
  rule.lr = numbers.lr.read();
  rule.weight_decay = numbers.weight_decay.read();
  rule.grad_scale = numbers.grad_scale.read();
  made[entry.item] = AdamWStep<double>(rule, t);
}

// ---- host --------------------------------------------------------------------------------------

// Step counts, a one-element tensor each; `numbers` replace those of `rule`.
inline Lists<1> counted(const Device& device, const AdamWNumbers& numbers, const AdamWRule& rule,
                        AdamWStep<double>* made) {
  return Lists<1>(Unit::tensor, 1, [&device, numbers, rule, made](const Table<1>& table, bool) {
    launch(advance_kernel, (table.entries_used + threads - 1) / threads, threads, 0, device, table,
           numbers, rule, made);
  });
}

}  // namespace orthonorm::cuda
