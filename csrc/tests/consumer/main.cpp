// Trains on two channels with known results: (1, 3) and (10, 10). Exits with 1 if a result is wrong.
#include <bnfast/bnfast.h>

#include <cmath>
#include <cstdio>
#include <stdexcept>

int main() {
    const float x[4] = {1, 10, 3, 10};
    float y[4], moving_mean[2] = {0, 0}, moving_variance[2] = {1, 1};
    double mean[2], variance[2], invstd[2];
    const std::int64_t dims[2] = {2, 2};
    bnfast::TrainArgs args;
    args.x = x;
    args.y = y;
    args.shape = bnfast::shape_of(dims, 2, -1);
    args.epsilon = 0;
    args.momentum = 0.5;
    args.moving_mean = {moving_mean, bnfast::DType::float32};
    args.moving_variance = {moving_variance, bnfast::DType::float32};
    args.mean = mean;
    args.variance = variance;
    args.invstd = invstd;
    const bool correct = bnfast::train(args) == 2 && mean[0] == 2 && mean[1] == 10 && variance[0] == 1 &&
                         variance[1] == 0 && y[0] == -1 && y[2] == 1 && y[1] == 0 && y[3] == 0 && moving_mean[0] == 1 &&
                         moving_variance[1] == 0.5f;
    args.epsilon = -1;
    bool threw = false;
    try {
        bnfast::train(args);
    } catch (const std::invalid_argument&) {
        threw = true;
    }
    std::printf("bnfast %s on %s, %d threads: %s\n", BNFAST_VERSION, bnfast::isa_name().c_str(),
                bnfast::get_num_threads(), correct && threw ? "correct" : "WRONG");
    return correct && threw ? 0 : 1;
}
