#include "torch_tensor.h"

namespace bnfast::bind {
namespace {

// Set once by connect_torch, never freed.
PyTypeObject *plain_tensor = nullptr, *plain_parameter = nullptr;
int (*fill_view)(void*, dlpack::Tensor*) = nullptr;  // null before PyTorch 2.10 or so: read through a capsule

dlpack::View read(const dlpack::Tensor& t) {
    const auto view = dlpack::view_of(t);
    decline_unless(view.has_value());
    return *view;
}

}  // namespace

void connect_torch(py::handle tensor, py::handle parameter) {
    fill_view = nullptr;
    if (py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
        const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
        auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::exchange_name));
        if (!api) throw py::error_already_set();
        while (api && api->major != dlpack::major_version) api = api->previous;
        if (api) fill_view = api->view;
    }
    plain_tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
    plain_parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
}

TorchTensor::TorchTensor(py::handle h) {
    if (h.is_none()) return;
    decline_unless(Py_TYPE(h.ptr()) == plain_tensor || Py_TYPE(h.ptr()) == plain_parameter);
    if (fill_view) {
        dlpack::Tensor t;
        if (fill_view(h.ptr(), &t) != 0) {
            PyErr_Clear();
            throw Declined{};
        }
        static_cast<dlpack::View&>(*this) = read(t);
        return;
    }
    // A tensor that requires a gradient must be detached first. The capsule owns the extents, the tensor the data.
    const py::object capsule = h.attr("detach")().attr("__dlpack__")();
    const auto* managed =
        static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name));
    if (!managed) throw py::error_already_set();
    static_cast<dlpack::View&>(*this) = read(managed->tensor);
}

void* TorchTensor::data_of_like(py::handle h) const {
    const TorchTensor t(h);
    if (!t) return nullptr;
    decline_unless(t.like(*this));
    return t.data;
}

void* TorchTensor::data_of_required_like(py::handle h) const {
    void* const found = data_of_like(h);
    decline_unless(found);
    return found;
}

void* TorchVectorReader::data_of(py::handle h, int axes) const {
    const TorchTensor t(h);
    if (!t) return nullptr;
    // A negated view (z.conj().imag) isn't contiguous, unless it has one value.
    decline_unless(t.size > 1 || !h.attr("is_neg")().cast<bool>());
    decline_unless(t.rank == axes && t.size == C_ && t.dtype == wanted_ && t.order == dlpack::Order::contiguous);
    return t.data;
}

}  // namespace bnfast::bind
