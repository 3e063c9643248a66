// The processors that the threads of this process may use.
#pragma once

#include <string>

namespace igpt::cpu {

struct Limits {
    int mask;      // processors of the calling thread's affinity mask; 0: the system does not say
    double quota;  // processors' time that the control groups give, cpu.max or cpu.cfs_quota_us; 0: no limit
};

// `root` stands before the paths of the control groups' files: "" but in tests.
Limits thread_limits(const std::string& root);

}  // namespace igpt::cpu
