// DLPack as far as CUDA arrays need it: the two capsules that a producer may hand out,
// read without consuming them, and one for memory of ours.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "dlpack.h"

namespace bnfast::bind {

namespace py = pybind11;

struct VersionedTensor {  // in a capsule named dltensor_versioned
    std::uint32_t major, minor;
    void* context;
    void (*deleter)(VersionedTensor*);
    std::uint64_t flags;  // 1: read-only
    dlpack::Tensor tensor;
};

// (pointer, shape, strides or None, type code, bits, lanes, device type, device number, read-only)
inline py::tuple read_dlpack(const py::object& capsule) {
    const dlpack::Tensor* t = nullptr;
    bool read_only = false;
    if (PyCapsule_IsValid(capsule.ptr(), dlpack::capsule_name)) {
        t = &static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name))->tensor;
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
        const auto* m = static_cast<VersionedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
        if (m->major != dlpack::major_version)
            throw py::value_error("DLPack version 1 is known. Received: " + std::to_string(m->major));
        t = &m->tensor;
        read_only = (m->flags & 1) != 0;
    } else {
        throw py::type_error("__dlpack__ must return a capsule named dltensor");
    }
    if (t->ndim < 0 || (t->ndim > 0 && !t->shape))
        throw py::type_error("__dlpack__ must return a tensor with ndim >= 0 and a shape. Received: ndim = " +
                             std::to_string(t->ndim) + (t->shape ? "" : " and no shape"));
    const auto extents = [&](const std::int64_t* from) {
        py::tuple all(t->ndim);
        for (int i = 0; i < t->ndim; ++i) all[std::size_t(i)] = from[i];
        return all;
    };
    const py::object strides = t->strides ? py::object(extents(t->strides)) : py::none();
    const auto at = reinterpret_cast<std::uintptr_t>(t->data) + t->byte_offset;
    return py::make_tuple(at, extents(t->shape), strides, t->code, t->bits, t->lanes, t->device_type, t->device_id,
                          read_only);
}

// A capsule over memory that `owner` keeps alive.
inline py::object make_dlpack(const py::object& owner, std::uintptr_t at, const std::vector<std::int64_t>& shape,
                              int code, int bits, int device) {
    struct Managed : dlpack::ManagedTensor {
        std::vector<std::int64_t> extents, steps;
        PyObject* owner;
    };
    auto made = std::make_unique<Managed>();
    made->extents = made->steps = shape;
    auto* m = made.release();
    std::int64_t step = 1;
    for (std::size_t i = shape.size(); i-- > 0; step *= shape[i]) m->steps[i] = step;
    m->tensor = {reinterpret_cast<void*>(at),
                 2,
                 device,
                 std::int32_t(shape.size()),
                 std::uint8_t(code),
                 std::uint8_t(bits),
                 1,
                 m->extents.data(),
                 m->steps.data(),
                 0};
    m->owner = owner.inc_ref().ptr();
    m->deleter = [](dlpack::ManagedTensor* self) {
        py::gil_scoped_acquire gil;
        auto* managed = static_cast<Managed*>(self);
        Py_DECREF(managed->owner);
        delete managed;
    };
    PyObject* capsule =
        PyCapsule_New(static_cast<dlpack::ManagedTensor*>(m), dlpack::capsule_name, [](PyObject* unused) {
            if (!PyCapsule_IsValid(unused, dlpack::capsule_name))
                return;  // consumed: its name is another, its consumer frees it
            auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(unused, dlpack::capsule_name));
            managed->deleter(managed);
        });
    if (!capsule) {
        m->deleter(m);
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace bnfast::bind
