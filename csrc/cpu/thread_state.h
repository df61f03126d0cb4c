// What the calling thread keeps between calls: its scratch buffer, and what its last call ran on.
//
// It lies behind a POSIX key and not in `thread_local` variables: the first access to one of those, in a library that
// was loaded at run time, allocates inside the C library, which ends the process when there is no memory, and so does
// registering a destructor. Here the lack of memory is a null pointer.
#pragma once
#include <cstddef>

namespace bnfast {

struct OpenmpLibrary;  // parallel.h

struct ThreadState {
    double* scratch = nullptr;
    std::size_t scratch_doubles = 0;
    const char* isa = "";
    int team_size = 1;
    const OpenmpLibrary* lender = nullptr;  // whose threads take part in this thread's jobs; null: our own
};
ThreadState* thread_state() noexcept;  // null: there is no memory for it, and a later call may find some

}  // namespace bnfast
