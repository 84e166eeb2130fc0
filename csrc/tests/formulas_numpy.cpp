// The torch-free formulas for NumPy arrays: a module for tests/test_formulas_numpy.py, which builds
// it with pybind11 and writes every formula a second time. Not shipped.
//
// Every function takes arrays of one dtype, float32 or float64, and the numbers of its formula; it
// returns what the formula writes, as new arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "adamw_step.h"
#include "decayed_update.h"
#include "elementwise_moment.h"
#include "moments.h"
#include "muon_prologue.h"
#include "rotated_adam.h"
#include "rounding.h"

namespace py = pybind11;
using namespace orthonorm;

namespace {

template <class A>
using Array = py::array_t<A, py::array::c_style>;

// f on the elements of copies of the arrays, which are returned.
template <class A, class F, class... Arrays>
py::tuple each(F f, const Arrays&... arrays) {
  const py::ssize_t count = std::get<0>(std::tie(arrays...)).size();
  if (((arrays.size() != count) || ...)) throw py::value_error("arrays must have one size");
  auto copies = std::make_tuple(Array<A>(arrays.request())...);
  std::apply(
      [&](auto&... copy) {
        for (py::ssize_t i = 0; i < count; ++i) f(copy.mutable_data()[i]...);
      },
      copies);
  return std::apply([](auto&... copy) { return py::make_tuple(copy...); }, copies);
}

template <class A>
void define(py::module_& m) {
  using X = Array<A>;
  const auto exactly = [](const char* name) { return py::arg(name).noconvert(); };
  m.def(
      "rotated_adam",
      [](X m, X v, X x, double beta1, double beta2, double eps, double scale) {
        const RotatedAdam<A> c(beta1, beta2, eps, scale);
        return each<A>([&](A& m, A& v, A& x) { rotated_adam(c, m, v, x); }, m, v, x);
      },
      exactly("m"), exactly("v"), exactly("x"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("scale"));
  m.def(
      "elementwise_moment",
      [](X v, X x, double beta2, double eps, double correction) {
        const ElementwiseMoment<A> c(beta2, eps, correction);
        return each<A>([&](A& v, A& x) { elementwise_moment(c, v, x); }, v, x);
      },
      exactly("v"), exactly("x"), py::arg("beta2"), py::arg("eps"), py::arg("correction"));
  m.def(
      "adamw_step",
      [](X w, X g, X m, X v, double t, double lr, double beta1, double beta2, double eps,
         double weight_decay, bool decay_first, bool correct_eps, double grad_scale) {
        const AdamWRule rule{lr,           beta1,       beta2,       eps,
                             weight_decay, decay_first, correct_eps, grad_scale};
        const AdamWStep<A> c(rule, t);
        return each<A>([&](A& w, A& g, A& m, A& v) { adamw_step(c, w, g, m, v); }, w, g, m, v);
      },
      exactly("w"), exactly("g"), exactly("m"), exactly("v"), py::arg("t"), py::arg("lr"),
      py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
      py::arg("decay_first"), py::arg("correct_eps"), py::arg("grad_scale"));
  m.def(
      "adamw_halves",
      [](X w, X g, X m, X v, X mantissa, double t, double lr, double weight_decay) {
        const AdamWStep<A> c({lr, 0.9, 0.99, 1e-8, weight_decay, true, true}, t);
        const auto f = [&](A& w, A& g, A& m, A& v, A& rest) { adamw_step(c, w, g, m, v, rest); };
        return each<A>(f, w, g, m, v, mantissa);
      },
      exactly("w"), exactly("g"), exactly("m"), exactly("v"), exactly("mantissa"), py::arg("t"),
      py::arg("lr"), py::arg("weight_decay"));
  m.def(
      "decayed_update",
      [](X w, X u, double lr, double weight_decay, double factor) {
        const DecayedUpdate<A> c(lr, weight_decay, factor);
        return each<A>([&](A& w, A& u) { decayed_update(c, w, u); }, w, u);
      },
      exactly("w"), exactly("u"), py::arg("lr"), py::arg("weight_decay"), py::arg("factor"));
  m.def(
      "update_halves",
      [](X w, X u, X mantissa, double lr, double weight_decay, double factor) {
        const DecayedUpdate<A> c(lr, weight_decay, factor);
        const auto f = [&](A& w, A& u, A& rest) { decayed_update(c, w, u, rest); };
        return each<A>(f, w, u, mantissa);
      },
      exactly("w"), exactly("u"), exactly("mantissa"), py::arg("lr"), py::arg("weight_decay"),
      py::arg("factor"));
  m.def(
      "muon_prologue",
      [](X g, X b, double mu, bool nesterov, double grad_scale, double found_inf) {
        const MuonPrologue<A> c(mu, nesterov, grad_scale, found_inf);
        const auto f = [&](A& g, A& b) { g = muon_prologue(c, g, b); };
        return each<A>(f, g, b);  // the update comes back in the place of g
      },
      exactly("g"), exactly("b"), py::arg("mu"), py::arg("nesterov"), py::arg("grad_scale"),
      py::arg("found_inf"));
}

}  // namespace

PYBIND11_MODULE(formulas_numpy, m) {
  define<float>(m);
  define<double>(m);
  py::enum_<EpsAt>(m, "EpsAt")
      .value("outside", EpsAt::outside)
      .value("inside", EpsAt::inside)
      .value("clamp", EpsAt::clamp);
  m.def("denominator", &denominator);
  m.def("divisor", &divisor);
  m.def("decayed", &decayed);
  m.def("norm_ratio", &norm_ratio);
  m.def("stochastic", [](Array<float> x, int64_t seed) {
    const Stochastic rounded(seed);
    int64_t place = 0;
    return each<float>([&](float& x) { x = rounded(x, place++); }, x);
  });
}
