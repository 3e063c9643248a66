// The scheduler: clusters of blocks one after another, their threads by turns.
#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "accesses.h"
#include "threads.h"

#ifdef IGPT_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace igpt::emulator {

Cluster* cluster = nullptr;
Block* block = nullptr;  // the running thread's
Thread* current = nullptr;

namespace {

constexpr size_t kMaxShared = 227 * 1024;
constexpr unsigned kMaxCluster = 8;
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kSharedOffset = kSharedBase % kSharedAlignment;

Schedule schedule;
uint64_t clusters_begun = 0;
uint64_t first_block = 0, block_count = kAllBlocks;
std::atomic<int> device_capability{80}, device_multiprocessors{132};
Counters total{};
std::mutex one_launch;
const std::function<void()>* kernel = nullptr;
char launch_sync, grid_sync;  // the host's memory before the launch, the threads' after it

void enter(Block* next) {
    block = next;
    blockIdx = next->index;
}

Thread* take(std::vector<Thread*>& from, size_t i) {
    std::swap(from[i], from.back());
    Thread* thread = from.back();
    from.pop_back();
    return thread;
}

Thread* next_thread_of_block() {
    if (schedule.order == Order::fifo) {
        if (block->queue.empty()) return nullptr;
        Thread* thread = block->queue.front();
        block->queue.pop_front();
        return thread;
    }
    if (schedule.order == Order::skewed) {
        for (size_t warp : block->priority) {
            std::vector<Thread*>& ready = block->ready[warp];
            if (!ready.empty()) return take(ready, block->random() % ready.size());
        }
        return nullptr;
    }
    size_t count = 0;
    for (const auto& ready : block->ready) count += ready.size();
    if (count == 0) return nullptr;
    size_t i = block->random() % count;
    for (auto& ready : block->ready) {
        if (i < ready.size()) return take(ready, i);
        i -= ready.size();
    }
    return nullptr;
}

// Tries the blocks of the cluster by turns, at random, or the last one first, and goes to the one that has a thread.
Thread* next_thread() {
    const size_t count = cluster->blocks.size();
    size_t first = 0;
    if (schedule.order == Order::fifo) first = cluster->turn++;
    if (schedule.order == Order::random && count > 1) first = cluster->random() % count;
    for (size_t i = 0; i < count; ++i) {
        const size_t at = schedule.order == Order::skewed ? count - 1 - i : (first + i) % count;
        enter(cluster->blocks[at].get());
        if (Thread* thread = next_thread_of_block()) return thread;
    }
    return nullptr;
}

// The body of every fibre.
void run_thread() {
    current->fibre.arrive();
    acquire(&launch_sync);
    (*kernel)();
    for (const auto& unit : block->units) unit.second->thread_ends();
    if (current->cluster_arrivals != current->cluster_waits) fail("a thread ends without cluster_wait");
    if (block->live == 1) end_accesses();
    current->ended = true;
    --block->live;
    settle_cluster();
    release(&grid_sync);
    current->fibre.suspend(true);
    std::terminate();  // nobody resumes it
}

// Calls f(unit) for the units of all blocks, each while its block is the running one.
template <class F>
void each_unit(F f) {
    for (const auto& one : cluster->blocks) {
        enter(one.get());
        for (const auto& unit : block->units) f(*unit.second);
    }
}

std::string describe_standstill() {
    std::map<std::string, std::pair<int, std::string>> groups;
    std::string units;
    for (const auto& one : cluster->blocks) {
        enter(one.get());
        for (const Thread& thread : block->threads) {
            const std::string state =
                thread.ended ? "ended" : "waiting in " + thread.waits_in + " at " + text(thread.where);
            auto& group = groups[state];
            if (group.first++ == 0) group.second = text(thread);
        }
    }
    each_unit([&](const Unit& unit) { units += unit.standstill(); });
    std::string message = "deadlock:";
    for (const auto& [state, group] : groups) {
        message += " " + std::to_string(group.first) + " threads " + state + " (the first: " + group.second + ");";
    }
    return message + units;
}

// Memory that ends where an address sanitizer sees it, and begins so, at kSharedBase modulo 1024.
class SharedMemory {
  public:
    explicit SharedMemory(size_t bytes) {
        if (posix_memalign(&memory_, kSharedAlignment, kSharedOffset + bytes)) throw std::bad_alloc();
        std::memset(data(), 0xff, bytes);
#ifdef IGPT_ASAN
        __asan_poison_memory_region(memory_, kSharedOffset);
#endif
    }
    ~SharedMemory() {
#ifdef IGPT_ASAN
        __asan_unpoison_memory_region(memory_, kSharedOffset);
#endif
        std::free(memory_);
    }
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    unsigned char* data() const { return static_cast<unsigned char*>(memory_) + kSharedOffset; }

