// The Python module bnfast._core. A function whose arguments aren't plain returns None and has changed nothing (see
// array_view.h).
#include "cpu/dispatch/isa.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "../tf/core_api.h"
#include "batch_norm.h"
#include "call.h"
#include "callback.h"
#include "group_norm.h"

namespace bnfast::bind {
namespace {

py::array empty(const std::vector<py::ssize_t>& shape, const py::dtype& dtype) {
    std::int64_t bytes = dtype.itemsize();
    for (const py::ssize_t extent : shape) {
        if (extent < 0) throw py::value_error("shape must have extents >= 0. Received: " + std::to_string(extent));
        if (__builtin_mul_overflow(bytes, extent, &bytes)) throw std::bad_alloc();
    }
    return new_array(dtype, shape.data(), int(shape.size()), bytes);
}

py::dict build_info() {
    const Machine& m = machine();
    py::dict info;
    info["version"] = BNFAST_VERSION;
    info["isa"] = isa_name();
    info["isa_reason"] = isa_reason();
    info["isas"] = py::tuple(py::cast(usable_isas()));
    info["threads"] = get_num_threads();
    info["default_threads"] = m.threads;
    info["threads_reason"] = m.threads_reason;
    info["l1d_bytes"] = m.l1d;
    info["l2_bytes"] = m.l2;
    info["l3_bytes"] = m.l3;
    info["compiler"] = BNFAST_COMPILER;
    info["flags"] = BNFAST_FLAGS;
    info["openmp"] = parallel_engine();
    const MemoryStatistics s = memory_statistics();
    py::dict memory;
    memory["held_bytes"] = s.held_bytes;
    memory["limit_bytes"] = s.limit_bytes;
    memory["in_use_bytes"] = s.in_use_bytes;
    memory["reused"] = s.reused;
    memory["fresh"] = s.fresh;
    info["memory"] = memory;
    return info;
}

}  // namespace
}  // namespace bnfast::bind

PYBIND11_MODULE(_core, m) {
    using namespace bnfast;
    namespace py = pybind11;
    if (const std::string error = isa_of_environment_error(); !error.empty()) throw py::import_error(error);
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const NonFiniteError& e) {
            PyErr_SetString(PyExc_FloatingPointError, e.what());
        }
    });
    m.def("train", &bind::train);
    m.def("infer", &bind::infer);
    m.def("grad", &bind::grad);
    m.def("moments", &bind::moments);
    m.def("group_norm", &bind::group_norm);
    m.def("group_norm_grad", &bind::group_norm_grad);
    m.def("layer_norm", &bind::layer_norm);
    m.def("layer_norm_grad", &bind::layer_norm_grad);
    py::class_<bind::Callback>(m, "Callback")
        .def(py::init<const std::string&, const std::vector<std::string>&, const py::dict&, py::object>())
        .def("__call__", &bind::Callback::operator());
    m.def("empty", &bind::empty);
    m.def("get_num_threads", &get_num_threads);
    m.def("set_num_threads", [](std::optional<int> n) { set_num_threads(n.value_or(0)); });
    m.def("build_info", &bind::build_info);
    m.def("clear_memory", &clear_memory);
    m.def("set_memory_limit", &set_memory_limit);
    m.def("_connect_tf", [](const std::string& path) { return tf::connect(path.c_str()); });
    m.def("_set_isa", [](std::optional<std::string> name) { set_isa(name.value_or("")); });
    m.def("_set_serial_bytes", [](std::optional<std::int64_t> n) { set_serial_bytes(n.value_or(-1)); });
    m.def("_set_full_team", &set_full_team);
    m.def("_last_run", [] { return py::make_tuple(last_isa(), last_team_size()); });
    m.def("_fp_mode", &fp_mode);
    m.def("_set_fp_mode", &set_fp_mode);
}
