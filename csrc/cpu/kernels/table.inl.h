// The kernel table: all that the translation unit of an instruction set exports. Instantiates every kernel for every
// dtype.
#pragma once
#include "backward.inl.h"
#include "normalize.inl.h"
#include "row_norm.inl.h"
#include "stats_columns.inl.h"
#include "stats_rows.inl.h"

namespace bnfast {
namespace {

template <class X> constexpr TypeKernels kernels_of() {
    return {
        {reduce_rows<X, 0>, reduce_rows<X, 1>},
        {reduce_columns<X, 0>, reduce_columns<X, 1>},
        {apply_rows<X, 0>, apply_rows<X, 1>, apply_rows<X, 2>, apply_rows<X, 3>},
        {apply_columns<X, 0>, apply_columns<X, 1>, apply_columns<X, 2>, apply_columns<X, 3>},
        {grad_reduce_rows<X, 0>, grad_reduce_rows<X, 1>, grad_reduce_rows<X, 2>, grad_reduce_rows<X, 3>},
        {grad_reduce_columns<X, 0>, grad_reduce_columns<X, 1>, grad_reduce_columns<X, 2>, grad_reduce_columns<X, 3>},
        {{grad_apply_rows<X, 0, 0>, grad_apply_rows<X, 0, 1>, grad_apply_rows<X, 0, 2>, grad_apply_rows<X, 0, 3>},
         {grad_apply_rows<X, 1, 0>, grad_apply_rows<X, 1, 1>, grad_apply_rows<X, 1, 2>, grad_apply_rows<X, 1, 3>},
         {grad_apply_rows<X, 2, 0>, grad_apply_rows<X, 2, 1>, grad_apply_rows<X, 2, 2>, grad_apply_rows<X, 2, 3>}},
        {{grad_apply_columns<X, 0, 0>, grad_apply_columns<X, 0, 1>, grad_apply_columns<X, 0, 2>,
          grad_apply_columns<X, 0, 3>},
         {grad_apply_columns<X, 1, 0>, grad_apply_columns<X, 1, 1>, grad_apply_columns<X, 1, 2>,
          grad_apply_columns<X, 1, 3>},
         {grad_apply_columns<X, 2, 0>, grad_apply_columns<X, 2, 1>, grad_apply_columns<X, 2, 2>,
          grad_apply_columns<X, 2, 3>}},
        finalize<X>,
        grad_finalize<X>,
        {row_apply<X, false>, row_apply<X, true>},
        {row_grad_reduce<X, false>, row_grad_reduce<X, true>},
        {row_grad_apply<X, false>, row_grad_apply<X, true>},
    };
}

}  // namespace
}  // namespace bnfast

#define BNFAST_KERNEL_TABLE(table, isa)                                                                \
    namespace bnfast {                                                                                 \
    extern const KernelTable table;                                                                    \
    const KernelTable table = {                                                                        \
        isa,                                                                                           \
        {kernels_of<Float32>(), kernels_of<Float64>(), kernels_of<Float16>(), kernels_of<BFloat16>()}, \
        merge_chunks,                                                                                  \
        update_moving};                                                                                \
    }
