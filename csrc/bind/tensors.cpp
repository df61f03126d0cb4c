#include "tensors.h"

#include <cmath>
#include <vector>

#include "call.h"
#include "dlpack_view.h"

namespace bnfast::bind {
namespace {

using std::int64_t;

// The types whose exact instances are accepted, and how one is read. Set once by connect, never freed.
PyTypeObject *plain_tensor = nullptr, *plain_parameter = nullptr;
int (*view_of)(void*, dlpack::Tensor*) = nullptr;

void connect(py::handle tensor, py::handle parameter) {
    view_of = nullptr;
    if (py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
        const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
        auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::exchange_name));
        if (!api) throw py::error_already_set();
        while (api && api->major != dlpack::major_version) api = api->previous;
        if (api) view_of = api->view;
    }
    plain_tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
    plain_parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
}

class Tensor : public dlpack::View {
public:
    Tensor() = default;
    explicit Tensor(py::handle h) {
        if (h.is_none()) return;
        decline_unless(Py_TYPE(h.ptr()) == plain_tensor || Py_TYPE(h.ptr()) == plain_parameter);
        dlpack::Tensor t;
        if (view_of) {
            if (view_of(h.ptr(), &t) != 0) {
                PyErr_Clear();
                throw Declined{};
            }
        } else {
            t = through_capsule(h);
        }
        const auto view = dlpack::view_of(t);
        decline_unless(view.has_value());
        static_cast<dlpack::View&>(*this) = *view;
    }

private:
    // Before PyTorch 2.10 or so. A tensor that requires a gradient must be detached first.
    static dlpack::Tensor through_capsule(py::handle h) {
        const py::object capsule = h.attr("detach")().attr("__dlpack__")();
        auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name));
        if (!managed) throw py::error_already_set();
        static thread_local std::vector<int64_t> extents;  // of the capsule, which is freed here
        dlpack::Tensor t = managed->tensor;
        decline_unless(t.ndim >= 0 && t.ndim <= dlpack::most_axes && (t.ndim == 0 || t.shape));
        extents.assign(t.shape, t.shape + t.ndim);
        if (t.strides) extents.insert(extents.end(), t.strides, t.strides + t.ndim);
        t.shape = extents.data();
        t.strides = t.strides ? extents.data() + t.ndim : nullptr;
        return t;
    }
};

Shape batch_shape(const Tensor& x) {
    const auto shape = dlpack::batch_shape(x);
    decline_unless(shape.has_value());
    return *shape;
}

// (C,) vectors of one call: all share a dtype, that of x or float32 for a half type.
class VectorReader {
public:
    VectorReader(int64_t C, DType x) : C_(C), wanted_(x == DType::float64 ? x : DType::float32) {}
    template <class V> V read(py::handle h, int axes = 1) const {
        const Tensor t(h);
        if (!t) return {};
        // A negated view (z.conj().imag) isn't contiguous, unless it has one value.
        decline_unless(t.size > 1 || !h.attr("is_neg")().cast<bool>());
        decline_unless(t.rank == axes && t.size == C_ && t.dtype == wanted_ && t.order == dlpack::Order::contiguous);
        V v;
        v.data = t.data;
        v.dtype = t.dtype;
        return v;
    }

private:
    int64_t C_;
    DType wanted_;
};

struct Applied {  // the arguments of an activation
    int activation;
    double negative_slope;
    template <class Args> void write(Args& a) const {
        a.activation = Activation(activation);
        a.negative_slope = negative_slope;
    }
};

void* like(py::handle h, const Tensor& x) {
    const Tensor t(h);
    if (!t) return nullptr;
    decline_unless(t.like(x));
    return t.data;
}
void* required_like(py::handle h, const Tensor& x) {
    void* data = like(h, x);
    decline_unless(data);
    return data;
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
    ParameterGradients(const VectorReader& vectors, py::handle dgamma, py::handle dbeta, int64_t C, DType x, int axes)
        : gamma(vectors.read<Vector>(dgamma, axes)), beta(vectors.read<Vector>(dbeta, axes)) {
        if (gamma.data && beta.data) return;
        unread_.resize(std::size_t(C));
        const DType dtype = x == DType::float64 ? x : DType::float32;
        if (!gamma.data) gamma = {unread_.data(), dtype};
        if (!beta.data) beta = {gamma.data == unread_.data() ? second(C) : unread_.data(), dtype};
    }
    Vector gamma, beta;

private:
    double* second(int64_t C) {
        unread_.resize(std::size_t(2 * C));
        gamma.data = unread_.data();
        return unread_.data() + C;
    }
    std::vector<double> unread_;
};

