// Tensors as kernels take them: checked, on their device's stream, and errors that say where.
#pragma once

#include "../orthonorm.h"

#include <array>
#include <deque>
#include <optional>
#include <sstream>
#include <string>

#include "elementwise.h"
#include "rounding.h"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define ORTHONORM_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(orthonorm, CUDA, m)
#else  // tests run the same sources on CPU tensors
#define ORTHONORM_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m)
#endif
// A kernel for a part of an op's inputs: the overload `part`, asked by `_library.py` where the op's
// predicate allows it. Other inputs go to the next backend.
#define ORTHONORM_CUDA_PART(op, schema)                                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(orthonorm, m) { m.def(#op ".part" schema); }                 \
  ORTHONORM_CUDA_IMPL(m) { m.impl(#op ".part", TORCH_BOX(&op)); }

namespace orthonorm::cuda {

#ifdef ORTHONORM_BUILT_FOR  // read from the file before it is loaded: `_library.py`
[[gnu::used]] static const char built_for[] = "orthonorm built for: " ORTHONORM_BUILT_FOR ";";
#endif

inline Element element_of(const char* op, const char* name, ScalarType dtype,
                          bool integers = false) {
  STD_TORCH_CHECK(!integers || dtype == ScalarType::Short, op, ": ", name, " must be int16");
  if (integers) return Element::i16;
  switch (dtype) {
    case ScalarType::Half: return Element::f16;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Float: return Element::f32;
    case ScalarType::Double: return Element::f64;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16");
  }
}

inline Strided strided(const char* op, const char* name, const Tensor& t, bool integers = false) {
  return {static_cast<char*>(t.data_ptr()), element_of(op, name, t.scalar_type(), integers),
          t.dim(), t.sizes().data(), t.strides().data()};
}

inline std::string shape_of(const Strided& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim; ++d) text << (d ? ", " : "") << t.sizes[d];
  text << ")";
  return text.str();
}

// Whether two indices mean the same element, as in an expanded tensor.
inline bool expanded(const Strided& t) {
  for (int64_t d = 0; d < t.dim; ++d) {
    if (t.strides[d] == 0 && t.sizes[d] > 1) return numel(t) > 0;
  }
  return false;
}

// Memory that is certainly a tensor's: all of a dense one, the first element of another.
inline int64_t certain_bytes(const Strided& t) {
  int64_t span = 1;
  for (int64_t d = 0; d < t.dim; ++d) span += (t.sizes[d] - 1) * t.strides[d];
  return (span == numel(t) ? span : 1) * size_of(t.type);
}

struct NamedList {
  const char* name;
  const TensorList& tensors;
  bool written;
  bool integers = false;  // of 16 bits
};

// One call of an op on lists of tensors. Checks that nothing outside of them would be touched, then
// runs launches on the current stream of their device.
class Call {
 public:
  Call(const char* op, std::vector<NamedList> lists) : op_(op), lists_(std::move(lists)) {
    const NamedList& leader = lists_[0];
    std::vector<Written> written;
    for (const NamedList& list : lists_) {
      same_length(list.name, list.tensors.size());
      for (size_t i = 0; i < list.tensors.size(); ++i) {
        const Tensor& t = list.tensors[i];
        tensors_.push_back(strided(op, list.name, t, list.integers));
        const Strided& s = tensors_.back();
        STD_TORCH_CHECK(t.device() == leader.tensors[0].device(), op, ": ", list.name, "[", i,
                        "] must be on the device of ", leader.name, "[0]");
        if (!list.written || numel(s) == 0) continue;
        STD_TORCH_CHECK(!expanded(s), op, ": ", list.name, "[", i,
                        "] is written and must not be expanded");
        written.push_back({s.data, s.data + certain_bytes(s), list.name, i});
      }
    }
    apart(written);
  }

  size_t size() const { return lists_[0].tensors.size(); }
  const Strided& operator()(size_t list, size_t i) const { return tensors_[list * size() + i]; }

  // Item i of the first N lists.
  template <int N>
  std::array<Strided, N> item(size_t i) const {
    std::array<Strided, N> result;
    for (int k = 0; k < N; ++k) result[k] = (*this)(k, i);
    return result;
  }

  void same_length(const char* name, size_t length) const {
    STD_TORCH_CHECK(length == size(), op_, ": lists must have equal lengths, got ", size(), " ",
                    lists_[0].name, " and ", length, " ", name);
  }

  // All lists have one shape at every place, of at least `least` dimensions.
  void same_shapes(int64_t least) const {
    for (size_t k = 0; k < lists_.size(); ++k) {
      for (size_t i = 0; i < size(); ++i) {
        const Strided &t = (*this)(k, i), &first = (*this)(0, i);
        STD_TORCH_CHECK(t.dim >= least, op_, ": ", lists_[k].name, "[", i, "] must have at least ",
                        least, " dimensions, got shape ", shape_of(t));
        STD_TORCH_CHECK(t.dim == first.dim && std::equal(t.sizes, t.sizes + t.dim, first.sizes),
                        op_, ": ", lists_[k].name, "[", i, "] must have the shape of ",
                        lists_[0].name, "[", i, "] ", shape_of(first), ", got ", shape_of(t));
      }
    }
  }

  // The first list is of bfloat16, as weights beside mantissas are.
  void halves() const {
    for (size_t i = 0; i < size(); ++i) {
      STD_TORCH_CHECK((*this)(0, i).type == Element::bf16, op_, ": ", lists_[0].name, "[", i,
                      "] must be bfloat16");
    }
  }

  // The lists behind the first hold numbers for its rows, its columns, or both in this order.
  void lines(bool rows, bool columns) const {
    for (size_t i = 0; i < size(); ++i) {
      const Strided& x = (*this)(0, i);
      STD_TORCH_CHECK(x.dim >= 2, op_, ": ", lists_[0].name, "[", i,
                      "] must have at least 2 dimensions, got shape ", shape_of(x));
      if (rows) lines(1, i, x.dim - 1);
      if (columns) lines(rows ? 2 : 1, i, x.dim - 2);
    }
  }

  // A one-element tensor: read on the device, or its value if the host has it.
  Number number(const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.numel() == 1, op_, ": ", name, " must have one element, got ", t.numel());
    return numbers(name, t);
  }

  // One that may be left out.
  Number number(const char* name, const std::optional<Tensor>& t, double otherwise) {
    return t ? number(name, *t) : Number(otherwise);
  }

  // Numbers to be read on the device, brought there if they are not: several of the host's by a
  // copy, which is refused where it would go into a graph.
  Number numbers(const char* name, const Tensor& t) {
    const Strided s = strided(op_, name, t);
    if (size() == 0 || t.device() == device()) return {s.data, s.type, t.dim() ? s.strides[0] : 0};
    if (t.is_cpu() && t.numel() == 1) return {host_value(s)};
    // A graph's copy reads its source in every replay: the caller may have freed it by then.
    STD_TORCH_CHECK(!t.is_cpu() || !captured(), op_, ": ", name, " must be on the device of ",
                    lists_[0].name, "[0] in a CUDA graph, got ", t.numel(), " numbers on the CPU");
    const Tensor& there = kept_.emplace_back(torch::stable::to(t, device(), true));
    return {static_cast<char*>(there.data_ptr()), s.type, there.dim() ? there.stride(0) : 0};
  }

  // The seed of stochastic rounding, read on the device unless the host has it.
  Seed seed(const std::optional<Tensor>& t) {
    if (!t) return {};
    STD_TORCH_CHECK(t->numel() == 1 && t->scalar_type() == ScalarType::Long, op_,
                    ": rounding must be one int64 number");
    const bool here = size() > 0 && t->device() == device();
    if (!here && t->is_cpu()) return {true, *static_cast<const int64_t*>(t->data_ptr())};
    if (size() == 0) return {true};
    const Tensor& there = here ? *t : kept_.emplace_back(torch::stable::to(*t, device(), true));
    return {true, 0, static_cast<const int64_t*>(there.data_ptr())};
  }

  // What the op measures of every matrix of the first list, in float64; 0 of empty ones.
  template <class Op>
  Tensor measured(const Op& op) {
    int64_t count = 0;
    for (size_t i = 0; i < size(); ++i) count += matrices((*this)(0, i));
    const auto on = size() ? std::optional(device()) : std::nullopt;
    const Tensor result = torch::stable::empty({count}, ScalarType::Double, std::nullopt, on);
    run([&](const Device& device) {
      auto lists = elementwise(device, Unit::matrix, op, static_cast<double*>(result.data_ptr()));
      for (size_t i = 0; i < size(); ++i) lists.add(item<Op::lists>(i));
      lists.finish();
    });
    return result;
  }

  // Calls `launches(device)`; an error in it names op and shapes.
  template <class Launches>
  void run(const Launches& launches) {
    if (size() == 0) return;
    try {
      with_device(launches);
    } catch (const std::exception& error) {
      std::ostringstream shapes;
      for (size_t i = 0; i < size() && i < 4; ++i) {
        shapes << (i ? ", " : "") << shape_of((*this)(0, i));
      }
      if (size() > 4) shapes << " and " << size() - 4 << " more";
      STD_TORCH_CHECK(false, op_, ": ", error.what(), ", on ", lists_[0].name, " of shapes ",
                      shapes.str());
    }
  }

 private:
  struct Written {
    const char *begin, *end;
    const char* name;
    size_t i;
  };

  // No two tensors that are written share memory, as far as their first and dense elements say:
  // interleaved ones, columns of one matrix say, are not followed.
  void apart(std::vector<Written>& all) const {
    std::stable_sort(all.begin(), all.end(),
                     [](const Written& a, const Written& b) { return a.begin < b.begin; });
    const Written* last = nullptr;  // of those so far, where the memory ends last
    for (const Written& w : all) {
      STD_TORCH_CHECK(!last || w.begin >= last->end, op_, ": ", w.name, "[", w.i,
                      "] is written and must not share memory with ", last->name, "[", last->i,
                      "], which is written too");
      if (!last || w.end > last->end) last = &w;
    }
  }

  // Tensor i of a list has the shape of the first list's, but 1 at `reduced`.
  void lines(size_t list, size_t i, int64_t reduced) const {
    const Strided &x = (*this)(0, i), &t = (*this)(list, i);
    bool fits = t.dim == x.dim;
    for (int64_t d = 0; fits && d < x.dim; ++d) {
      fits = t.sizes[d] == (d == reduced ? 1 : x.sizes[d]);
    }
    STD_TORCH_CHECK(fits, op_, ": ", lists_[list].name, "[", i, "] must have the shape of ",
                    lists_[0].name, "[", i, "] ", shape_of(x), " but 1 in dimension ",
                    reduced - x.dim, ", got ", shape_of(t));
  }

  torch::stable::Device device() const { return lists_[0].tensors[0].device(); }

  static double host_value(const Strided& t) {
    switch (t.type) {
      case Element::f16: return widen(*reinterpret_cast<const Fp16*>(t.data));
      case Element::bf16: return widen(*reinterpret_cast<const Bf16*>(t.data));
      case Element::f32: return *reinterpret_cast<const float*>(t.data);
      default: return *reinterpret_cast<const double*>(t.data);
    }
  }

  // Calls `use(stream)`, with the lists' device as the current one.
  template <class Use>
  auto with_stream(const Use& use) const {
    cudaStream_t stream = nullptr;
#ifdef __CUDACC__
    const int32_t index = lists_[0].tensors[0].get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
#endif
    return use(stream);
  }

 public:
  // Whether launches go into a CUDA graph; the stable ABI has no question of its own for it.
  bool captured() const {
    return with_stream([](cudaStream_t stream) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      check(cudaStreamIsCapturing(stream, &status));
      return status != cudaStreamCaptureStatusNone;
    });
  }

 private:
  template <class Launches>
  void with_device(const Launches& launches) {
    with_stream([&](cudaStream_t stream) {
      launches(Device{stream, [this](int64_t bytes) {
                        kept_.push_back(torch::stable::empty({bytes}, ScalarType::Byte,
                                                             std::nullopt, device()));
                        return kept_.back().data_ptr();
                      }});
    });
  }

  const char* op_;
  std::vector<NamedList> lists_;
  std::vector<Strided> tensors_;
  std::deque<Tensor> kept_;  // memory of the launches
};

}  // namespace orthonorm::cuda
