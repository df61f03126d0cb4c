// What TensorFlow runs for BnfastTrain and BnfastGrad; ops.cpp says what goes in and comes out, and in which order.
// A kernel keeps nothing between calls, writes nothing but its outputs, and takes no lock.
#pragma once
#include "attributes.h"

namespace bnfast::tf {

void train(const Attributes& attributes, TF_OpKernelContext* context);
void grad(const Attributes& attributes, TF_OpKernelContext* context);

}  // namespace bnfast::tf
