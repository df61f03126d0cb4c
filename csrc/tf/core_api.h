// How the TensorFlow op reaches the core that Python has loaded: _core passes a table of functions once. The op's
// library therefore has no kernels and no threads of its own. NumPy callers and the op share one team of threads, one
// scratch buffer per thread and one choice of instruction set. No exception crosses from one library into the other.
#pragma once
#include <cstddef>

#include "bnfast/bnfast.h"

namespace bnfast::tf {

enum class Outcome : int { fine, bad_argument, out_of_memory, failed };

struct Message {
    char text[512];  // null-terminated; the error, unless the outcome is fine
};

struct CoreApi {
    // Both libraries must come from one build. These four members detect a mismatch.
    const char* version;
    std::size_t train_args_bytes, infer_args_bytes, grad_args_bytes;

    Outcome (*shape_of)(const std::int64_t* dims, int rank, int axis, Shape&, Message&) noexcept;
    Outcome (*train)(const TrainArgs&, Message&) noexcept;
    Outcome (*infer)(const InferArgs&, Message&) noexcept;
    Outcome (*grad)(const GradArgs&, Message&) noexcept;
};

// The op's library exports this function as "bnfast_connect". It returns null, or why it can't work with the table.
using Connect = const char* (*)(const CoreApi*);

// In _core: connects the op's library, which TensorFlow has loaded from `path`. Returns "" or the reason why not.
std::string connect(const char* path);

}  // namespace bnfast::tf