// -> statistics (3, C): the mean, variance and invstd of the batch
py::object train(py::handle x, py::handle y, py::handle gamma, py::handle beta, py::handle moving_mean,
                 py::handle moving_variance, double momentum, double epsilon, int activation, double negative_slope,
                 py::handle residual) {
    return or_none([&]() -> py::object {
        const Tensor xv(x);
        TrainArgs a;
        a.shape = batch_shape(xv);
        a.dtype = xv.dtype;
        a.x = xv.data;
        a.y = required_like(y, xv);
        a.residual = like(residual, xv);
        const VectorReader vectors(a.shape.C, a.dtype);
        a.gamma = vectors.read<ConstVector>(gamma);
        a.beta = vectors.read<ConstVector>(beta);
        a.moving_mean = vectors.read<Vector>(moving_mean);
        a.moving_variance = vectors.read<Vector>(moving_variance);
        decline_unless(!a.moving_mean.data == !a.moving_variance.data);
        decline_unless(a.shape.per_channel() > 1 && momentum >= 0 && momentum <= 1 && epsilon >= 0);
        a.momentum = momentum;
        a.epsilon = epsilon;
        a.correction = 1;
        Applied{activation, negative_slope}.write(a);
        const py::array statistics = new_statistics(3, a.shape.C);
        a.mean = doubles(statistics);
        a.variance = a.mean + a.shape.C;
        a.invstd = a.variance + a.shape.C;
        without_gil([&] { bnfast::train(a); });
        return statistics;
    });
}

double double_at(const ConstVector& v, int64_t c) {
    return v.dtype == DType::float64 ? static_cast<const double*>(v.data)[c]
                                     : double(static_cast<const float*>(v.data)[c]);
}

// -> statistics as train's, without a variance, which the frozen gradient doesn't need; True unless they are kept
py::object infer(py::handle x, py::handle y, py::handle gamma, py::handle beta, py::handle moving_mean,
                 py::handle moving_variance, double epsilon, int activation, double negative_slope, py::handle residual,
                 bool keep) {
    return or_none([&]() -> py::object {
        const Tensor xv(x);
        InferArgs a;
        a.shape = batch_shape(xv);
        a.dtype = xv.dtype;
        a.x = xv.data;
        a.y = required_like(y, xv);
        a.residual = like(residual, xv);
        const VectorReader vectors(a.shape.C, a.dtype);
        a.gamma = vectors.read<ConstVector>(gamma);
        a.beta = vectors.read<ConstVector>(beta);
        a.moving_mean = vectors.read<ConstVector>(moving_mean);
        a.moving_variance = vectors.read<ConstVector>(moving_variance);
        decline_unless(a.moving_mean.data && a.moving_variance.data && epsilon >= 0);
        a.epsilon = epsilon;
        Applied{activation, negative_slope}.write(a);
        const int64_t C = a.shape.C;
        py::object kept = py::bool_(true);
        if (keep) {
            const py::array statistics = new_statistics(3, C);
            double *const mean = doubles(statistics), *const invstd = mean + 2 * C;
            for (int64_t c = 0; c < C; ++c) {
                mean[c] = double_at(a.moving_mean, c);
                mean[C + c] = double_at(a.moving_variance, c);
                invstd[c] = 1 / std::sqrt(double_at(a.moving_variance, c) + epsilon);
            }
            kept = statistics;
        }
        without_gil([&] { bnfast::infer(a); });
        return kept;
    });
}

