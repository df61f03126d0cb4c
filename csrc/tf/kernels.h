// The compute functions of the three ops; signatures.h has their inputs and outputs. They keep no state
// between calls, write only their outputs, and take no lock.
#pragma once
#include "attributes.h"

namespace bnfast::tf {

void train(const Attributes& attributes, TF_OpKernelContext* context);
void infer(const Attributes& attributes, TF_OpKernelContext* context);
void grad(const Attributes& attributes, TF_OpKernelContext* context);

}  // namespace bnfast::tf
