// The threads that PyTorch's own operations run on, and whether calls of bnfast.torch run on them, too.
#pragma once
#include "../cpu/parallel.h"

namespace bnfast::bind {

// Whether they do from now on. False although it is wanted: PyTorch has another engine, it can't be told which of
// several OpenMP libraries it uses, or their threads have too little stack.
bool borrow_torch_threads(bool wanted);

const OpenmpLibrary* lender_of_threads();  // null: calls run on threads of our own

}  // namespace bnfast::bind
