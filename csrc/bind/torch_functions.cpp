#include "torch_functions.h"

#include <vector>

#include "../vectors.h"
#include "cpu/memory.h"
#include "call.h"
#include "torch_tensor.h"
#include "torch_threads.h"

namespace bnfast::bind {
namespace {

using std::int64_t;

template <class F> void compute(F f) {
    const BorrowedThreads scope(lender_of_threads());
    without_gil(f);
}

Shape batch_shape(const TorchTensor& x) {
    const auto shape = dlpack::batch_shape(x);
    decline_unless(shape.has_value());
    return *shape;
}

// What all calls share. axes: the rank of gamma and beta.
template <class Args, class ShapeOf>
TorchVectorReader fill(Args& a, const TorchTensor& x, const ShapeOf& shape, py::handle gamma, py::handle beta,
                       py::handle residual, int activation, double negative_slope, int axes = 1) {
    a.shape = shape;
    a.dtype = x.dtype;
    a.x = x.data;
    a.residual = x.data_of_like(residual);
    a.activation = Activation(activation);
    a.negative_slope = negative_slope;
    const TorchVectorReader vectors(shape.C, x.dtype);
    a.gamma = vectors.read<ConstVector>(gamma, axes);
    a.beta = vectors.read<ConstVector>(beta, axes);
    return vectors;
}

// An output, which the caller has just allocated. From 32 MiB on glibc maps the memory anew each time, and its page
// faults take half of a call (13.7 ms for 51 MB, 7.8 with huge pages).
void* output_like(const TorchTensor& x, void* data) {
    const int64_t bytes = x.size * bytes_per_value(x.dtype);
    if (data && bytes >= int64_t(32) << 20) ask_for_huge_pages(data, std::size_t(bytes));
    return data;
}

// What the forward calls share besides.
template <class Args> void fill_forward(Args& a, const TorchTensor& x, py::handle y, double epsilon) {
    a.y = output_like(x, x.data_of_required_like(y));
    decline_unless(epsilon >= 0);
    a.epsilon = epsilon;
}

// (rows, n) doubles of the output pool, which autograd keeps for the backward pass.
py::array new_statistics(py::ssize_t rows, int64_t n) {
    const py::ssize_t dims[] = {rows, py::ssize_t(n)};
    return new_array(py::dtype::of<double>(), dims, 2, rows * n * 8);
}
double* doubles(const py::array& a) { return static_cast<double*>(data_of(a)); }
double* statistics_of(py::handle h, py::ssize_t rows, int64_t n) {
    const ArrayView v = input(h);
    decline_unless(v.rank == 2 && v.dims[0] == rows && v.dims[1] == n && v.dtype == DType::float64);
    return static_cast<double*>(v.data);
}

// Where dgamma and dbeta go: the caller's tensors, or memory that nobody reads, because the core always writes both.
class ParameterGradients {
public:
    ParameterGradients(const TorchVectorReader& vectors, py::handle dgamma, py::handle dbeta, int64_t C, DType x,
                       int axes = 1)
        : gamma(vectors.read<Vector>(dgamma, axes)), beta(vectors.read<Vector>(dbeta, axes)) {
        if (gamma.data && beta.data) return;
        unread_.resize(std::size_t(2 * C));
        const DType dtype = x == DType::float64 ? x : DType::float32;
        if (!gamma.data) gamma = {unread_.data(), dtype};
        if (!beta.data) beta = {unread_.data() + C, dtype};
    }
    Vector gamma, beta;

private:
    std::vector<double> unread_;
};

// What the backward calls share besides.
template <class Args>
void fill_gradient(Args& a, const TorchTensor& x, py::handle dy, py::handle dx, py::handle dresidual,
                   const ParameterGradients& made) {
    a.dy = x.data_of_required_like(dy);
    a.dx = output_like(x, x.data_of_required_like(dx));
    a.dresidual = output_like(x, x.data_of_like(dresidual));
    a.dgamma = made.gamma;
    a.dbeta = made.beta;
}

// -> statistics (3, C): the mean, variance and invstd of the batch
py::object train(py::handle x, py::handle y, py::handle gamma, py::handle beta, py::handle moving_mean,
                 py::handle moving_variance, double momentum, double epsilon, int activation, double negative_slope,
                 py::handle residual) {
    return or_none([&]() -> py::object {
        const TorchTensor xt(x);
        TrainArgs a;
        const auto vectors = fill(a, xt, batch_shape(xt), gamma, beta, residual, activation, negative_slope);
        fill_forward(a, xt, y, epsilon);
        a.moving_mean = vectors.read<Vector>(moving_mean);
        a.moving_variance = vectors.read<Vector>(moving_variance);
        decline_unless(!a.moving_mean.data == !a.moving_variance.data);
        decline_unless(a.shape.per_channel() > 1 && momentum >= 0 && momentum <= 1);
        a.momentum = momentum;
        a.correction = 1;
        const py::array statistics = new_statistics(3, a.shape.C);
        a.mean = doubles(statistics);
        a.variance = a.mean + a.shape.C;
        a.invstd = a.variance + a.shape.C;
        compute([&] { bnfast::train(a); });
        return statistics;
    });
}

// -> statistics as train's, without a variance, which the frozen gradient doesn't need; True unless they are kept
py::object infer(py::handle x, py::handle y, py::handle gamma, py::handle beta, py::handle moving_mean,
                 py::handle moving_variance, double epsilon, int activation, double negative_slope, py::handle residual,
                 bool keep) {
    return or_none([&]() -> py::object {
        const TorchTensor xt(x);
        InferArgs a;
        const auto vectors = fill(a, xt, batch_shape(xt), gamma, beta, residual, activation, negative_slope);
        fill_forward(a, xt, y, epsilon);
        a.moving_mean = vectors.read<ConstVector>(moving_mean);
        a.moving_variance = vectors.read<ConstVector>(moving_variance);
        decline_unless(a.moving_mean.data && a.moving_variance.data);
        const int64_t C = a.shape.C;
        py::object kept = py::bool_(true);
        if (keep) {
            const py::array statistics = new_statistics(3, C);
            double *const mean = doubles(statistics), *const invstd = mean + 2 * C;
            for (int64_t c = 0; c < C; ++c) {
                mean[c] = value_of(a.moving_mean, c);
                mean[C + c] = value_of(a.moving_variance, c);
                invstd[c] = invstd_of(mean[C + c], epsilon);
            }
            kept = statistics;
        }
        compute([&] { bnfast::infer(a); });
        return kept;
    });
}

// -> True; writes dx and, where given, dgamma, dbeta and dresidual
py::object grad(py::handle dy, py::handle x, py::handle dx, py::handle statistics, py::handle gamma, py::handle beta,
                bool training, int activation, double negative_slope, py::handle residual, py::handle y,
                py::handle dresidual, py::handle dgamma, py::handle dbeta) {
    return or_none([&]() -> py::object {
        const TorchTensor xt(x);
        GradArgs a;
        const auto vectors = fill(a, xt, batch_shape(xt), gamma, beta, residual, activation, negative_slope);
        const int64_t C = a.shape.C;
        const ParameterGradients made(vectors, dgamma, dbeta, C, a.dtype);
        fill_gradient(a, xt, dy, dx, dresidual, made);
        a.y = xt.data_of_like(y);
        double* const saved = statistics_of(statistics, 3, C);
        a.mean = {saved, DType::float64};
        a.invstd = {saved + 2 * C, DType::float64};
        a.training = training;
        compute([&] { bnfast::grad(a); });
        return py::bool_(true);
    });
}

// (N, A, C, S) in groups; for layer norm the last `axes` axes are one row of C values (groups = 0).
struct Grouping {
    GroupShape shape;
    int vector_axes;

