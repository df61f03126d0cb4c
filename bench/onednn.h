// oneDNN's batch normalization, the usual alternative in C++: float32, plain layouts, preallocated memory.
#pragma once
#include <oneapi/dnnl/dnnl.hpp>

#include <cstdint>
#include <unordered_map>
#include <vector>

class OneDnn {
public:
    OneDnn(std::int64_t N, std::int64_t C, std::int64_t S, bool channels_last, float* x, float* dy, float* y, float* dx)
        : engine_(dnnl::engine::kind::cpu, 0),
          stream_(engine_),
          scale_shift_(2 * C, 1.f),
          dscale_shift_(2 * C),
          mean_(C),
          variance_(C) {
        using namespace dnnl;
        const auto tag = channels_last ? memory::format_tag::nhwc : memory::format_tag::nchw;
        const memory::desc tensor({N, C, S, 1}, memory::data_type::f32, tag);
        const memory::desc pair({2, C}, memory::data_type::f32, memory::format_tag::nc);
        const auto flags = normalization_flags::use_scale_shift;
        const batch_normalization_forward::primitive_desc train({prop_kind::forward_training, tensor, 1e-3f, flags},
                                                                engine_);
        const batch_normalization_forward::primitive_desc infer(
            {prop_kind::forward_inference, tensor, 1e-3f, flags | normalization_flags::use_global_stats}, engine_);
        const batch_normalization_backward::primitive_desc grad({prop_kind::backward, tensor, tensor, 1e-3f, flags},
                                                                engine_, train);
        const auto of = [&](const memory::desc& d, void* p) { return memory(d, engine_, p); };
        args_ = {{DNNL_ARG_SRC, of(tensor, x)},
                 {DNNL_ARG_DST, of(tensor, y)},
                 {DNNL_ARG_MEAN, of(train.mean_desc(), mean_.data())},
                 {DNNL_ARG_VARIANCE, of(train.variance_desc(), variance_.data())},
                 {DNNL_ARG_SCALE_SHIFT, of(pair, scale_shift_.data())}};
        grad_args_ = args_;
        grad_args_.erase(DNNL_ARG_DST);
        grad_args_.insert({DNNL_ARG_DIFF_DST, of(tensor, dy)});
        grad_args_.insert({DNNL_ARG_DIFF_SRC, of(tensor, dx)});
        grad_args_.insert({DNNL_ARG_DIFF_SCALE_SHIFT, of(pair, dscale_shift_.data())});
        train_ = batch_normalization_forward(train);
        infer_ = batch_normalization_forward(infer);
        grad_ = batch_normalization_backward(grad);
    }
    void train() { run(train_, args_); }
    void infer() { run(infer_, args_); }
    void grad() { run(grad_, grad_args_); }

private:
    using Args = std::unordered_map<int, dnnl::memory>;
    void run(const dnnl::primitive& p, const Args& args) {
        p.execute(stream_, args);
        stream_.wait();
    }
    dnnl::engine engine_;
    dnnl::stream stream_;
    std::vector<float> scale_shift_, dscale_shift_, mean_, variance_;
    Args args_, grad_args_;
    dnnl::batch_normalization_forward train_, infer_;
    dnnl::batch_normalization_backward grad_;
};
