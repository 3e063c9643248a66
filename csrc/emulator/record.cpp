#include "record.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>
#include <utility>

namespace igpt::emulator {
namespace {

std::mutex access;
bool recording = false;
std::vector<Launch> launches;

}  // namespace

void start_recording() {
    const std::lock_guard<std::mutex> lock(access);
    recording = true;
    launches.clear();
}

std::vector<Launch> stop_recording() {
    const std::lock_guard<std::mutex> lock(access);
    recording = false;
    return std::exchange(launches, {});
}

bool record(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
    const std::lock_guard<std::mutex> lock(access);
    if (!recording) return false;
    Dl_info info;
    if (dladdr(kernel, &info) == 0) throw std::runtime_error("emulator: a launch of what is no function of a module");
    const uint64_t base = reinterpret_cast<uint64_t>(info.dli_fbase);
    launches.push_back({reinterpret_cast<uint64_t>(kernel) - base, grid, block, shared_bytes});
    return true;
}

}  // namespace igpt::emulator
