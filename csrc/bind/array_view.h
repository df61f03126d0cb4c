// NumPy arrays as the core sees them: pointer, shape, dtype. Nothing is converted here. The fast path accepts
// contiguous, aligned arrays of the right dtype and shape (exact ndarrays in the machine's byte order); for anything
// else the binding returns None, and its Python side converts the argument or raises the error.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "cpu/memory.h"
#include "bnfast/bnfast.h"

namespace bnfast::bind {

namespace py = pybind11;

struct Declined {};  // thrown and caught inside the binding: the function returns None

// Leaves the fast path, so that the function returns None, unless the condition holds.
inline void decline_unless(bool accepted) {
    if (!accepted) throw Declined{};
}

inline std::optional<DType> dtype_of(const py::dtype& d) {
    static int bfloat16_num = -1;  // ml_dtypes registers it at run time, above NumPy's own numbers
    const int num = d.num();
    if (d.byteorder() != '=' && d.byteorder() != '|') return std::nullopt;
    if (num == py::detail::npy_api::NPY_FLOAT_) return DType::float32;
    if (num == py::detail::npy_api::NPY_DOUBLE_) return DType::float64;
    if (num == 23) return DType::float16;  // NPY_HALF
    if (num == bfloat16_num) return DType::bfloat16;
    if (num >= 256 && bfloat16_num < 0 && d.itemsize() == 2 && d.attr("name").cast<std::string>() == "bfloat16") {
        bfloat16_num = num;
        return DType::bfloat16;
    }
    return std::nullopt;
}

constexpr int c_contiguous = 0x1, aligned = 0x100, writeable = 0x400;  // NumPy's flags

constexpr std::int64_t bytes_per_value(DType d) { return d == DType::float64 ? 8 : d == DType::float32 ? 4 : 2; }

struct ArrayView {
    void* data = nullptr;
    const py::ssize_t* dims = nullptr;  // null: the optional argument is absent
    int rank = 0;
    std::int64_t size = 1;
    DType dtype = DType::float32;

