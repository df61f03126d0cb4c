// DLPack tensors with any fields: either declined, or a view whose every element lies where the strides say.
#include <vector>

#include "bind/dlpack_view.h"
#include "input.h"

using namespace bnfast;
using namespace bnfast::bind;
using fuzz::expect;
using fuzz::Input;
using std::int64_t;

namespace {

// The strides of an order of axes; wraps, because the extents may be anything.
std::vector<int64_t> dense(const std::vector<int64_t>& dims, bool channels_last) {
    std::vector<int64_t> strides(dims.size());
    std::uint64_t next = 1;
    const auto place = [&](std::size_t i) {
        strides[i] = int64_t(next);
        next *= std::uint64_t(dims[i]);
    };
    const bool last = channels_last && dims.size() > 1;
    if (last) place(1);
    for (std::size_t i = dims.size(); i-- > 0;)
        if (!(last && i == 1)) place(i);
    return strides;
}

// Counts through all elements in the view's order: element k must lie at k.
void expect_dense(const dlpack::View& v, const int64_t* strides) {
    if (!strides || v.size > 4096) return;
    std::vector<int> axes;  // outermost first
    for (int i = 0; i < v.rank; ++i)
        if (v.order == dlpack::Order::contiguous || i != 1) axes.push_back(i);
    if (v.order == dlpack::Order::channels_last) axes.push_back(1);
    for (int64_t k = 0; k < v.size; ++k) {
        int64_t rest = k, at = 0;
        for (std::size_t i = axes.size(); i-- > 0;) {
            const int64_t extent = v.dims[axes[i]];
            if (extent > 1) at += rest % extent * strides[axes[i]];
            rest /= extent;
        }
        expect(at == k, "a view's elements are dense in its order");
    }
}

void expect_shapes(const dlpack::View& v, int64_t groups, int axes) {
    if (const auto s = dlpack::batch_shape(v))
        expect(s->N > 0 && s->C == v.dims[1] && s->S > 0 && s->size() == v.size, "batch_shape covers the tensor");
    else expect(v.rank < 2, "a tensor of two axes or more has a batch shape");
    if (const auto s = dlpack::group_shape(v, groups, axes)) {
        expect(s->N > 0 && s->A > 0 && s->C > 0 && s->S > 0 && s->size() == v.size, "group_shape covers the tensor");
        expect(s->G > 0 && s->C % s->G == 0 && (s->A == 1 || s->S == 1), "group_shape is a valid GroupShape");
    }
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input in(data, size);
    dlpack::Tensor t{};
    t.device_type = in.below(4) ? dlpack::cpu : in.raw<std::int32_t>();
    t.ndim = in.below(8) ? in.below(7) : in.raw<std::int32_t>();
    t.code = in.below(4) ? dlpack::floating_point : in.byte();
    t.bits = in.below(8) ? std::uint8_t(16 << in.below(3)) : in.byte();
    t.lanes = in.below(16) ? 1 : in.raw<std::uint16_t>();
    t.byte_offset = in.below(4) ? 0 : in.raw<std::uint64_t>();
    const int64_t groups = in.extent(6);
    const int axes = in.below(8) ? in.below(4) : in.raw<std::int32_t>();
    // Exactly as long as a tensor of so many axes has them, so that AddressSanitizer sees a read of one more.
    const bool claimed = t.ndim >= 0 && t.ndim <= dlpack::most_axes;
    std::vector<int64_t> dims(claimed ? std::size_t(t.ndim) : 0);
    for (int64_t& d : dims) d = in.extent(6);
    std::vector<int64_t> strides;
    const int kind = in.below(4);
    if (kind == 1 || kind == 2) strides = dense(dims, kind == 2);
    if (kind == 3)
        for (std::size_t i = 0; i < dims.size(); ++i) strides.push_back(in.extent(40));
    if (!strides.empty() && in.flag()) strides[std::size_t(in.byte()) % strides.size()] = in.extent(40);
    t.shape = dims.empty() && in.flag() ? nullptr : dims.data();
    t.strides = strides.empty() ? nullptr : strides.data();
    static char memory[8];
    t.data = in.below(8) ? memory : nullptr;

    const auto view = dlpack::view_of(t);
    if (!view) return 0;
    int64_t values = 1;
    for (int i = 0; i < view->rank; ++i) {
        expect(view->dims[i] == dims[std::size_t(i)] && view->dims[i] > 0, "a view has the tensor's extents");
        expect(!__builtin_mul_overflow(values, view->dims[i], &values), "the number of values fits");
    }
    expect(view->rank == t.ndim && view->size == values && view->data, "a view has the tensor's rank, size and memory");
    expect(view->like(*view), "a view is like itself");
    expect_dense(*view, t.strides);
    expect_shapes(*view, groups, axes);
    return 0;
}
