// Causal attention, the drivers: memory, threads, and the kernels of the chosen instruction set.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "ops.h"
#include "region.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kQueries = 128;  // the fewest of a share: every share packs the keys and values it sees

// Calls work(item, scratch of its thread) for all items, the last first: those are the longest. What is stored in fp32
// may be denormal.
template <class Work>
void share_out(int64_t items, Format format, int wanted, int64_t scratch, Work work) {
    const int threads = int(std::min<int64_t>(usable_threads(wanted), items));
    const int64_t each = padded(scratch, 4096);
    char* memory = workspace(each * threads);
    std::atomic<int64_t> left{items};
    in_region(
        threads,
        [&](int index, int) {
            for (int64_t i; (i = left.fetch_sub(1, std::memory_order_relaxed) - 1) >= 0;)
                work(i, memory + each * index);
        },
        format != Format::fp32);
}

const CausalAttentionKernels& kernels_for(Format format) {
    if (format != Format::fp32 && format != Format::bf16)
        throw std::invalid_argument("causal_attention: format " + std::to_string(int(format)) + "; want fp32 or bf16");
    return ops().causal_attention[int(format)];
}

}  // namespace

void causal_attention_fwd(const CausalAttentionParams& p) {
    const CausalAttentionKernels& kernels = kernels_for(p.format);
    const int64_t heads = p.batch * p.heads;
    if (heads <= 0 || p.t_q <= 0) return;
    // Few heads are cut into shares of their queries, so that there is work for all threads.
    const int64_t most = (p.t_q + kQueries - 1) / kQueries, wanted = (4 * int64_t(p.threads) + heads - 1) / heads;
    const int64_t shares = p.threads == 1 || heads >= 2 * p.threads ? 1 : std::min(most, wanted);
    const int64_t strips = (p.t_q + 31) / 32;
    share_out(heads * shares, p.format, p.threads, kernels.fwd_scratch(p), [&](int64_t item, char* scratch) {
        const int64_t share = item / heads;
        kernels.fwd(p, item % heads, strips * share / shares * 32, std::min(p.t_q, strips * (share + 1) / shares * 32),
                    scratch);
    });
}

void causal_attention_bwd(const CausalAttentionGradParams& p) {
    const CausalAttentionKernels& kernels = kernels_for(p.of.format);
    const int64_t heads = p.of.batch * p.of.heads;
    if (heads <= 0 || p.of.t_k <= 0) return;
    share_out(heads, p.of.format, p.of.threads, kernels.bwd_scratch(p.of),
              [&](int64_t head, char* scratch) { kernels.bwd(p, head, scratch); });
}

}  // namespace igpt::cpu
