// driver OP [brief]: runs the kernels of one op on odd shapes under every schedule, in memory of the exact size, for
// the sanitizers. It looks at no result: the tests of the op do.
#include "driver.h"

#include <cstdio>
#include <exception>
#include <map>
#include <string>

#include "emulator.h"

namespace {

std::map<std::string, void (*)(bool)>& cases() {
    static std::map<std::string, void (*)(bool)> all;
    return all;
}

}  // namespace

driver::Case::Case(const char* name, void (*run)(bool brief)) { cases()[name] = run; }

int main(int argc, char** argv) {
    using igpt::emulator::Order;
    const std::string op = argc > 1 ? argv[1] : "";
    const bool brief = argc > 2;
    if (!cases().count(op)) {
        std::fprintf(stderr, "no case %s\n", op.c_str());
        return 2;
    }
    try {
        for (Order order : {Order::random, Order::skewed, Order::fifo}) {
            igpt::emulator::set_schedule({order, 1});
            cases()[op](brief);
            if (brief) break;  // races do not depend on the schedule
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    std::puts("done");
    return 0;
}