// -> True; writes dx and, where given, dgamma, dbeta and dresidual
py::object grad(py::handle dy, py::handle x, py::handle dx, py::handle statistics, py::handle gamma, py::handle beta,
                bool training, int activation, double negative_slope, py::handle residual, py::handle y,
                py::handle dresidual, py::handle dgamma, py::handle dbeta) {
    return or_none([&]() -> py::object {
        const Tensor xv(x);
        GradArgs a;
        a.shape = batch_shape(xv);
        a.dtype = xv.dtype;
        a.x = xv.data;
        a.dy = required_like(dy, xv);
        a.dx = required_like(dx, xv);
        a.residual = like(residual, xv);
        a.y = like(y, xv);
        a.dresidual = like(dresidual, xv);
        const int64_t C = a.shape.C;
        const VectorReader vectors(C, a.dtype);
        a.gamma = vectors.read<ConstVector>(gamma);
        a.beta = vectors.read<ConstVector>(beta);
        const ParameterGradients made(vectors, dgamma, dbeta, C, a.dtype, 1);
        a.dgamma = made.gamma;
        a.dbeta = made.beta;
        double* const saved = statistics_of(statistics, 3, C);
        a.mean = {saved, DType::float64};
        a.invstd = {saved + 2 * C, DType::float64};
        a.training = training;
        Applied{activation, negative_slope}.write(a);
        without_gil([&] { bnfast::grad(a); });
        return py::bool_(true);
    });
}

// (N, A, C, S) in groups; for layer norm the last `axes` axes are one row of C values (groups = 0).
struct Grouping {
    GroupShape shape;
    int vector_axes;

    Grouping(const Tensor& x, int64_t groups, int axes) : vector_axes(groups ? 1 : axes) {
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
        const Tensor xv(x);
        const Grouping g(xv, groups, axes);
        GroupNormArgs a;
        a.shape = g.shape;
        a.dtype = xv.dtype;
        a.x = xv.data;
        a.y = required_like(y, xv);
        a.residual = like(residual, xv);
        const VectorReader vectors(a.shape.C, a.dtype);
        a.gamma = vectors.read<ConstVector>(gamma, g.vector_axes);
        a.beta = vectors.read<ConstVector>(beta, g.vector_axes);
        decline_unless(epsilon >= 0);
        a.epsilon = epsilon;
        Applied{activation, negative_slope}.write(a);
        const py::array statistics = new_statistics(2, g.rows());
        a.mean = doubles(statistics);
        a.invstd = a.mean + g.rows();
        without_gil([&] { bnfast::group_norm(a); });
        return statistics;
    });
}

py::object group_norm_grad(py::handle dy, py::handle x, py::handle dx, py::handle statistics, std::int64_t groups,
                           int axes, py::handle gamma, py::handle beta, int activation, double negative_slope,
                           py::handle residual, py::handle dresidual, py::handle dgamma, py::handle dbeta) {
    return or_none([&]() -> py::object {
        const Tensor xv(x);
        const Grouping g(xv, groups, axes);
        GroupNormGradArgs a;
        a.shape = g.shape;
        a.dtype = xv.dtype;
        a.x = xv.data;
        a.dy = required_like(dy, xv);
        a.dx = required_like(dx, xv);
        a.residual = like(residual, xv);
        a.dresidual = like(dresidual, xv);
        const VectorReader vectors(a.shape.C, a.dtype);
        a.gamma = vectors.read<ConstVector>(gamma, g.vector_axes);
        a.beta = vectors.read<ConstVector>(beta, g.vector_axes);
        const ParameterGradients made(vectors, dgamma, dbeta, a.shape.C, a.dtype, g.vector_axes);
        a.dgamma = made.gamma;
        a.dbeta = made.beta;
        a.mean = statistics_of(statistics, 2, g.rows());
        a.invstd = a.mean + g.rows();
        Applied{activation, negative_slope}.write(a);
        without_gil([&] { bnfast::group_norm_grad(a); });
        return py::bool_(true);
    });
}

}  // namespace

void define_tensor_functions(py::module_& m) {
    m.def("_torch_connect", &connect, "_torch_connect(tensor, parameter, /)\n--\n\nThe two types that are accepted.");
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
