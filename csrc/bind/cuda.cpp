// The Python module bnfast._cuda: the calls of bnfast/cuda.h on addresses of device memory, and what the driver says.
// bnfast.cuda has checked the arrays before. Needs no CUDA toolkit to build, and no driver to be imported.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bnfast/cuda.h"
#include "cuda/compiler.h"
#include "cuda/driver.h"
#include "cuda/image_cache.h"
#include "call.h"
#include "dlpack_capsules.h"

namespace bnfast::bind {
namespace {

using Address = std::uintptr_t;
using VectorAt = std::optional<std::pair<Address, bool>>;  // address, whether float64; None: absent

void* pointer(Address at) { return reinterpret_cast<void*>(at); }

template <class V> V vector_at(const VectorAt& v) {
    if (!v) return {};
    return {pointer(v->first), v->second ? DType::float64 : DType::float32};
}

// Where a call runs: the device, its stream, and a function of a number of bytes that returns the address of scratch.
struct Place {
    int device;
    Address stream;
    py::function scratch;
};

// scratch is asked for with the GIL; a first launch may compile for seconds without it.
template <class Args>
void launch(const Place& place, const Args& args, void (*call)(const Args&, const cuda::Launch&)) {
    std::size_t bytes = 0;
    {
        const cuda::DeviceGuard guard(place.device);
        bytes = cuda::scratch_bytes(args);
    }
    cuda::Launch l{pointer(place.stream), bytes ? pointer(place.scratch(bytes).template cast<Address>()) : nullptr};
    without_gil([&] {
        const cuda::DeviceGuard guard(place.device);
        call(args, l);
    });
}

void train(int device, Address stream, const py::function& scratch, Address x, Address y, Address residual,
           const std::array<std::int64_t, 3>& shape, int dtype, const VectorAt& gamma, const VectorAt& beta,
           const VectorAt& moving_mean, const VectorAt& moving_variance, double momentum, double epsilon,
           int activation, double negative_slope, int correction, bool skip_update, Address mean, Address variance,
           Address invstd) {
    TrainArgs a;
    a.x = pointer(x);
    a.y = pointer(y);
    a.residual = pointer(residual);
    a.shape = {shape[0], shape[1], shape[2]};
    a.dtype = DType(dtype);
    a.gamma = vector_at<ConstVector>(gamma);
    a.beta = vector_at<ConstVector>(beta);
    a.moving_mean = vector_at<Vector>(moving_mean);
    a.moving_variance = vector_at<Vector>(moving_variance);
    a.momentum = momentum;
    a.epsilon = epsilon;
    a.activation = Activation(activation);
    a.negative_slope = negative_slope;
    a.correction = correction;
    a.nan_policy = skip_update ? NanPolicy::skip_update : NanPolicy::propagate;
    a.mean = static_cast<double*>(pointer(mean));
    a.variance = static_cast<double*>(pointer(variance));
    a.invstd = static_cast<double*>(pointer(invstd));
    launch<TrainArgs>({device, stream, scratch}, a, cuda::train);
}

void infer(int device, Address stream, const py::function& scratch, Address x, Address y, Address residual,
           const std::array<std::int64_t, 3>& shape, int dtype, const VectorAt& moving_mean,
           const VectorAt& moving_variance, const VectorAt& gamma, const VectorAt& beta, double epsilon, int activation,
           double negative_slope) {
    InferArgs a;
    a.x = pointer(x);
    a.y = pointer(y);
    a.residual = pointer(residual);
    a.shape = {shape[0], shape[1], shape[2]};
    a.dtype = DType(dtype);
    a.moving_mean = vector_at<ConstVector>(moving_mean);
    a.moving_variance = vector_at<ConstVector>(moving_variance);
    a.gamma = vector_at<ConstVector>(gamma);
    a.beta = vector_at<ConstVector>(beta);
    a.epsilon = epsilon;
    a.activation = Activation(activation);
    a.negative_slope = negative_slope;
    launch<InferArgs>({device, stream, scratch}, a, cuda::infer);
}

void grad(int device, Address stream, const py::function& scratch, Address dy, Address x, Address dx, Address residual,
          Address y, Address dresidual, const std::array<std::int64_t, 3>& shape, int dtype, const VectorAt& mean,
          const VectorAt& invstd, const VectorAt& gamma, const VectorAt& beta, int activation, double negative_slope,
          bool training, const VectorAt& dmean, const VectorAt& dvariance, const VectorAt& dgamma,
          const VectorAt& dbeta) {
    GradArgs a;
    a.dy = pointer(dy);
    a.x = pointer(x);
    a.dx = pointer(dx);
    a.residual = pointer(residual);
    a.y = pointer(y);
    a.dresidual = pointer(dresidual);
    a.shape = {shape[0], shape[1], shape[2]};
    a.dtype = DType(dtype);
    a.mean = vector_at<ConstVector>(mean);
    a.invstd = vector_at<ConstVector>(invstd);
    a.gamma = vector_at<ConstVector>(gamma);
    a.beta = vector_at<ConstVector>(beta);
    a.activation = Activation(activation);
    a.negative_slope = negative_slope;
    a.training = training;
    a.dmean = vector_at<ConstVector>(dmean);
    a.dvariance = vector_at<ConstVector>(dvariance);
    a.dgamma = vector_at<Vector>(dgamma);
    a.dbeta = vector_at<Vector>(dbeta);
    launch<GradArgs>({device, stream, scratch}, a, cuda::grad);
}

void moments(int device, Address stream, const py::function& scratch, Address x,
             const std::array<std::int64_t, 3>& shape, int dtype, Address mean, Address variance) {
    MomentsArgs a;
    a.x = pointer(x);
    a.shape = {shape[0], shape[1], shape[2]};
    a.dtype = DType(dtype);
    a.mean = static_cast<double*>(pointer(mean));
    a.variance = static_cast<double*>(pointer(variance));
    launch<MomentsArgs>({device, stream, scratch}, a, cuda::moments);
}

std::vector<std::string> load(int device, int call, const std::array<std::int64_t, 3>& shape, int dtype, int activation,
                              double negative_slope) {
    std::vector<std::string> loaded;
    without_gil([&] {
        const cuda::DeviceGuard guard(device);
        loaded = cuda::load(cuda::Call(call), {shape[0], shape[1], shape[2]}, DType(dtype), Activation(activation),
                            negative_slope);
    });
    return loaded;
}

// Memory of a device: its address, and a capsule that frees it in the order of its stream. No class, because pybind11
// can't make an object of one without host memory (it crashes).
py::tuple allocate(int device, std::size_t bytes, Address stream) {
    struct Memory {
        int device;
        Address stream;
        void* at;
        ~Memory() {
            if (!at) return;
            try {
                const cuda::DeviceGuard guard(device);
                cuda::release(at, pointer(stream));
            } catch (const cuda::Error&) {  // the driver is gone, and its memory with it
            }
        }
    };
    auto memory = std::make_unique<Memory>(Memory{device, stream, nullptr});
    py::capsule owner(memory.get(), [](void* m) { delete static_cast<Memory*>(m); });
    Memory& owned = *memory.release();
    py::tuple result = py::make_tuple(py::none(), owner);
    if (bytes) {
        const cuda::DeviceGuard guard(device);
        owned.at = cuda::allocate(bytes, pointer(stream));
    }
    result[0] = py::int_(reinterpret_cast<Address>(owned.at));
    return result;
}

py::bytes read(int device, Address from, std::size_t bytes, Address stream) {
    std::string values(bytes, '\0');
    without_gil([&] {
        const cuda::DeviceGuard guard(device);
        if (bytes) cuda::read_back(values.data(), pointer(from), bytes, pointer(stream));
    });
    return values;
}

void write(int device, Address to, const std::string& values, Address stream) {
    without_gil([&] {
        const cuda::DeviceGuard guard(device);
        if (!values.empty()) cuda::write(pointer(to), values.data(), values.size(), pointer(stream));
    });
}

void copy(int device, Address to, Address from, std::size_t bytes, Address stream) {
    const cuda::DeviceGuard guard(device);
    if (bytes) cuda::copy(pointer(to), pointer(from), bytes, pointer(stream));
}

bool is_capturing(int device, Address stream) {
    const cuda::DeviceGuard guard(device);
    return cuda::is_capturing(pointer(stream));
}

py::dict device(int number) {
    const cuda::Device& d = cuda::device_of(number);
    py::dict facts;
    facts["name"] = cuda::device_name(number);
    facts["architecture"] = d.architecture;
    facts["sms"] = d.limits.sms;
    facts["l2_bytes"] = d.limits.l2_bytes;
    facts["shared_bytes_per_block"] = d.limits.shared_per_block;
    return facts;
}

py::tuple cache_folder() {
    std::string reason;
    const std::string folder = cuda::cache_folder(&reason, false);
    return py::make_tuple(folder, reason);
}

}  // namespace
}  // namespace bnfast::bind

