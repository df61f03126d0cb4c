// The Python module bnfast._core. All arguments are positional-only. The norm functions take the fast path of
// array_view.h: contiguous, aligned arrays of the right dtype and shape; for anything else they return None and have
// changed nothing. The functions that start with "_" are for tests and for bnfast.jax, bnfast.tensorflow and
// bnfast.torch.
#include "cpu/dispatch/isa.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "../jax/call.h"
#include "../jax/handlers.h"
#include "../tf/core_api.h"
#include "batch_norm.h"
#include "call.h"
#include "callback.h"
#include "group_norm.h"
#include "torch_functions.h"

#include <memory>

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

// What contradicts itself in the buffer that an object exports; "" if nothing does or it exports none. memoryview reads
// a null shape of several axes, and NumPy believes any shape (crashes, CPython 3.11 and NumPy 2.4).
std::string buffer_fault(py::handle object) {
    if (!PyObject_CheckBuffer(object.ptr())) return "";
    Py_buffer view;
    if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_FULL_RO) != 0) {
        PyErr_Clear();  // memoryview raises it anew
        return "";
    }
    const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> release(&view, PyBuffer_Release);
    if (view.ndim < 0 || view.ndim > 64) return std::to_string(view.ndim) + " axes";
    if (view.ndim > 1 && !view.shape) return "no shape for " + std::to_string(view.ndim) + " axes";
    // Without a shape memoryview divides len by it.
    if (view.itemsize <= 0) return "items of " + std::to_string(view.itemsize) + " bytes";
    if (!view.shape) return view.len >= 0 ? "" : std::to_string(view.len) + " bytes";
    std::int64_t bytes = view.itemsize;
    for (int i = 0; i < view.ndim; ++i) {
        if (view.shape[i] < 0) return "the extent " + std::to_string(view.shape[i]);
        if (__builtin_mul_overflow(bytes, view.shape[i], &bytes)) return "a shape of more than 2^63 bytes";
    }
    if (bytes == view.len) return "";
    return std::to_string(view.len) + " bytes for a shape of " + std::to_string(bytes);
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
    info["threading"] = parallel_engine();
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

// The handlers as JAX registers them, by the name of their call.
py::dict jax_handlers() {
    py::dict handlers;
    const auto add = [&](const char* name, jax::Handler* handler) {
        handlers[name] = py::capsule(reinterpret_cast<void*>(handler));
    };
    add("bnfast_train", jax::train);
    add("bnfast_infer", jax::infer);
    add("bnfast_grad", jax::grad);
    add("bnfast_moments", jax::moments);
    return handlers;
}

py::tuple jax_query() {
    const jax::Query query = jax::last_query();
    return py::make_tuple(query.asked, query.major_number, query.minor_number, query.reason);
}

template <class F> void define(py::module_& m, const char* name, F* function, Names arguments) {
    m.def(name, function,
          (signature(name, arguments) + "See bnfast.functional. None: the fast path declines.").c_str());
}

}  // namespace
}  // namespace bnfast::bind

// For threadpoolctl, which looks a library's functions up by name (python/bnfast/_thread_pools.py).
extern "C" PYBIND11_EXPORT int bnfast_get_num_threads() { return bnfast::get_num_threads(); }
extern "C" PYBIND11_EXPORT void bnfast_set_num_threads(int threads) { bnfast::set_num_threads(threads); }

// pybind11 takes the GIL of the main interpreter before it does anything else. Another interpreter of this process,
// which holds that lock, would wait for itself. So the function that it makes stays ours, and PyInit__core looks first.
#undef PYBIND11_PLUGIN_IMPL
#define PYBIND11_PLUGIN_IMPL(name) static PyObject* init_in_main_interpreter()
static PyObject* init_in_main_interpreter();
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
    if (PyInterpreterState_Get() == PyInterpreterState_Main()) return init_in_main_interpreter();
    PyErr_SetString(PyExc_ImportError, "bnfast can be imported in the main interpreter alone, not in a subinterpreter");
    return nullptr;
}