    ArrayView() = default;
    ArrayView(py::handle h, int flags) {
        // Not a static: the first npy_api::get() releases the GIL, and a thread waiting for the static would hold it.
        const PyTypeObject* const ndarray = py::detail::npy_api::get().PyArray_Type_;
        decline_unless(Py_TYPE(h.ptr()) == ndarray);
        const auto* a = py::detail::array_proxy(h.ptr());
        decline_unless((a->flags & flags) == flags);
        const auto known = dtype_of(py::reinterpret_borrow<py::array>(h).dtype());
        decline_unless(known.has_value());
        data = a->data;
        dims = a->dimensions;
        rank = a->nd;
        for (int i = 0; i < rank; ++i) size *= dims[i];
        dtype = *known;
    }
    std::int64_t bytes() const { return size * bytes_per_value(dtype); }
    bool same_shape(const ArrayView& o) const {
        return rank == o.rank && std::memcmp(dims, o.dims, sizeof(*dims) * std::size_t(rank)) == 0;
    }
    bool overlaps(const ArrayView& o) const {
        const auto a = reinterpret_cast<std::uintptr_t>(data), b = reinterpret_cast<std::uintptr_t>(o.data);
        return data && o.data && a < b + std::uintptr_t(o.bytes()) && b < a + std::uintptr_t(bytes());
    }
};

inline ArrayView input(py::handle h) { return {h, c_contiguous | aligned}; }
inline ArrayView output(py::handle h) { return {h, c_contiguous | aligned | writeable}; }
inline ArrayView optional_input(py::handle h) { return h.is_none() ? ArrayView{} : input(h); }

// An optional tensor of x's shape and dtype.
inline ArrayView optional_like(py::handle h, const ArrayView& x) {
    if (h.is_none()) return {};
    const ArrayView view = input(h);
    decline_unless(view.same_shape(x) && view.dtype == x.dtype);
    return view;
}

inline void require_vector(const ArrayView& v, std::int64_t C) {
    decline_unless(v.rank == 1 && v.size == C && (v.dtype == DType::float32 || v.dtype == DType::float64));
}
inline ConstVector vector(const ArrayView& v, std::int64_t C) {
    if (!v.dims) return {};
    require_vector(v, C);
    return {v.data, v.dtype};
}

inline void* data_of(const py::array& a) { return py::detail::array_proxy(a.ptr())->data; }

// ---- outputs: memory from the pool, owned by the array through a capsule -----------------------------------------

// Takes the block over, also where no capsule can be made.
inline py::capsule owned_block(void* block) {
    try {
        return py::capsule(block, [](void* p) { release_block(p); });
    } catch (...) {
        release_block(block);
        throw;
    }
}

inline py::array new_array(const py::dtype& dtype, const py::ssize_t* dims, int rank, std::int64_t bytes) {
    std::vector<py::ssize_t> shape(dims, dims + rank);
    void* block = acquire_block(std::size_t(bytes));
    const py::capsule owner = owned_block(block);
    return py::array(dtype, std::move(shape), block, owner);
}

// n vectors of C doubles in one block. Each starts on a new cache line, so that no two vectors share one.
template <int n> struct Vectors {
    double* data[n];
    py::array arrays[n];
    explicit Vectors(std::int64_t C) {
        const std::int64_t stride = round_up_to_line(C);
        auto* block = static_cast<double*>(acquire_block(std::size_t(n * stride * 8)));
        const py::capsule owner = owned_block(block);
        for (int i = 0; i < n; ++i) {
            data[i] = block + i * stride;
            arrays[i] = py::array(py::dtype::of<double>(), std::vector<py::ssize_t>{py::ssize_t(C)}, data[i], owner);
        }
    }
};

// ---- scalars and strings -----------------------------------------------------------------------------------------

inline double number(py::handle h) {
    decline_unless(PyFloat_Check(h.ptr()) || (PyLong_Check(h.ptr()) && !PyBool_Check(h.ptr())));
    const double value = PyFloat_AsDouble(h.ptr());
    if (value == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        throw Declined{};
    }
    return value;
}
inline double number_in(py::handle h, double low, double high) {
    const double value = number(h);
    decline_unless(value >= low && value <= high);
    return value;
}
inline int integer(py::handle h) {
    decline_unless(PyLong_CheckExact(h.ptr()));
    int overflow = 0;
    const long value = PyLong_AsLongAndOverflow(h.ptr(), &overflow);
    decline_unless(!overflow && value >= -64 && value <= 64);
    return int(value);
}
inline bool boolean(py::handle h) {
    decline_unless(h.ptr() == Py_True || h.ptr() == Py_False);
    return h.ptr() == Py_True;
}
// The index of the string h among the choices.
template <int n> int choice(py::handle h, const char* const (&choices)[n]) {
    decline_unless(PyUnicode_Check(h.ptr()));
    for (int i = 0; i < n; ++i)
        if (PyUnicode_CompareWithASCIIString(h.ptr(), choices[i]) == 0) return i;
    throw Declined{};
}
inline Activation activation_of(py::handle h) {
    static constexpr const char* names[] = {"relu",    "relu6",        "leaky_relu", "silu", "hard_silu",
                                            "sigmoid", "hard_sigmoid", "tanh",       "gelu", "gelu_tanh",
                                            "elu",     "selu",         "softplus",   "mish"};
    return h.is_none() ? Activation::none : Activation(1 + choice(h, names));
}
inline NanPolicy nan_policy_of(py::handle h) {
    static constexpr const char* names[] = {"propagate", "skip_update", "raise"};
    return NanPolicy(choice(h, names));
}

inline Shape shape_along(const ArrayView& x, py::handle axis) {
    const int at = integer(axis);
    decline_unless(x.rank >= 1 && at >= -x.rank && at < x.rank);
    static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t), "64-bit extents");
    return shape_of(reinterpret_cast<const std::int64_t*>(x.dims), x.rank, at);
}

// N*S weights in the compute dtype of x. The Python side has checked their values.
inline const void* weights(py::handle h, const ArrayView& x, const Shape& s) {
    if (h.is_none()) return nullptr;
    const ArrayView w = input(h);
    const DType compute = x.dtype == DType::float64 ? DType::float64 : DType::float32;
    decline_unless(w.size == s.per_channel() && w.dtype == compute);
    return w.data;
}

}  // namespace bnfast::bind
