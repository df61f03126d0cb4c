// The attributes of BnfastTrain and BnfastGrad, read once when TensorFlow builds a kernel; read-only afterwards, so one
// kernel may run on many threads at once. TensorFlow's float attributes hold 32 bits, hence the bits of a float64 as
// int.
#pragma once
#include "call.h"

namespace bnfast::tf {

struct Attributes {
    std::int64_t axis = -1;
    double epsilon = 0, momentum = 0, negative_slope = 0;  // epsilon, momentum: BnfastTrain's
    Activation activation = Activation::none;
    int correction = 0;  // this and the next: BnfastTrain's
    NanPolicy nan_policy = NanPolicy::propagate;
    int type = 0, parameter_type = 0;  // TF_DataType of x; BnfastGrad: of dgamma and dbeta
    // How many of each there are, 0 or 1: the inputs that are missing have no place either.
    bool gamma = false, beta = false, mask = false;
    bool residual_or_y = false;  // BnfastTrain: residual; BnfastGrad: y, and dresidual
    bool statistics = false;     // BnfastGrad: gradients of mean and variance arrive
};

Attributes train_attributes(TF_OpKernelConstruction* context);
Attributes grad_attributes(TF_OpKernelConstruction* context);

}  // namespace bnfast::tf
