// A tensor of PyTorch, read through DLPack where it lies. As in array_view.h, what isn't on the fast path throws
// Declined. Accepted: exact instances of the types given to `connect`, in the CPU's memory, contiguous or
// channels_last.
#pragma once
#include "array_view.h"
#include "dlpack_view.h"

namespace bnfast::bind {

// Sets the two types whose instances are accepted, and how one is read.
void connect_torch(py::handle tensor, py::handle parameter);

class TorchTensor : public dlpack::View {
public:
    explicit TorchTensor(py::handle h);               // None: a tensor without data
    void* data_of_like(py::handle h) const;           // of another tensor that must be like this one; None: null
    void* data_of_required_like(py::handle h) const;  // the same, not None
};

// (C,) vectors of one call, contiguous; all share a dtype, that of x or float32 for a half type.
class TorchVectorReader {
public:
    TorchVectorReader(std::int64_t C, DType x) : C_(C), wanted_(x == DType::float64 ? x : DType::float32) {}
    // V: Vector or ConstVector. axes: the rank that the tensor must have, with C values in all. None: without data.
    template <class V> V read(py::handle h, int axes = 1) const {
        V v;
        v.data = data_of(h, axes);
        if (v.data) v.dtype = wanted_;
        return v;
    }

private:
    void* data_of(py::handle h, int axes) const;
    std::int64_t C_;
    DType wanted_;
};

}  // namespace bnfast::bind
