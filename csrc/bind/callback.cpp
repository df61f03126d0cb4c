#include "callback.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <utility>

#include "batch_norm.h"
#include "bnfast/bnfast.h"

namespace bnfast::bind {
namespace {

namespace py = pybind11;

std::size_t position_of(const std::string& name, Names names) {
    const std::size_t at = names.find(name);
    if (at == names.count) throw py::value_error("no argument of this name. Received: " + name);
    return at;
}

// From here on all arguments are arrays to write, with the dtype of the first argument.
constexpr std::size_t train_outputs = position(train_names, "out"), grad_outputs = position(grad_names, "out");

template <class... Handles, std::size_t... i>
py::object call(py::object (*kernel)(Handles...), const std::vector<py::handle>& a, std::index_sequence<i...>) {
    return kernel(a[i]...);
}
template <class... Handles> py::object call(py::object (*kernel)(Handles...), const std::vector<py::handle>& a) {
    return call(kernel, a, std::index_sequence_for<Handles...>());
}

}  // namespace

Callback::Callback(const std::string& kernel, const std::vector<std::string>& names, const py::dict& constants,
                   py::object fallback)
    : is_train_(kernel == "train"), fallback_(std::move(fallback)) {
    if (!is_train_ && kernel != "grad") throw py::value_error("kernel must be train or grad. Received: " + kernel);
    const Names all = is_train_ ? Names(train_names) : Names(grad_names);
    constants_.assign(all.count, py::none());
    for (const std::string& name : names) positions_.push_back(position_of(name, all));
    for (const auto& [name, value] : constants)
        constants_[position_of(name.cast<std::string>(), all)] = py::reinterpret_borrow<py::object>(value);
}

std::vector<py::handle> Callback::arguments(const py::args& arrays, std::vector<py::object>& outs) const {
    if (arrays.size() != positions_.size())
        throw py::type_error("the number of arrays must be " + std::to_string(positions_.size()) +
                             ", one per name. Received: " + std::to_string(arrays.size()));
    std::vector<py::handle> a(constants_.begin(), constants_.end());
    for (std::size_t i = 0; i < positions_.size(); ++i) a[positions_[i]] = arrays[i];
    for (std::size_t i = is_train_ ? train_outputs : grad_outputs; i < a.size(); ++i) {
        if (a[i].is_none()) continue;
        outs.push_back(a[i].attr("view")(a.front().attr("dtype")));
        a[i] = outs.back();
    }
    return a;
}

py::object Callback::train_on(const py::args& arrays) const {
    constexpr std::size_t moving_mean = position(train_names, "moving_mean"),
                          moving_variance = position(train_names, "moving_variance");
    std::vector<py::object> outs;
    std::vector<py::handle> a = arguments(arrays, outs);
    py::list moved;
    if (!a[moving_mean].is_none()) {
        moved.append(a[moving_mean].attr("copy")());
        moved.append(a[moving_variance].attr("copy")());
        a[moving_mean] = moved[0].ptr();
        a[moving_variance] = moved[1].ptr();
    }
    const py::object result = call(train, a);
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
    const std::vector<py::handle> a = arguments(arrays, outs);
    const py::object result = call(grad, a);
    if (result.is_none()) return result;
    const py::tuple r = result;  // dx, dgamma, dbeta, dresidual
    py::list made;
    made.append(r[0]);
    constexpr std::size_t gamma = position(grad_names, "gamma"), beta = position(grad_names, "beta"),
                          y = position(grad_names, "y"), residual = position(grad_names, "residual");
    for (const auto& [i, at] : {std::pair{1, gamma}, {2, beta}, {3, y}, {3, residual}}) {
        if (a[at].is_none()) continue;
        const py::dtype wanted = py::reinterpret_borrow<py::array>(a[at]).dtype();  // grad makes dbeta in gamma's dtype
        const py::array gradient = r[i];
        made.append(gradient.dtype().is(wanted) ? gradient : py::array(gradient.attr("astype")(wanted)));
    }
    return made;
}

py::object Callback::operator()(const py::args& arrays) const {
    const py::object result = is_train_ ? train_on(arrays) : grad_on(arrays);
    return result.is_none() ? fallback_(*arrays) : result;
}

// ---- the Python type
// -------------------------------------------------------------------------------------------------

namespace {

struct Object {
    PyObject_HEAD Callback* callback;
};

// The result of f, or null with the Python error of its exception.
template <class F> PyObject* guarded(F f) {
    try {
        return f();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::cast_error&) {
        PyErr_SetString(PyExc_TypeError, "Callback takes a string, a sequence of strings, a dict and a function");
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const NonFiniteError& error) {
        PyErr_SetString(PyExc_FloatingPointError, error.what());
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

bool has_keywords(PyObject* keywords) {
    if (!keywords || PyDict_Size(keywords) == 0) return false;
    PyErr_SetString(PyExc_TypeError, "Callback takes no keyword arguments");
    return true;
}

PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
    PyObject *kernel, *names, *constants, *fallback;
    if (has_keywords(keywords) ||
        !PyArg_ParseTuple(arguments, "UOO!O:Callback", &kernel, &names, &PyDict_Type, &constants, &fallback))
        return nullptr;
    PyObject* const self = type->tp_alloc(type, 0);
    if (!self) return nullptr;
    PyObject* const made = guarded([&] {
        reinterpret_cast<Object*>(self)->callback = new Callback(
            py::cast<std::string>(py::handle(kernel)), py::cast<std::vector<std::string>>(py::handle(names)),
            py::reinterpret_borrow<py::dict>(constants), py::reinterpret_borrow<py::object>(fallback));
        return self;
    });
    if (!made) Py_DECREF(self);
    return made;
}

void destroy(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    delete reinterpret_cast<Object*>(self)->callback;
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject* call_object(PyObject* self, PyObject* arrays, PyObject* keywords) {
    if (has_keywords(keywords)) return nullptr;
    return guarded([&] {
        const Callback& callback = *reinterpret_cast<Object*>(self)->callback;
        return callback(py::reinterpret_borrow<py::args>(arrays)).release().ptr();
    });
}

}  // namespace

py::object callback_type() {
    static const char doc[] =
        "Callback(kernel, names, constants, fallback, /)\n--\n\n"
        "train or grad on arrays in a fixed order, for tf.numpy_function.";
    static PyType_Slot slots[] = {{Py_tp_doc, const_cast<char*>(doc)},
                                  {Py_tp_new, reinterpret_cast<void*>(create)},
                                  {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                                  {Py_tp_call, reinterpret_cast<void*>(call_object)},
                                  {0, nullptr}};
    static PyType_Spec spec = {"bnfast._core.Callback", sizeof(Object), 0, Py_TPFLAGS_DEFAULT, slots};
    PyObject* const type = PyType_FromSpec(&spec);
    if (!type) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(type);
}

}  // namespace bnfast::bind