PYBIND11_MODULE(_core, m) {
    using namespace bnfast;
    namespace py = pybind11;
    // Not a local translator: with one, a failing allocation made an error without a text (test_allocations.py).
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const NonFiniteError& e) {
            PyErr_SetString(PyExc_FloatingPointError, e.what());
        } catch (const std::runtime_error&) {
            // pybind11 reports a tuple or list that it can't allocate as RuntimeError, over Python's own MemoryError.
            if (!PyErr_Occurred() || !PyErr_ExceptionMatches(PyExc_MemoryError)) throw;
        }
    });
    // The docstrings start with the signature, in the form that CPython reads as __text_signature__; pybind11's own
    // line names the arguments arg0, arg1, ...
    py::options docstrings;
    docstrings.disable_function_signatures();
    bind::define(m, "train", bind::train, bind::train_names);
    bind::define(m, "infer", bind::infer, bind::infer_names);
    bind::define(m, "grad", bind::grad, bind::grad_names);
    bind::define(m, "moments", bind::moments, bind::moments_names);
    bind::define(m, "group_norm", bind::group_norm, bind::group_norm_names);
    bind::define(m, "group_norm_grad", bind::group_norm_grad, bind::group_norm_grad_names);
    bind::define(m, "layer_norm", bind::layer_norm, bind::layer_norm_names);
    bind::define(m, "layer_norm_grad", bind::layer_norm_grad, bind::layer_norm_grad_names);
    bind::define_torch_functions(m);
    m.attr("Callback") = bind::callback_type();
    m.def("empty", &bind::empty,
          "empty(shape, dtype, /)\n--\n\nAn array with undefined values, in memory of the output pool.");
    m.def("get_num_threads", &get_num_threads, "get_num_threads()\n--\n\n");
    m.def(
        "set_num_threads", [](std::optional<int> n) { set_num_threads(n.value_or(0)); },
        "set_num_threads(n, /)\n--\n\nNone: back to the default.");
    m.def("build_info", &bind::build_info, "build_info()\n--\n\n");
    m.def("clear_memory", &clear_memory, "clear_memory()\n--\n\n");
    m.def("set_memory_limit", &set_memory_limit, "set_memory_limit(limit_bytes, /)\n--\n\n");
    m.def(
        "_connect_tf", [](const std::string& path) { return tf::connect(path.c_str()); },
        "_connect_tf(path, /)\n--\n\nGives the core to the TensorFlow op's library. Returns \"\" or the reason why "
        "not.");
    m.def("_jax_handlers", &bind::jax_handlers, "_jax_handlers()\n--\n\nCapsules by the name of the custom call.");
    m.def("_jax_query", &bind::jax_query,
          "_jax_query()\n--\n\nXLA's last query for a handler's metadata: whether there was one, its API version, and "
          "\"\" or why the handlers can't run with it.");
    m.def("_set_isa", [](std::optional<std::string> name) { set_isa(name.value_or("")); }, "_set_isa(name, /)\n--\n\n");
    m.def(
        "_set_serial_bytes", [](std::optional<std::int64_t> n) { set_serial_bytes(n.value_or(-1)); },
        "_set_serial_bytes(n, /)\n--\n\n");
    m.def("_set_full_team", &set_full_team, "_set_full_team(wait, /)\n--\n\n");
    m.def("_buffer_fault", &bind::buffer_fault, "_buffer_fault(object, /)\n--\n\n");
    m.def("_last_run", [] { return py::make_tuple(last_isa(), last_team_size()); }, "_last_run()\n--\n\n");
    m.def("_fp_mode", &fp_mode, "_fp_mode()\n--\n\n");
    m.def("_set_fp_mode", &set_fp_mode, "_set_fp_mode(mode, /)\n--\n\n");
}
