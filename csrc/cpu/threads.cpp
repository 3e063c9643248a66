// How many threads a region may have: what is asked for, no more than the processors that may run them, and
// fewer while others want those.
#include "threads.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "ops.h"
#include "watch.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kLimits = 500000000;  // nanoseconds between two looks at mask and quota, which may change

std::atomic<bool> forked{false};

void in_child() { forked.store(true, std::memory_order_relaxed); }

const int registered = pthread_atfork(nullptr, nullptr, in_child);

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
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
    return after_giving_way(std::min(wanted, processors()));
}

}  // namespace igpt::cpu
