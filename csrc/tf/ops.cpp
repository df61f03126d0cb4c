// The ops BnfastTrain and BnfastGrad: what goes in and comes out, their shapes, and their registration, which happens
// while tf.load_op_library loads this library. Both are stateless. Vectors are (C,) of U; C is x's extent along axis.
//
//   BnfastTrain: x, moving_mean, moving_variance, [gamma], [beta], [mask], [residual]
//             -> y, the moving statistics updated, saved (2, C): mean and invstd of the batch, for BnfastGrad
//   BnfastGrad:  dy, x, saved, [gamma], [beta], [mask], [y], [dmean, dvariance] -> dx, dgamma, dbeta, [dresidual]
//
// y goes to BnfastGrad where the forward had both residual and activation: kept for the next layer anyway, it spares
// the residual being kept beside it (ResNet50 at batch 16: 92 MB of 1356). parameter_type is U, which TensorFlow can't
// infer for a BnfastGrad without gamma and beta. mask: N*S weights of W, float64 for float64 x and else float32.
// statistics_gradient tells the Python side that the gradients of the second and third output count: with momentum 0
// they are the batch's own mean and variance. BnfastGrad keeps epsilon for its own derivative.
#include "kernels.h"

namespace bnfast::tf {

const CoreApi* core = nullptr;

namespace {

std::string registration_error;

const char* const common_attributes[] = {
    "T: {half, bfloat16, float, double}",
    "U: {float, double} = DT_FLOAT",
    "W: {float, double} = DT_FLOAT",
    "num_gamma: int >= 0 = 0",
    "num_beta: int >= 0 = 0",
    "num_mask: int >= 0 = 0",
    "axis: int = -1",
    "epsilon_bits: int",
    "activation: {'none', 'relu', 'relu6', 'leaky_relu'} = 'none'",
    "negative_slope_bits: int = 0",
};

class Shapes {
public:
    Shapes(TF_ShapeInferenceContext* context, TF_Status* status) : context_(context), status_(status) {}
    struct Handle {
        TF_ShapeHandle* const handle;
        explicit Handle(TF_ShapeHandle* h = TF_NewShapeHandle()) : handle(h) {}
        ~Handle() { TF_DeleteShapeHandle(handle); }
        Handle(const Handle&) = delete;
        Handle& operator=(const Handle&) = delete;
        operator TF_ShapeHandle*() const { return handle; }
    };
    bool fine() const { return TF_GetCode(status_) == TF_OK; }
    void input(int i, TF_ShapeHandle* shape, int rank = -1) const {
        TF_ShapeInferenceContextGetInput(context_, i, shape, status_);
        if (rank >= 0 && fine()) TF_ShapeInferenceContextWithRank(context_, shape, rank, shape, status_);
    }
    void output(int i, TF_ShapeHandle* shape) const {
        if (fine()) TF_ShapeInferenceContextSetOutput(context_, i, shape, status_);
    }

private:
    TF_ShapeInferenceContext* const context_;
    TF_Status* const status_;
};

void train_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
    const Shapes shapes(context, status);
    const Shapes::Handle x, vector, saved, two(TF_ShapeInferenceContextVectorFromSize(context, 2));
    shapes.input(0, x);
    shapes.output(0, x);
    if (shapes.fine()) shapes.input(1, vector, 1);
    shapes.output(1, vector);
    shapes.output(2, vector);
    if (shapes.fine()) TF_ShapeInferenceContextConcatenateShapes(context, two, vector, saved, status);
    shapes.output(3, saved);
}

void grad_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
    const Shapes shapes(context, status);
    const Shapes::Handle x, saved, vector;
    shapes.input(1, x);
    shapes.output(0, x);
    if (shapes.fine()) shapes.input(2, saved, 2);
    if (shapes.fine()) TF_ShapeInferenceContextSubshape(context, saved, 1, 2, vector, status);
    shapes.output(1, vector);
    shapes.output(2, vector);
    const Status none;  // dresidual, where there is one; the C API doesn't say how many outputs there are
    TF_ShapeInferenceContextSetOutput(context, 3, x, none);
}