PYBIND11_MODULE(_cuda, m) {
    using namespace bnfast;
    namespace py = pybind11;
    py::register_exception<cuda::Error>(m, "CudaError", PyExc_RuntimeError);
    py::register_exception<cuda::CompilerError>(m, "CompilerError", PyExc_RuntimeError);
    py::options docstrings;
    docstrings.disable_function_signatures();
    m.def("train", &bind::train, "See csrc/bind/cuda.cpp.");
    m.def("infer", &bind::infer, "See csrc/bind/cuda.cpp.");
    m.def("grad", &bind::grad, "See csrc/bind/cuda.cpp.");
    m.def("moments", &bind::moments, "See csrc/bind/cuda.cpp.");
    m.def("load", &bind::load, "load(device, call, shape, dtype, activation, negative_slope, /)\n--\n\n");
    m.def("allocate", &bind::allocate,
          "allocate(device, bytes, stream, /)\n--\n\nThe address, 0 for no bytes, and what owns the memory.");
    m.def("read", &bind::read, "read(device, address, bytes, stream, /)\n--\n\nWaits.");
    m.def("write", &bind::write, "write(device, address, values, stream, /)\n--\n\nWaits.");
    m.def("copy", &bind::copy, "copy(device, to, from, bytes, stream, /)\n--\n\n");
    m.def("read_dlpack", &bind::read_dlpack, "read_dlpack(capsule, /)\n--\n\n");
    m.def("make_dlpack", &bind::make_dlpack, "make_dlpack(owner, address, shape, code, bits, device, /)\n--\n\n");
    m.def("is_capturing", &bind::is_capturing, "is_capturing(device, stream, /)\n--\n\n");
    m.def(
        "device_of_pointer", [](std::uintptr_t at) { return cuda::device_of_pointer(bind::pointer(at)); },
        "device_of_pointer(address, /)\n--\n\n-1: not of a device.");
    m.def("driver_version", &cuda::driver_version, "driver_version()\n--\n\n");
    m.def("device_count", &cuda::device_count, "device_count()\n--\n\n");
    m.def("device", &bind::device, "device(number, /)\n--\n\n");
    m.def("compiler_version", &cuda::compiler_version, "compiler_version()\n--\n\n");
    m.def("cache_folder", &bind::cache_folder, "cache_folder()\n--\n\nThe folder or \"\", and why there is none.");
    m.def("set_compiler_library", &cuda::set_compiler_library, "set_compiler_library(path, /)\n--\n\n");
    m.def("set_image_folder", &cuda::set_image_folder, "set_image_folder(path, /)\n--\n\n");
    m.def("_set_driver_library", &cuda::set_driver_library, "_set_driver_library(path, /)\n--\n\n");
}