  private:
    void* memory_ = nullptr;
};

std::string first_error() {
    for (const auto& one : cluster->blocks) {
        if (!one->error.empty()) return one->error;
    }
    return {};
}

void add_block(uint64_t number, dim3 size, const SharedMemory& shared, size_t shared_bytes) {
    const uint64_t plane = uint64_t(gridDim.x) * gridDim.y;
    const uint3 at{unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y), unsigned(number / plane)};
    const uint64_t seed = schedule.seed * 0x9e3779b97f4a7c15u + number;
    cluster->blocks.push_back(std::make_unique<Block>(at, size, seed, total));
    Block& now = *cluster->blocks.back();
    now.shared = shared.data();
    now.shared_bytes = shared_bytes;
    now.live = now.threads.size();
    const size_t before = (cluster->blocks.size() - 1) * now.threads.size();
    for (size_t i = 0; i < now.threads.size(); ++i) {
        Thread& thread = now.threads[i];
        const unsigned n = unsigned(i);
        thread.block = &now;
        thread.number = int(i);
        thread.index = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
        thread.fibre.start(int(before + i), int(clusters_begun % 2), run_thread);
        make_ready(&thread);
    }
}

// Runs the `count` blocks from number `first` on at the same time.
void run_cluster(uint64_t first, unsigned count, dim3 size, size_t shared_bytes) {
    // On the heap: when it is freed, the thread sanitizer forgets its barriers, which order nothing among clusters.
    const auto owner = std::make_unique<Cluster>();
    cluster = owner.get();
    cluster->random.seed(schedule.seed + first);
    std::deque<SharedMemory> shared;
    for (unsigned i = 0; i < count; ++i) add_block(first + i, size, shared.emplace_back(shared_bytes), shared_bytes);
    ++clusters_begun;
    std::string error;
    while ((error = first_error()).empty()) {
        current = next_thread();
        if (!current) {
            if (cluster->live() == 0) each_unit([&](const Unit& unit) { error += unit.left(); });
            bool any = false;
            if (error.empty()) each_unit([&](Unit& unit) { any |= unit.advance(); });
            if (any) continue;
            break;
        }
        threadIdx = current->index;
        current->fibre.resume();
    }
    if (error.empty() && cluster->live() > 0) error = describe_standstill();
    for (const auto& one : cluster->blocks) {
        one->requests.finish();
        for (Thread& thread : one->threads) thread.fibre.destroy(thread.ended);
    }
    cluster = nullptr;
    block = nullptr;
    current = nullptr;
    if (!error.empty()) throw std::runtime_error("emulator: " + error);
}

void check_launch(dim3 grid, dim3 size, size_t shared_bytes, unsigned cluster_size) {
    const uint64_t threads = uint64_t(size.x) * size.y * size.z;
    const bool good_grid =
        grid.x >= 1 && grid.x <= INT32_MAX && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
    if (threads < 1 || threads > 1024 || size.z > 64 || !good_grid || shared_bytes > kMaxShared) {
        throw std::runtime_error("emulator: a launch outside the limits: grid " + std::to_string(grid.x) + ", " +
                                 std::to_string(grid.y) + ", " + std::to_string(grid.z) + "; " +
                                 std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
                                 " bytes of shared memory");
    }
    if (cluster_size < 1 || cluster_size > kMaxCluster || grid.x % cluster_size != 0) {
        throw std::runtime_error("emulator: clusters of " + std::to_string(cluster_size) + " blocks in a grid of " +
                                 std::to_string(grid.x));
    }
}

uint64_t chosen_blocks(uint64_t blocks) {
    if (first_block >= blocks) {
        throw std::runtime_error("emulator: set_blocks chose blocks from " + std::to_string(first_block) +
                                 "; the launch has " + std::to_string(blocks));
    }
    return std::min(block_count, blocks - first_block);
}

}  // namespace

std::string text(const Thread& thread) {
    const auto triple = [](auto i) {
        return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
    };
    return "thread " + triple(thread.index) + " of block " + triple(blockIdx);
}

void make_ready(Thread* thread) {
    thread->waits_in.clear();
    if (schedule.order == Order::fifo) {
        thread->block->queue.push_back(thread);
    } else {
        thread->block->ready[size_t(thread->warp())].push_back(thread);
    }
}

std::string text(Where where) { return std::string(where.file) + ":" + std::to_string(where.line); }

