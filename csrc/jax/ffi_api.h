// The part of XLA's C API for foreign functions (xla/ffi/api/c_api.h) that bnfast's handlers read and call. It is
// declared here, so that building needs no jaxlib; nothing is linked or looked up, because each call brings its table
// of functions. The layouts are those of the API versions 0.1 (jaxlib 0.5.0) to 0.3 (jaxlib 0.10.2): what changed
// between them lies behind the members declared here. Enums are declared as int, which is what they are in memory.
//
// Each struct starts with the number of its bytes that the sender knows, and a list of extensions. A reader checks that
// number before it reads a member.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bnfast::jax {

inline constexpr int known_major = 0;  // another one may have any other layout behind `Version`

enum : int { extension_metadata = 1 };                      // Extension::type
enum : int { attribute_scalar = 3, attribute_string = 4 };  // Attributes::types
enum : int { argument_buffer = 1 };                         // Buffers::types
enum : int { stage_execute = 3 };                           // Frame::stage
enum : int { type_s64 = 5, type_u32 = 8, type_f16 = 10, type_f32 = 11, type_f64 = 12, type_bf16 = 16 };
enum : int { code_invalid_argument = 3, code_resource_exhausted = 8, code_failed_precondition = 9, code_internal = 13 };

struct Extension {
    std::size_t bytes;
    int type;
    Extension* next;
};

struct Version {
    std::size_t bytes;
    Extension* extensions;
    int major_number, minor_number;
};

struct Metadata {  // what a handler says about itself
    std::size_t bytes;
    Version version;  // of the API that the handler was made for
    std::uint32_t traits;
};

struct MetadataExtension {  // of a frame that asks for the metadata and runs nothing
    Extension base;
    Metadata* metadata;
};

struct Error;  // owned by XLA once it is returned

struct NewError {
    std::size_t bytes;
    Extension* extensions;
    const char* message;  // null-terminated; copied
    int code;
};

struct Api {
    std::size_t bytes;
    Extension* extensions;
    Version version;
    const void* internal;
    Error* (*new_error)(NewError*);
};

struct Buffer {
    std::size_t bytes;
    Extension* extensions;
    int type;
    void* data;
    std::int64_t rank;
    const std::int64_t* dims;
};

struct Buffers {  // arguments or results
    std::size_t bytes;
    Extension* extensions;
    std::int64_t count;
    const int* types;
    void* const* items;  // Buffer*, where the type is argument_buffer
};

struct Text {
    const char* data;  // no terminating null
    std::size_t length;
};

struct Scalar {
    int type;
    const void* value;
};

struct Attributes {  // sorted by name
    std::size_t bytes;
    Extension* extensions;
    std::int64_t count;
    const int* types;
    const Text* const* names;
    const void* const* items;  // Scalar* or Text*, as the type says
};

struct Frame {
    std::size_t bytes;
    Extension* extensions;
    const Api* api;
    void* context;
    int stage;
    Buffers arguments, results;
    Attributes attributes;
};

using Handler = Error*(Frame*) noexcept;

}  // namespace bnfast::jax