template <Attributes (*read)(TF_OpKernelConstruction*)> void* create(TF_OpKernelConstruction* context) {
    auto* const attributes = new Attributes;
    guarded(context, TF_OpKernelConstruction_Failure, [&] { *attributes = read(context); });
    return attributes;
}

template <void (*run)(const Attributes&, TF_OpKernelContext*)> void compute(void* self, TF_OpKernelContext* context) {
    guarded(context, TF_OpKernelContext_Failure, [&] { run(*static_cast<const Attributes*>(self), context); });
}

void destroy(void* self) { delete static_cast<Attributes*>(self); }

void define(const char* name, std::initializer_list<const char*> inputs, std::initializer_list<const char*> outputs,
            std::initializer_list<const char*> attributes, void (*shapes)(TF_ShapeInferenceContext*, TF_Status*),
            TF_KernelBuilder* kernel) {
    const Status status;
    TF_OpDefinitionBuilder* const op = TF_NewOpDefinitionBuilder(name);
    for (const char* spec : common_attributes) TF_OpDefinitionBuilderAddAttr(op, spec);
    for (const char* spec : attributes) TF_OpDefinitionBuilderAddAttr(op, spec);
    for (const char* spec : inputs) TF_OpDefinitionBuilderAddInput(op, spec);
    for (const char* spec : outputs) TF_OpDefinitionBuilderAddOutput(op, spec);
    TF_OpDefinitionBuilderSetShapeInferenceFunction(op, shapes);
    TF_RegisterOpDefinition(op, status);
    if (status.fine()) TF_RegisterKernelBuilder(name, kernel, status);
    if (!status.fine()) registration_error = std::string(name) + ": " + TF_Message(status);
}

const bool registered = [] {
    registration_error = find_tensorflow();
    if (!registration_error.empty()) return false;
    define("BnfastTrain",
           {"x: T", "moving_mean: U", "moving_variance: U", "gamma: num_gamma * U", "beta: num_beta * U",
            "mask: num_mask * W", "residual: num_residual * T"},
           {"y: T", "new_mean: U", "new_variance: U", "saved: double"},
           {"num_residual: int >= 0 = 0", "momentum_bits: int", "correction: int >= 0 = 0",
            "nan_policy: {'propagate', 'skip_update'} = 'propagate'", "statistics_gradient: bool = false"},
           train_shapes, TF_NewKernelBuilder("BnfastTrain", "CPU", create<train_attributes>, compute<train>, destroy));
    define("BnfastGrad",
           {"dy: T", "x: T", "saved: double", "gamma: num_gamma * U", "beta: num_beta * U", "mask: num_mask * W",
            "y: num_y * T", "statistics: num_statistics * U"},
           {"dx: T", "dgamma: parameter_type", "dbeta: parameter_type", "dresidual: num_y * T"},
           {"num_y: int >= 0 = 0", "num_statistics: int >= 0 = 0", "parameter_type: {float, double}"}, grad_shapes,
           TF_NewKernelBuilder("BnfastGrad", "CPU", create<grad_attributes>, compute<grad>, destroy));
    return true;
}();

}  // namespace
}  // namespace bnfast::tf

// See core_api.h.
extern "C" __attribute__((visibility("default"))) const char* bnfast_connect(const bnfast::tf::CoreApi* api) {
    using namespace bnfast;
    if (!tf::registration_error.empty()) return tf::registration_error.c_str();
    if (std::strcmp(api->version, BNFAST_VERSION) != 0 || api->train_args_bytes != sizeof(TrainArgs) ||
        api->grad_args_bytes != sizeof(GradArgs))
        return "it was built with another version of bnfast";
    tf::core = api;
    return nullptr;
}