void fail(const std::string& message) {
    block->error = message + "; " + text(*current);
    for (;;) current->fibre.suspend(false);
}

void fail_block(const std::string& message) { block->error = message; }

uint64_t choose(uint64_t n) { return schedule.order == Order::fifo ? 0 : block->random() % n; }

Counters& counting() { return total; }

Thread* running() { return current; }

int thread_number() { return current->number; }

void sleep(const std::string& name, Where where) { wait(name, where); }

void wake(Thread* thread) { make_ready(thread); }

size_t shared_bytes() { return block->shared_bytes; }

unsigned char* shared_at(const char* name, uint32_t address, size_t bytes, size_t alignment, Where where) {
    const bool inside = address >= kSharedBase && address + bytes <= kSharedBase + block->shared_bytes;
    if (inside && address % alignment == 0) return block->shared + (address - kSharedBase);
    const std::string what = std::string(name) + " at " + text(where) + ": shared address " + std::to_string(address);
    if (inside) fail(what + ": not aligned to " + std::to_string(alignment));
    fail(what + " and " + std::to_string(bytes) + " bytes: outside the block's " + std::to_string(block->shared_bytes) +
         ", which begin at " + std::to_string(kSharedBase));
}

std::unique_ptr<Unit>& unit_place(std::type_index type) { return block->units[type]; }

void synchronize() {
    const std::lock_guard<std::mutex> lock(one_launch);
    begin_accesses(false);
}

void set_schedule(Schedule wanted) {
    const std::lock_guard<std::mutex> lock(one_launch);
    schedule = wanted;
}

void set_capability(int ten_times) { device_capability = ten_times; }

int capability() { return device_capability; }

void set_multiprocessors(int count) { device_multiprocessors = count; }

int multiprocessors() { return device_multiprocessors; }

int resident_blocks(unsigned threads, size_t shared_bytes, unsigned cluster_size) {
    const size_t by_shared = (kMaxShared + 1024) / (shared_bytes + 1024);
    const unsigned each = unsigned(std::min<size_t>(2048 / threads, by_shared));
    return int(each * unsigned(device_multiprocessors) / cluster_size * cluster_size);
}

void set_blocks(uint64_t first, uint64_t count) {
    const std::lock_guard<std::mutex> lock(one_launch);
    if (count == 0) throw std::runtime_error("emulator: set_blocks chose no block");
    first_block = first;
    block_count = count;
}

Counters counters() {
    const std::lock_guard<std::mutex> lock(one_launch);
    return total;
}

void reset_counters() {
    const std::lock_guard<std::mutex> lock(one_launch);
    total = {};
}

void launch(dim3 grid, dim3 size, size_t shared_bytes, unsigned cluster_size, bool dependent,
            const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> lock(one_launch);
    check_launch(grid, size, shared_bytes, cluster_size);
    begin_accesses(dependent);
    kernel = &thread;
    gridDim = grid;
    blockDim = size;
    ++total.launches;
    release(&launch_sync);
    // The clusters of the chosen blocks.
    const uint64_t count = chosen_blocks(uint64_t(grid.x) * grid.y * grid.z), from = first_block / cluster_size;
    std::vector<uint64_t> order((first_block + count + cluster_size - 1) / cluster_size - from);
    for (size_t i = 0; i < order.size(); ++i) order[i] = from + i;
    if (schedule.order == Order::skewed) std::reverse(order.begin(), order.end());
    if (schedule.order == Order::random) {
        std::shuffle(order.begin(), order.end(), std::mt19937_64(schedule.seed));
    }
    for (uint64_t i : order) run_cluster(i * cluster_size, cluster_size, size, shared_bytes);
    acquire(&grid_sync);
}

unsigned char* dynamic_shared() { return block->shared; }

int lane() { return current->lane(); }

unsigned char* cluster_shared(const void* own, size_t bytes, unsigned rank, Where where) {
    const std::string what =
        "shared memory of block " + std::to_string(rank) + " of a cluster at " + text(where) + ": ";
    const uint64_t offset = reinterpret_cast<uint64_t>(own) - reinterpret_cast<uint64_t>(block->shared);
    if (rank >= cluster->blocks.size()) fail(what + "it has " + std::to_string(cluster->blocks.size()));
    if (offset + bytes > block->shared_bytes) fail(what + "outside");
    if (current->cluster_waits == 0) fail(what + "the block may not have begun: cluster_wait comes first");
    if (cluster->blocks[rank]->live == 0) fail(what + "the block has ended");
    return cluster->blocks[rank]->shared + offset;
}

void trap(Where where) { fail("__trap at " + text(where)); }

}  // namespace igpt::emulator
