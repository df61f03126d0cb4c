#pragma once

namespace bnfast::test {

enum Refusal {
    nothing = 0,
    threads = 1,
    thread_attributes = 2,
    thread_values = 4,
    reading_affinity = 8,
    setting_affinity = 16,
    fork_handlers = 32
};
// Until the next call these functions fail; of threads, all but the first few.
void refuse(int functions, int threads_first = 0);

}  // namespace bnfast::test
