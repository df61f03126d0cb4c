// The part of DLPack's C interface (version 1) that is read here: https://dmlc.github.io/dlpack/latest/c_api.html
// Declared here, so that building needs neither DLPack nor a framework.
#pragma once
#include <cstdint>

namespace bnfast::bind::dlpack {

constexpr std::int32_t cpu = 1, cuda_host = 3;               // DLDeviceType: the CPU's memory, plain and pinned
constexpr std::uint8_t floating_point = 2, brain_float = 4;  // DLDataTypeCode
constexpr std::uint32_t major_version = 1;
constexpr const char *exchange_name = "dlpack_exchange_api", *capsule_name = "dltensor";

struct Tensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

// What `__dlpack__()` wraps in a capsule without a version: the tensor comes first, and the capsule frees it.
struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

// The type's attribute `__dlpack_c_exchange_api__`, a capsule, has this table.
struct ExchangeApi {
    std::uint32_t major, minor;
    ExchangeApi* previous;
    void *allocate, *from_object, *to_object;
    int (*view)(void* object, Tensor* out);  // non-owning; may be null; -1: a Python exception is set
    void* current_stream;
};

}  // namespace bnfast::bind::dlpack