    Grouping(const TorchTensor& x, int64_t groups, int axes) : vector_axes(groups ? 1 : axes) {
        const auto known = dlpack::group_shape(x, groups, axes);
        decline_unless(known.has_value());
        shape = *known;
    }
    int64_t rows() const { return shape.N * shape.G; }
};

// -> statistics (2, N*G): mean and invstd
py::object group_norm(py::handle x, py::handle y, std::int64_t groups, int axes, py::handle gamma, py::handle beta,
                      double epsilon, int activation, double negative_slope, py::handle residual) {
    return or_none([&]() -> py::object {
        const TorchTensor xt(x);
        const Grouping g(xt, groups, axes);
        GroupNormArgs a;
        fill(a, xt, g.shape, gamma, beta, residual, activation, negative_slope, g.vector_axes);
        fill_forward(a, xt, y, epsilon);
        const py::array statistics = new_statistics(2, g.rows());
        a.mean = doubles(statistics);
        a.invstd = a.mean + g.rows();
        compute([&] { bnfast::group_norm(a); });
        return statistics;
    });
}

py::object group_norm_grad(py::handle dy, py::handle x, py::handle dx, py::handle statistics, std::int64_t groups,
                           int axes, py::handle gamma, py::handle beta, int activation, double negative_slope,
                           py::handle residual, py::handle dresidual, py::handle dgamma, py::handle dbeta) {
    return or_none([&]() -> py::object {
        const TorchTensor xt(x);
        const Grouping g(xt, groups, axes);
        GroupNormGradArgs a;
        const auto vectors = fill(a, xt, g.shape, gamma, beta, residual, activation, negative_slope, g.vector_axes);
        const ParameterGradients made(vectors, dgamma, dbeta, a.shape.C, a.dtype, g.vector_axes);
        fill_gradient(a, xt, dy, dx, dresidual, made);
        a.mean = statistics_of(statistics, 2, g.rows());
        a.invstd = a.mean + g.rows();
        compute([&] { bnfast::group_norm_grad(a); });
        return py::bool_(true);
    });
}

}  // namespace

void define_torch_functions(py::module_& m) {
    m.def("_torch_connect", &connect_torch,
          "_torch_connect(tensor, parameter, /)\n--\n\nThe two types that are accepted.");
    m.def("_torch_borrow_threads", &borrow_torch_threads,
          "_torch_borrow_threads(wanted, /)\n--\n\nWhether calls run on the threads of PyTorch's OpenMP from now on.");
    m.def("_torch_train", &train,
          "_torch_train(x, y, gamma, beta, moving_mean, moving_variance, momentum, epsilon, activation, "
          "negative_slope, residual, /)\n--\n\n");
    m.def("_torch_infer", &infer,
          "_torch_infer(x, y, gamma, beta, moving_mean, moving_variance, epsilon, activation, negative_slope, "
          "residual, keep, /)\n--\n\n");
    m.def("_torch_grad", &grad,
          "_torch_grad(dy, x, dx, statistics, gamma, beta, training, activation, negative_slope, residual, y, "
          "dresidual, dgamma, dbeta, /)\n--\n\n");
    m.def("_torch_group_norm", &group_norm,
          "_torch_group_norm(x, y, groups, axes, gamma, beta, epsilon, activation, negative_slope, residual, /)\n"
          "--\n\n");
    m.def("_torch_group_norm_grad", &group_norm_grad,
          "_torch_group_norm_grad(dy, x, dx, statistics, groups, axes, gamma, beta, activation, negative_slope, "
          "residual, dresidual, dgamma, dbeta, /)\n--\n\n");
}

}  // namespace bnfast::bind
