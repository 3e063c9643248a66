// What tests/test_pool.py runs of csrc/cpu/pool.h: regions of 1 to 7 threads that meet inside, two at once, one in a
// forked child, and at the end of the process. Prints what it has found.
#include "cpu/pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/barrier.h"

namespace {

struct Meeting {
    igpt::cpu::Barrier barrier;
    std::atomic<int> seen[8] = {}, counts{0};
};

void meet(void* context, int index, int count) {
    auto& all = *static_cast<Meeting*>(context);
    all.seen[index].fetch_add(1);
    all.barrier.wait(count);  // returns when all are there at once
    all.counts.fetch_add(count);
}

// Whether `wanted` threads, or the caller's alone, came once each.
bool meets(int wanted) {
    Meeting all;
    igpt::cpu::in_pool(wanted, meet, &all);
    int came = 0;
    for (const auto& each : all.seen) came += each.load();
    return (came == wanted || came == 1) && all.seen[0] == 1 && all.counts == came * came;
}

// Ends after all that main has made.
struct Late {
    const pid_t process = getpid();
    ~Late() {
        if (getpid() == process) std::printf("late %d\n", meets(3));
    }
};
const Late late;

}  // namespace

int main() {
    int right = 0;
    for (int round = 0; round < 300; ++round)
        for (int wanted : {1, 2, 3, 7, 2}) right += meets(wanted);
    std::printf("alone %d\n", right);
    std::atomic<int> both{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < 2; ++i)
        callers.emplace_back([&] {
            for (int round = 0; round < 300; ++round) both += meets(3);
        });
    for (std::thread& each : callers) each.join();
    std::printf("at once %d\n", both.load());
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        igpt::cpu::in_pool(1, [](void*, int, int) {}, nullptr);
        std::exit(7);  // where the pool's threads are not
    }
    int status = 0;
    waitpid(child, &status, 0);
    std::printf("child %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}
