// How the TensorFlow op reaches the core that Python has loaded: a table of functions, handed over once by _core.
// So the op's library holds no kernel and no thread pool of its own: NumPy callers and the op share one team of
// threads, one scratch a thread, one choice of instruction set. No exception crosses from one library into the other.
#pragma once
#include <cstddef>

#include "bnfast/bnfast.h"

namespace bnfast::tf {

enum class Outcome : int { fine, bad_argument, out_of_memory, failed };

struct Message {
    char text[512];  // terminated; what went wrong, where the outcome isn't fine
};

struct CoreApi {
    // Both libraries are built together; these three tell when they weren't.
    const char* version;
    std::size_t train_args_bytes, grad_args_bytes;

    Outcome (*shape_of)(const std::int64_t* dims, int rank, int axis, Shape&, Message&) noexcept;
    Outcome (*train)(const TrainArgs&, Message&) noexcept;
    Outcome (*grad)(const GradArgs&, Message&) noexcept;
};

// The op's library exports this under the name "bnfast_connect"; it returns null, or why it can't work with the table.
using Connect = const char* (*)(const CoreApi*);

// In _core: connects the op's library, which TensorFlow has loaded from `path`. Empty, or the reason why not.
std::string connect(const char* path);

}  // namespace bnfast::tf
