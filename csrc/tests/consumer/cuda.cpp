// Trains on two channels with known results, on the driver of the tests, whose device memory is the host's. Its
// argument is a folder with fatbins. Without a driver the call must say so. Exits with 1 if anything is wrong.
#include <bnfast/cuda.h>

#include <cstdio>
#include <cstring>

int main(int argc, char** argv) {
    alignas(16) const float x[4] = {1, 10, 3, 10};
    alignas(16) float y[4];
    double mean[2], variance[2], invstd[2];
    alignas(256) static unsigned char scratch[1 << 16];
    const std::int64_t dims[2] = {2, 2};
    bnfast::TrainArgs args;
    args.x = x;
    args.y = y;
    args.shape = bnfast::shape_of(dims, 2, -1);
    args.epsilon = 0;
    args.mean = mean;
    args.variance = variance;
    args.invstd = invstd;
    bool correct = false;
    try {
        if (argc > 1) bnfast::cuda::set_image_folder(argv[1]);
        correct = bnfast::cuda::scratch_bytes(args) <= sizeof scratch;
        bnfast::cuda::train(args, {nullptr, scratch});
        correct = correct && mean[0] == 2 && mean[1] == 10 && variance[0] == 1 && variance[1] == 0 && y[0] == -1 &&
                  y[2] == 1 && y[1] == 0 && y[3] == 0;
    } catch (const bnfast::cuda::Error& e) {
        correct = argc == 1 && std::strstr(e.what(), "no NVIDIA driver");
        std::printf("%s\n", e.what());
    }
    std::printf("%s\n", correct ? "correct" : "WRONG");
    return correct ? 0 : 1;
}
