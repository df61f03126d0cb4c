// Registers the ops BnfastTrain, BnfastInfer and BnfastGrad and their shape functions, while tf.load_op_library loads
// this library. signatures.h says what the ops take and return.
#include "kernels.h"
#include "signatures.h"

namespace bnfast::tf {

const CoreApi* core = nullptr;

namespace {

std::string registration_error;

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
    const Shapes::Handle x, vector, saved, scalar, two(TF_ShapeInferenceContextVectorFromSize(context, 2));
    shapes.input(position(train_inputs, "x"), x);
    shapes.output(position(train_outputs, "y"), x);
    for (const int at : {position(train_inputs, "momentum"), position(train_inputs, "epsilon")})
        if (shapes.fine()) shapes.input(at, scalar, 0);
    if (shapes.fine()) shapes.input(position(train_inputs, "moving_mean"), vector, 1);
    shapes.output(position(train_outputs, "new_mean"), vector);
    shapes.output(position(train_outputs, "new_variance"), vector);
    if (shapes.fine()) TF_ShapeInferenceContextConcatenateShapes(context, two, vector, saved, status);
    shapes.output(position(train_outputs, "saved"), saved);
}

void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
    const Shapes shapes(context, status);
    const Shapes::Handle x, vector, scalar;
    shapes.input(position(infer_inputs, "x"), x);
    shapes.output(position(infer_outputs, "y"), x);
    if (shapes.fine()) shapes.input(position(infer_inputs, "epsilon"), scalar, 0);
    if (shapes.fine()) shapes.input(position(infer_inputs, "moving_mean"), vector, 1);
}

void grad_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
    const Shapes shapes(context, status);
    const Shapes::Handle x, saved, vector, scalar;
    shapes.input(position(grad_inputs, "x"), x);
    shapes.output(position(grad_outputs, "dx"), x);
    if (shapes.fine()) shapes.input(position(grad_inputs, "epsilon"), scalar, 0);
    if (shapes.fine()) shapes.input(position(grad_inputs, "saved"), saved, 2);
    if (shapes.fine()) TF_ShapeInferenceContextSubshape(context, saved, 1, 2, vector, status);
    shapes.output(position(grad_outputs, "dgamma"), vector);
    shapes.output(position(grad_outputs, "dbeta"), vector);
    const Status ignored;  // the C API doesn't say whether this call has a dresidual; without one, setting it fails
    TF_ShapeInferenceContextSetOutput(context, position(grad_outputs, "dresidual"), x, ignored);
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

template <std::size_t inputs, std::size_t outputs, std::size_t attributes>
void define(const char* name, const char* const (&input_specs)[inputs], const char* const (&output_specs)[outputs],
            const char* const (&attribute_specs)[attributes], InferShapes infer_shapes, TF_KernelBuilder* kernel) {
    const Status status;
    TF_OpDefinitionBuilder* const op = TF_NewOpDefinitionBuilder(name);
    for (const char* spec : common_attributes) TF_OpDefinitionBuilderAddAttr(op, spec);
    for (const char* spec : attribute_specs) TF_OpDefinitionBuilderAddAttr(op, spec);
    for (const char* spec : input_specs) TF_OpDefinitionBuilderAddInput(op, spec);
    for (const char* spec : output_specs) TF_OpDefinitionBuilderAddOutput(op, spec);
    TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shapes);
    TF_RegisterOpDefinition(op, status);
    if (status.fine()) TF_RegisterKernelBuilder(name, kernel, status);
    if (!status.fine()) registration_error = std::string(name) + ": " + TF_Message(status);
}

const bool registered = [] {
    registration_error = find_tensorflow();
    if (!registration_error.empty()) return false;
    define("BnfastTrain", train_inputs, train_outputs, train_attributes, train_shapes,
           TF_NewKernelBuilder("BnfastTrain", "CPU", create<read_train_attributes>, compute<train>, destroy));
    define("BnfastInfer", infer_inputs, infer_outputs, infer_attributes, infer_shapes,
           TF_NewKernelBuilder("BnfastInfer", "CPU", create<read_infer_attributes>, compute<infer>, destroy));
    define("BnfastGrad", grad_inputs, grad_outputs, grad_attributes, grad_shapes,
           TF_NewKernelBuilder("BnfastGrad", "CPU", create<read_grad_attributes>, compute<grad>, destroy));
    return true;
}();

}  // namespace
}  // namespace bnfast::tf

// See core_api.h.
extern "C" __attribute__((visibility("default"))) const char* bnfast_connect(const bnfast::tf::CoreApi* api) {
    using namespace bnfast;
    if (!tf::registration_error.empty()) return tf::registration_error.c_str();
    if (std::strcmp(api->version, BNFAST_VERSION) != 0 || api->train_args_bytes != sizeof(TrainArgs) ||
        api->infer_args_bytes != sizeof(InferArgs) || api->grad_args_bytes != sizeof(GradArgs))
        return "it was built with another version of bnfast";
    tf::core = api;
    return nullptr;
}
