#include "callback.h"

#include <pybind11/numpy.h>

#include <algorithm>

#include "batch_norm.h"

namespace bnfast::bind {
namespace {

namespace py = pybind11;

// The arguments of train and grad (batch_norm.h), in their order. Those to write have the dtype of the first.
const std::vector<std::string> train_names{
    "x",    "gamma",      "beta",           "moving_mean", "moving_variance", "axis",       "momentum", "epsilon",
    "mask", "activation", "negative_slope", "residual",    "correction",      "nan_policy", "out"};
const std::vector<std::string> grad_names{
    "dy",       "x", "mean",     "invstd", "gamma",     "beta", "axis",         "mask", "activation", "negative_slope",
    "residual", "y", "training", "dmean",  "dvariance", "out",  "out_dresidual"};

enum TrainPlace { moving_mean_at = 3, moving_variance_at = 4 };
enum GradPlace { gamma_at = 4, beta_at = 5, y_at = 11 };
constexpr std::size_t train_outs_at = 14, grad_outs_at = 15;  // what is written comes last

std::size_t place_of(const std::string& name, const std::vector<std::string>& names) {
    const auto at = std::find(names.begin(), names.end(), name);
    if (at == names.end()) throw py::value_error("no argument of this name. Received: " + name);
    return std::size_t(at - names.begin());
}

}  // namespace

Callback::Callback(const std::string& kernel, const std::vector<std::string>& names, const py::dict& words,
                   py::object slow)
    : trains_(kernel == "train"), slow_(std::move(slow)) {
    if (!trains_ && kernel != "grad") throw py::value_error("kernel must be train or grad. Received: " + kernel);
    const std::vector<std::string>& all = trains_ ? train_names : grad_names;
    constants_.assign(all.size(), py::none());
    for (const std::string& name : names) places_.push_back(place_of(name, all));
    for (const auto& [name, value] : words)
        constants_[place_of(name.cast<std::string>(), all)] = py::reinterpret_borrow<py::object>(value);
}

std::vector<py::handle> Callback::filled(const py::args& arrays, std::vector<py::object>& outs) const {
    if (arrays.size() != places_.size()) throw py::type_error("as many arrays must come as there are names");
    std::vector<py::handle> a(constants_.begin(), constants_.end());
    for (std::size_t i = 0; i < places_.size(); ++i) a[places_[i]] = arrays[i];
    for (std::size_t i = trains_ ? train_outs_at : grad_outs_at; i < a.size(); ++i) {
        if (a[i].is_none()) continue;
        outs.push_back(a[i].attr("view")(a.front().attr("dtype")));
        a[i] = outs.back();
    }
    return a;
}

py::object Callback::train_on(const py::args& arrays) const {
    std::vector<py::object> outs;
    std::vector<py::handle> a = filled(arrays, outs);
    py::list moved;
    if (!a[moving_mean_at].is_none()) {
        moved.append(a[moving_mean_at].attr("copy")());
        moved.append(a[moving_variance_at].attr("copy")());
        a[moving_mean_at] = moved[0].ptr();
        a[moving_variance_at] = moved[1].ptr();
    }
    const py::object result =
        train(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14]);
    if (result.is_none()) return result;
    const py::tuple r = result;  // y, mean, variance, invstd
    py::list made;
    for (const int i : {0, 1, 3}) made.append(r[i]);
    if (moved.empty()) made.append(r[2]);
    for (const py::handle moving : moved) made.append(moving);
    return made;
}

py::object Callback::grad_on(const py::args& arrays) const {
    std::vector<py::object> outs;
    const std::vector<py::handle> a = filled(arrays, outs);
    const py::object result = grad(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                                   a[13], a[14], a[15], a[16]);
    if (result.is_none()) return result;
    const py::tuple r = result;  // dx, dgamma, dbeta, dresidual
    py::list made;
    made.append(r[0]);
    for (const auto& [i, at] : {std::pair{1, gamma_at}, {2, beta_at}, {3, y_at}}) {
        if (a[at].is_none()) continue;
        const py::dtype wanted = py::reinterpret_borrow<py::array>(a[at]).dtype();  // dbeta comes in gamma's
        const py::array gradient = r[i];
        made.append(gradient.dtype().is(wanted) ? gradient : py::array(gradient.attr("astype")(wanted)));
    }
    return made;
}

py::object Callback::operator()(const py::args& arrays) const {
    const py::object result = trains_ ? train_on(arrays) : grad_on(arrays);
    return result.is_none() ? slow_(*arrays) : result;
}

}  // namespace bnfast::bind
