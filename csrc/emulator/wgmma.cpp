// Matrix products of warpgroups: each warp computes its own 16 rows, when it waits for them.
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "hopper_units.h"

namespace igpt::emulator {
namespace {

// A descriptor, read.
struct Operand {
    uint32_t start;
    uint32_t leading, stride;
    Major major;

    // The 8 elements of 16 bits that hold (row, k); they go on along K, or along the rows where that is the inner one.
    const uint16_t* piece(uint32_t row, uint32_t k, Where where) const {
        const uint32_t address = major == Major::k
                                     ? start + row / 8 * stride + row % 8 * 128 + k / 8 * 16
                                     : start + row / 64 * leading + row % 64 / 8 * 16 + k / 8 * stride + k % 8 * 128;
        const auto* at = shared_at("wgmma", swizzled(address), 16, 16, where);
        check_async_visible("wgmma", swizzled(address), where);
        return reinterpret_cast<const uint16_t*>(at);
    }
    uint16_t at(uint32_t row, uint32_t k, Where where) const {
        return piece(row, k, where)[major == Major::k ? k % 8 : row % 8];
    }
};

struct Product {
    Operand a, b;
    WgmmaArguments arguments;
    const uint32_t* fragments[32];
    float* d[32];
    std::vector<float> before;  // [32, n / 2]: what accumulation begins with, once no earlier one is in flight
    std::vector<const unsigned char*> reads;
    Where where;
};

struct Products : Unit {
    struct Warp {
        std::deque<Product> pending;  // oldest first
        size_t open = 0;              // of them, in no group yet
        std::deque<size_t> groups;    // how many products each has, oldest first
        bool fenced = false;
        size_t steps = 0;
        std::vector<const unsigned char*> reads;  // of the products that the last wait was for
    };
    std::map<int, Warp> warps;
    std::map<int, std::vector<std::string>> steps;  // by warpgroup: what its warps do, which must be the same

