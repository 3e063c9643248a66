// In place of csrc/cpu/isa/choice.cpp, for tests: the tables that IGPT_LEVELS names, of which the last is chosen.
#include <atomic>
#include <cstring>

#include "cpu/ops.h"

namespace igpt::cpu {
namespace {

const Isa every[] = {IGPT_LEVELS};
constexpr int count = int(sizeof every / sizeof *every);
std::atomic<const Ops*> chosen{nullptr};

}  // namespace

int isas(Isa* out) {
    for (int i = 0; i < count; ++i) out[i] = every[i];
    return count;
}

bool by_amd() { return false; }

const Ops& ops() {
    const Ops* table = chosen.load(std::memory_order_relaxed);
    return table != nullptr ? *table : *every[count - 1].table;
}

bool select_isa(const char* name) {
    for (const Isa& isa : every)
        if (std::strcmp(isa.table->isa, name) == 0) {
            chosen.store(isa.table, std::memory_order_relaxed);
            return true;
        }
    return false;
}

}  // namespace igpt::cpu
