// The attributes of the three ops, read once when TensorFlow builds a kernel. They are read-only
// afterwards, so one kernel may run on many threads at once. TensorFlow's float attributes hold 32 bits; a float64
// therefore travels as an int attribute with the same bits (negative_slope_bits).
#pragma once
#include "call.h"

namespace bnfast::tf {

struct Attributes {
    std::int64_t axis = -1;
    Activation activation = Activation::none;
    double negative_slope = 0;
    int type = 0;                                    // TF_DataType of x
    bool gamma = false, beta = false, mask = false;  // whether the optional input is given

    // BnfastTrain and BnfastInfer
    bool residual = false;

    // BnfastTrain
    int correction = 0;
    NanPolicy nan_policy = NanPolicy::propagate;

    // BnfastGrad
    bool y = false;           // y is given and dresidual wanted
    bool statistics = false;  // dmean and dvariance are given
    int parameter_type = 0;   // TF_DataType of dgamma and dbeta
};

Attributes read_train_attributes(TF_OpKernelConstruction* context);
Attributes read_infer_attributes(TF_OpKernelConstruction* context);
Attributes read_grad_attributes(TF_OpKernelConstruction* context);

}  // namespace bnfast::tf