    void thread_ends() override {
        const auto& pending = warps[thread_number() / 32].pending;
        if (pending.empty()) return;
        fail("wgmma at " + text(pending.front().where) + ": its thread ends without having waited for it");
    }
    std::string left() const override {
        for (const auto& [number, warp] : warps) {
            const auto found = steps.find(number / 4);
            if (found != steps.end() && warp.steps != found->second.size()) {
                return "not all warps of a warpgroup reach " + found->second[warp.steps];
            }
        }
        return {};
    }
};

Products::Warp& own_warp() { return unit<Products>().warps[thread_number() / 32]; }

// In the last lane of a warp: one more instruction, in the order of the warpgroup.
void take_step(const std::string& step) {
    if (blockDim.x * blockDim.y * blockDim.z % 128 != 0) fail(step + ": the block does not consist of warpgroups");
    const int group = thread_number() / 128;
    auto& steps = unit<Products>().steps[group];
    for (int warp = 4 * group; warp < 4 * group + 4; ++warp) unit<Products>().warps[warp];
    auto& own = own_warp();
    if (own.steps == steps.size()) steps.push_back(step);
    if (steps[own.steps] != step) fail("the warps of a warpgroup disagree: " + step + " against " + steps[own.steps]);
    ++own.steps;
}

Operand read_descriptor(uint64_t bits, Major major, uint32_t rows, Where where) {
    const std::string what = "wgmma at " + text(where) + ": ";
    const auto field = [&](int shift) { return uint32_t(bits >> shift & 0x3fff) << 4; };
    const Operand operand{field(0), field(16), field(32), major};
    constexpr uint64_t kKnown = 0x3fff | uint64_t(0x3fff) << 16 | uint64_t(0x3fff) << 32 | uint64_t(3) << 62;
    if (bits >> 62 != 1) fail(what + "unsupported in the emulator: a descriptor without the 128-byte swizzle");
    if (bits & ~kKnown) fail(what + "unsupported in the emulator: a descriptor with a base offset or reserved bits");
    const bool in_row = major == Major::k && operand.start % 1024 <= 96 && operand.start % 32 == 0;
    if (!in_row && operand.start % 1024 != 0) {
        fail(what + "an operand at shared address " + std::to_string(operand.start) + ", which is not the start of a " +
             "swizzled tile, a multiple of 1024, nor a step of 32 bytes along K");
    }
    if (operand.stride % 1024 != 0 || operand.stride == 0) fail(what + "a stride that is not a multiple of 1024");
    if (major == Major::mn && rows > 64 && (operand.leading % 1024 != 0 || operand.leading == 0)) {
        fail(what + "a leading stride that is not a multiple of 1024");
    }
    return operand;
}

// The pieces of 16 bytes that a warp reads of an operand.
[[maybe_unused]] void list_reads(const Operand& operand, uint32_t first, uint32_t rows, Product& product) {
    const uint32_t row_step = operand.major == Major::k ? 1 : 8, k_step = operand.major == Major::k ? 8 : 1;
    for (uint32_t row = first; row < first + rows; row += row_step) {
        for (uint32_t k = 0; k < 16; k += k_step) {
            product.reads.push_back(reinterpret_cast<const unsigned char*>(operand.piece(row, k, product.where)));
        }
    }
}

uint32_t first_row() { return uint32_t(thread_number() / 32 % 4) * 16; }

void begin(const WgmmaArguments& own, void* const* lanes, Where where) {
    auto& warp = own_warp();
    if (!warp.fenced)
        fail("wgmma at " + text(where) + ": no wgmma_fence since the start, or the last wgmma_commit or wgmma_wait");
    Product product{};
    product.arguments = own;
    product.where = where;
    for (int l = 0; l < 32; ++l) {
        const auto& other = *static_cast<const WgmmaArguments*>(lanes[l]);
        if (other.a != own.a || other.b != own.b || other.accumulate != own.accumulate) {
            fail("wgmma at " + text(where) + ": the lanes of a warp have different descriptors or ways to accumulate");
        }
        product.fragments[l] = other.fragment;
        product.d[l] = other.d;
    }
    if (!own.fragment) product.a = read_descriptor(own.a, own.major_a, 64, where);
    product.b = read_descriptor(own.b, own.major_b, uint32_t(own.n), where);
    const size_t each = size_t(own.n / 2);
    product.before.resize(32 * each);
    for (size_t l = 0; l < 32; ++l) {
        std::memcpy(&product.before[l * each], product.d[l], each * sizeof(float));
        std::memset(product.d[l], 0xff, each * sizeof(float));
    }
#ifdef IGPT_TSAN
    if (!own.fragment) list_reads(product.a, first_row(), 16, product);
    list_reads(product.b, 0, uint32_t(own.n), product);
#endif
    warp.pending.push_back(std::move(product));
    ++warp.open;
    ++counting().wgmma;
}

// Element i of the accumulators of lane l.
uint32_t row_of(uint32_t l, uint32_t i) { return l / 4 + 8 * (i / 2 % 2); }
uint32_t column_of(uint32_t l, uint32_t i) { return i / 4 * 8 + 2 * (l % 4) + i % 2; }

// [32, n / 2], as the accumulators are.
std::vector<float> compute(const Product& p) {
    const uint32_t n = uint32_t(p.arguments.n), each = n / 2;
    const bool bfloat = p.arguments.bfloat;
    float a[16][16], b[16][128], c[16][128] = {};
    for (uint32_t l = 0; l < 32 && p.arguments.fragment; ++l) {
        for (uint32_t i = 0; i < 8; ++i) {
            const uint32_t bits = p.fragments[l][i / 2] >> 16 * (i % 2);
            a[l / 4 + 8 * (i / 2 % 2)][2 * (l % 4) + 8 * (i / 4) + i % 2] = wide(bits, bfloat);
        }
    }
    for (uint32_t m = 0; m < 16 && !p.arguments.fragment; ++m) {
        for (uint32_t k = 0; k < 16; ++k) a[m][k] = wide(p.a.at(first_row() + m, k, p.where), bfloat);
    }
    for (uint32_t k = 0; k < 16; ++k) {
        for (uint32_t j = 0; j < n; ++j) b[k][j] = wide(p.b.at(j, k, p.where), bfloat);
    }
    for (uint32_t l = 0; l < 32 && p.arguments.accumulate; ++l) {
        for (uint32_t i = 0; i < each; ++i) c[row_of(l, i)][column_of(l, i)] = p.before[l * each + i];
    }
    for (uint32_t m = 0; m < 16; ++m) {
        for (uint32_t k = 0; k < 16; ++k) {
            for (uint32_t j = 0; j < n; ++j) c[m][j] += a[m][k] * b[k][j];
        }
    }
    std::vector<float> d(32 * each);
    for (uint32_t l = 0; l < 32; ++l) {
        for (uint32_t i = 0; i < each; ++i) d[l * each + i] = c[row_of(l, i)][column_of(l, i)];
    }
    return d;
}

// Computes the oldest product, and hands the result to the next one in flight with the same accumulators, or back.
void finish_oldest(Products::Warp& warp) {
    const Product product = std::move(warp.pending.front());
    warp.pending.pop_front();
    std::vector<float> d = compute(product);
    warp.reads.insert(warp.reads.end(), product.reads.begin(), product.reads.end());
    for (Product& next : warp.pending) {
        if (next.d[0] != product.d[0]) continue;
        if (next.arguments.n != product.arguments.n) {
            fail("wgmma at " + text(next.where) + ": products in flight share part of their accumulators");
        }
        next.before = std::move(d);
        return;
    }
    const size_t each = size_t(product.arguments.n / 2);
    for (size_t l = 0; l < 32; ++l) {
        const auto* bytes = reinterpret_cast<const unsigned char*>(product.d[l]);
        if (std::any_of(bytes, bytes + each * sizeof(float), [](unsigned char x) { return x != 0xff; })) {
            fail("wgmma at " + text(product.where) + ": lane " + std::to_string(l) +
                 " has written to its accumulators before it waited for them");
        }
        std::memcpy(product.d[l], &d[l * each], each * sizeof(float));
    }
}

Pieces pieces(const std::vector<const unsigned char*>& list) { return {list.data(), list.size()}; }

}  // namespace

Pieces wgmma(const WgmmaArguments& arguments, Where where) {
    WgmmaArguments own = arguments;
    const Work work = [&](void* const* lanes) {
        take_step((own.fragment ? "wgmma_rs at " : "wgmma_ss at ") + text(where));
        begin(own, lanes, where);
    };
    collective(own.fragment ? "wgmma_rs" : "wgmma_ss", &own, work, where);
    return pieces(own_warp().pending.back().reads);
}

void wgmma_fence(Where where) {
    collective("wgmma_fence", nullptr, [&](void* const*) { own_warp().fenced = true; }, where);
}

void wgmma_commit(Where where) {
    const Work work = [&](void* const*) {
        take_step("wgmma_commit at " + text(where));
        auto& warp = own_warp();
        warp.fenced = false;  // each group of products has its own
        warp.groups.push_back(warp.open);
        warp.open = 0;
    };
    collective("wgmma_commit", nullptr, work, where);
}

Pieces wgmma_wait(int groups, Where where) {
    const Work work = [&](void* const*) {
        take_step("wgmma_wait at " + text(where));
        auto& warp = own_warp();
        warp.fenced = false;
        warp.reads.clear();
        for (; int(warp.groups.size()) > groups; warp.groups.pop_front()) {
            for (size_t i = 0; i < warp.groups.front(); ++i) finish_oldest(warp);
        }
    };
    collective("wgmma_wait", nullptr, work, where);
    return pieces(own_warp().reads);
}

}  // namespace igpt::emulator
