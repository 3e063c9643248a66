// How many OpenMP threads a region may have: what is asked for, the processors that may run them, and fewer while
// others want those too.
//
// A team waits for its slowest thread. Where that waits for a processor, because another process runs there, the others
// wait with it, by OpenMP's way spinning for milliseconds, and two processes together do a fraction of what one does.
// So each thread of a region looks now and then how long it was ready to run and did not (Linux's schedstat). Where
// that was a tenth of the time, regions have half as many threads, down to one, which has nobody to wait for. After a
// time, longer after each attempt that fails, they have twice as many again. No result depends on the number of
// threads.
#include "threads.h"

#include <pthread.h>
#ifdef __linux__
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "ops.h"
#include "region.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kMillisecond = 1000000;
constexpr int64_t kLook = 5 * kMillisecond;          // between two looks of a thread
constexpr int64_t kStale = 200 * kMillisecond;       // a look before that says nothing about the regions since
constexpr int64_t kFirstPause = 100 * kMillisecond;  // with fewer threads; doubled up to kLastPause
constexpr int64_t kLastPause = 3200 * kMillisecond;
constexpr int64_t kLimits = 500 * kMillisecond;  // the mask and the quota may change

std::atomic<bool> forked{false};

void in_child() { forked.store(true, std::memory_order_relaxed); }

const int registered = pthread_atfork(nullptr, nullptr, in_child);

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// Nanoseconds that the calling thread has been ready to run and did not; -1: the system does not say.
int64_t delayed() {
#ifdef __linux__
    const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    char text[96];
    const ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    long long ran = 0, waited = 0;
    text[std::max<ssize_t>(size, 0)] = 0;
    return std::sscanf(text, "%lld %lld", &ran, &waited) == 2 ? waited : -1;
#else
    return -1;
#endif
}

// What the threads of all regions know together.
std::atomic<int> halvings{0};
std::atomic<int64_t> changed{0}, rest{kFirstPause};

// The processors are wanted by others: fewer threads, for longer where the last attempt with more came to nothing.
void give_way(int64_t time, int count) {
    int64_t last = changed.load(std::memory_order_relaxed);
    if (count < 2 || time - last < kLook || !changed.compare_exchange_strong(last, time)) return;
    const int64_t before = rest.load(std::memory_order_relaxed);
    rest.store(time - last > kStale ? kFirstPause : std::min(2 * before, kLastPause), std::memory_order_relaxed);
    halvings.store(std::min(halvings.load(std::memory_order_relaxed) + 1, 16), std::memory_order_relaxed);
}

int allowed(int threads) {
    const int halved = halvings.load(std::memory_order_relaxed);
    if (halved == 0) return threads;
    const int64_t time = now();
    int64_t last = changed.load(std::memory_order_relaxed);
    if (time - last > rest.load(std::memory_order_relaxed) && changed.compare_exchange_strong(last, time))
        halvings.store(std::max(halved - 1, 0), std::memory_order_relaxed);
    return std::max(1, threads >> std::min(halvings.load(std::memory_order_relaxed), 16));
}

int processors() {
    static std::atomic<int> known{0};
    static std::atomic<int64_t> asked{0};
    const int64_t time = now();
    if (known.load(std::memory_order_relaxed) == 0 || time - asked.load(std::memory_order_relaxed) > kLimits) {
        asked.store(time, std::memory_order_relaxed);
        const Limits limits = thread_limits("");
        int least = limits.mask > 0 ? limits.mask : INT_MAX;
        if (limits.quota > 0) least = std::min(least, std::max(1, int(std::ceil(limits.quota))));
        known.store(least, std::memory_order_relaxed);
    }
    return known.load(std::memory_order_relaxed);
}

int mask() {
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return 0;
}

// The processors of one group's files; 0: no limit, or no such file.
double quota_in(const std::string& folder) {
    double time = 0, period = 0;
    std::string text;
    if (std::ifstream both(folder + "/cpu.max"); both >> text >> period) {
        time = std::strtod(text.c_str(), nullptr);  // "max" is 0
    } else {
        std::ifstream(folder + "/cpu.cfs_quota_us") >> time;
        std::ifstream(folder + "/cpu.cfs_period_us") >> period;
    }
    return time > 0 && period > 0 ? std::min(time / period, 1e6) : 0;
}

// The smallest quota of a group and those above it; a container may see its own as the root.
double quota(const std::string& root) {
    double least = 0;
    std::ifstream groups(root + "/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {
        std::istringstream parts(line);
        std::string number, names, path;
        if (!std::getline(parts, number, ':') || !std::getline(parts, names, ':') || !std::getline(parts, path))
            continue;
        if (!names.empty() && ("," + names + ",").find(",cpu,") == std::string::npos) continue;
        const std::string mounts[] = {names.empty() ? "" : "/" + names, names.empty() ? "/unified" : "/cpu"};
        for (const std::string& mount : mounts)
            for (std::string at = path;; at.resize(at.rfind('/'))) {
                const double found = quota_in(root + "/sys/fs/cgroup" + mount + at);
                if (found > 0 && (least == 0 || found < least)) least = found;
                if (at.find('/') == std::string::npos) break;
            }
    }
    return least;
}

}  // namespace

Limits thread_limits(const std::string& root) { return {mask(), quota(root)}; }

int usable_threads(int wanted) {
    if (wanted < 2 || registered != 0 || forked.load(std::memory_order_relaxed)) return 1;
    return allowed(std::min(wanted, processors()));
}

void look_around(int count) {
    static thread_local int64_t looked = 0, before = -1;
    const int64_t time = now(), passed = time - looked;
    if (passed < kLook) return;
    const int64_t waited = delayed();
    if (passed < kStale && before >= 0 && waited >= 0 && 10 * (waited - before) > passed) give_way(time, count);
    looked = time;
    before = waited;
}

}  // namespace igpt::cpu
