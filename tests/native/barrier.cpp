// Threads that meet many times at csrc/cpu/barrier.h: each writes a number of its own, and behind the barrier reads
// everybody's. Arguments: threads, rounds. Built with the thread sanitizer, which sees an order that is missing.
#include "cpu/barrier.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int, char** arguments) {
    const int count = std::atoi(arguments[1]), rounds = std::atoi(arguments[2]);
    igpt::cpu::Barrier barrier;
    std::vector<int> written(static_cast<size_t>(count));
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int index = 0; index < count; ++index)
        threads.emplace_back([&, index] {
            unsigned random = unsigned(index) + 1;
            for (int round = 1; round <= rounds; ++round) {
                random = random * 1664525u + 1013904223u;
                if (random >> 27 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random >> 8 & 255));
                written[size_t(index)] = round;
                barrier.wait(count);
                for (int other : written) wrong += other != round;
                barrier.wait(count);
            }
        });
    for (std::thread& thread : threads) thread.join();
    std::printf("%d wrong\n", wrong.load());
    return wrong != 0;
}
