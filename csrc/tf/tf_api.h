// The part of TensorFlow's C API for ops and kernels that bnfast's op calls. It is plain C and the same from TensorFlow
// 2.18 on. It is declared here, so that building needs no TensorFlow. The functions are pointers that `find_tensorflow`
// fills, because nothing else works everywhere: TensorFlow 2.18 keeps its symbols out of the process's global scope
// (2.21 doesn't), and linking against its library would make our wheel depend on it. TensorFlow's own headers
// (tensorflow/c/kernels.h, ops.h, tf_tensor.h, tf_status.h) document each function. Enums are declared as int, the type
// that they are passed as.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

struct TF_KernelBuilder;
struct TF_OpDefinitionBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
struct TF_ShapeHandle;
struct TF_ShapeInferenceContext;
struct TF_Status;
struct TF_Tensor;

namespace bnfast::tf {

enum : int { TF_FLOAT = 1, TF_DOUBLE = 2, TF_BFLOAT16 = 14, TF_HALF = 19 };  // TF_DataType
enum : int {                                                                 // TF_Code
    TF_OK = 0,
    TF_INVALID_ARGUMENT = 3,
    TF_RESOURCE_EXHAUSTED = 8,
    TF_FAILED_PRECONDITION = 9,
    TF_INTERNAL = 13
};

using CreateKernel = void* (*)(TF_OpKernelConstruction*);
using ComputeKernel = void (*)(void* kernel, TF_OpKernelContext*);
using DestroyKernel = void (*)(void* kernel);
using InferShapes = void (*)(TF_ShapeInferenceContext*, TF_Status*);

// F(result, name, (arguments)). A register function consumes its builder even if it fails. A returned tensor is a
// reference that the caller must give to TF_DeleteTensor. GetAttrString writes no terminating null.
#define BNFAST_TF_API(F)                                                                                               \
    F(TF_Status*, TF_NewStatus, ())                                                                                    \
    F(void, TF_DeleteStatus, (TF_Status*))                                                                             \
    F(void, TF_SetStatus, (TF_Status*, int code, const char* message))                                                 \
    F(int, TF_GetCode, (const TF_Status*))                                                                             \
    F(const char*, TF_Message, (const TF_Status*))                                                                     \
    F(void, TF_DeleteTensor, (TF_Tensor*))                                                                             \
    F(int, TF_TensorType, (const TF_Tensor*))                                                                          \
    F(int, TF_NumDims, (const TF_Tensor*))                                                                             \
    F(std::int64_t, TF_Dim, (const TF_Tensor*, int index))                                                             \
    F(void*, TF_TensorData, (const TF_Tensor*))                                                                        \
    F(TF_OpDefinitionBuilder*, TF_NewOpDefinitionBuilder, (const char* op))                                            \
    F(void, TF_OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char* spec))                                \
    F(void, TF_OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char* spec))                               \
    F(void, TF_OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char* spec))                              \
    F(void, TF_OpDefinitionBuilderSetShapeInferenceFunction, (TF_OpDefinitionBuilder*, InferShapes))                   \
    F(void, TF_RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                                            \
    F(TF_KernelBuilder*, TF_NewKernelBuilder,                                                                          \
      (const char* op, const char* device, CreateKernel, ComputeKernel, DestroyKernel))                                \
    F(void, TF_RegisterKernelBuilder, (const char* name, TF_KernelBuilder*, TF_Status*))                               \
    F(void, TF_OpKernelConstruction_GetAttrType, (TF_OpKernelConstruction*, const char* name, int* value, TF_Status*)) \
    F(void, TF_OpKernelConstruction_GetAttrInt64,                                                                      \
      (TF_OpKernelConstruction*, const char* name, std::int64_t* value, TF_Status*))                                   \
    F(void, TF_OpKernelConstruction_GetAttrString,                                                                     \
      (TF_OpKernelConstruction*, const char* name, char* value, std::size_t most, TF_Status*))                         \
    F(void, TF_OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))                                   \
    F(void, TF_GetInput, (TF_OpKernelContext*, int index, TF_Tensor**, TF_Status*))                                    \
    F(TF_Tensor*, TF_AllocateOutput,                                                                                   \
      (TF_OpKernelContext*, int index, int type, const std::int64_t* dims, int rank, std::size_t bytes, TF_Status*))   \
    F(TF_Tensor*, TF_ForwardInputOrAllocateOutput,                                                                     \
      (TF_OpKernelContext*, const int* candidates, int candidate_count, int index, const std::int64_t* dims, int rank, \
       int* forwarded, TF_Status*))                                                                                    \
    F(void, TF_OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))                                             \
    F(TF_ShapeHandle*, TF_NewShapeHandle, ())                                                                          \
    F(void, TF_DeleteShapeHandle, (TF_ShapeHandle*))                                                                   \
    F(void, TF_ShapeInferenceContextGetInput, (TF_ShapeInferenceContext*, int index, TF_ShapeHandle*, TF_Status*))     \
    F(void, TF_ShapeInferenceContextSetOutput, (TF_ShapeInferenceContext*, int index, TF_ShapeHandle*, TF_Status*))    \
    F(void, TF_ShapeInferenceContextWithRank,                                                                          \
      (TF_ShapeInferenceContext*, TF_ShapeHandle*, std::int64_t rank, TF_ShapeHandle* result, TF_Status*))             \
    F(void, TF_ShapeInferenceContextSubshape,                                                                          \
      (TF_ShapeInferenceContext*, TF_ShapeHandle*, std::int64_t begin, std::int64_t end, TF_ShapeHandle* result,       \
       TF_Status*))                                                                                                    \
    F(void, TF_ShapeInferenceContextConcatenateShapes,                                                                 \
      (TF_ShapeInferenceContext*, TF_ShapeHandle * first, TF_ShapeHandle * second, TF_ShapeHandle * result,            \
       TF_Status*))                                                                                                    \
    F(TF_ShapeHandle*, TF_ShapeInferenceContextVectorFromSize, (TF_ShapeInferenceContext*, std::size_t size))

#define BNFAST_DECLARE(result, name, arguments) extern result(*name) arguments;
BNFAST_TF_API(BNFAST_DECLARE)
#undef BNFAST_DECLARE

// Finds the functions in the TensorFlow that this process has loaded. Returns "" or what is missing.
std::string find_tensorflow();

}  // namespace bnfast::tf
