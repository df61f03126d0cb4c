#include "attributes.h"

namespace bnfast::tf {
namespace {

class Reader {
public:
    explicit Reader(TF_OpKernelConstruction* context) : context_(context) {}
    std::int64_t integer(const char* name) const {
        std::int64_t value = 0;
        TF_OpKernelConstruction_GetAttrInt64(context_, name, &value, status_);
        status_.check();
        return value;
    }
    double real(const char* name) const {
        const std::int64_t bits = integer(name);
        double value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    bool optional(const char* name) const {
        const std::int64_t count = integer(name);
        if (count > 1) throw Failure{TF_INVALID_ARGUMENT, std::string(name) + " must be 0 or 1"};
        return count == 1;
    }
    int zero_or_one(const char* name) const {
        const std::int64_t value = integer(name);
        if (value > 1)
            throw Failure{TF_INVALID_ARGUMENT,
                          std::string(name) + " must be 0 or 1. Received: " + std::to_string(value)};
        return int(value);
    }
    int type(const char* name) const {
        int value = 0;
        TF_OpKernelConstruction_GetAttrType(context_, name, &value, status_);
        status_.check();
        return value;
    }
    // The index of a string attribute's value among the choices.
    int choice(const char* name, std::initializer_list<const char*> choices) const {
        char text[16] = "";
        TF_OpKernelConstruction_GetAttrString(context_, name, text, sizeof text - 1, status_);
        status_.check();
        int index = 0;
        std::string wanted;
        for (const char* const candidate : choices) {
            if (std::strcmp(text, candidate) == 0) return index;
            wanted.append(index++ ? ", " : "").append(candidate);
        }
        throw Failure{TF_INVALID_ARGUMENT, std::string(name) + " must be one of " + wanted + ". Received: " + text};
    }
    Attributes common() const {
        Attributes a;
        a.axis = integer("axis");
        a.negative_slope = real("negative_slope_bits");
        a.activation = Activation(
            choice("activation", {"none", "relu", "relu6", "leaky_relu", "silu", "hard_silu", "sigmoid", "hard_sigmoid",
                                  "tanh", "gelu", "gelu_tanh", "elu", "selu", "softplus", "mish"}));
        a.type = type("T");
        a.gamma = optional("num_gamma");
        a.beta = optional("num_beta");
        return a;
    }

private:
    TF_OpKernelConstruction* const context_;
    Status status_;
};

}  // namespace

Attributes read_train_attributes(TF_OpKernelConstruction* context) {
    const Reader reader(context);
    Attributes a = reader.common();
    a.mask = reader.optional("num_mask");
    a.residual = reader.optional("num_residual");
    a.correction = reader.zero_or_one("correction");
    a.nan_policy = NanPolicy(reader.choice("nan_policy", {"propagate", "skip_update"}));
    return a;
}

Attributes read_infer_attributes(TF_OpKernelConstruction* context) {
    const Reader reader(context);
    Attributes a = reader.common();
    a.residual = reader.optional("num_residual");
    return a;
}

Attributes read_grad_attributes(TF_OpKernelConstruction* context) {
    const Reader reader(context);
    Attributes a = reader.common();
    a.mask = reader.optional("num_mask");
    a.y = reader.optional("num_y");
    if (a.y && a.activation == Activation::none)
        throw Failure{TF_INVALID_ARGUMENT, "num_y must be 0 without an activation"};
    a.parameter_type = reader.type("parameter_type");
    const std::int64_t count = reader.integer("num_statistics");
    if (count != 0 && count != 2) throw Failure{TF_INVALID_ARGUMENT, "num_statistics must be 0 or 2"};
    a.statistics = count == 2;
    return a;
}

}  // namespace bnfast::tf
