// What csrc/cpu uses of OpenMP's library, of threads that begin and end with their region, for the thread sanitizer: of
// libgomp, which it does not see into, it would report every region. A loop's share is taken without ordering memory,
// so that nothing but the start, the end and a barrier of a region hides a race.
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

constexpr int kLoops = 64;  // of a region

struct Team {
    explicit Team(unsigned threads) : count(threads) { pthread_barrier_init(&barrier, nullptr, threads); }
    ~Team() { pthread_barrier_destroy(&barrier); }
    const unsigned count;
    std::atomic<long> taken[kLoops] = {};
    pthread_barrier_t barrier;
};

struct Place {
    Team* team = nullptr;
    int index = 0, loops = 0;
    long start = 0, increment = 1, chunk = 1, chunks = 0, end = 0;
};
thread_local Place here;

void run(Team* team, int index, void (*work)(void*), void* data) {
    const Place before = here;
    here = {};
    here.team = team;
    here.index = index;
    work(data);
    here = before;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return here.index; }
int omp_get_num_threads() { return here.team != nullptr ? int(here.team->count) : 1; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
    Team team(threads > 0 ? threads : 1);
    std::vector<std::thread> others;
    for (unsigned i = 1; i < team.count; ++i) others.emplace_back(run, &team, int(i), work, data);
    run(&team, 0, work, data);
    for (std::thread& other : others) other.join();
}

void GOMP_barrier() { pthread_barrier_wait(&here.team->barrier); }

bool GOMP_loop_nonmonotonic_dynamic_next(long* start, long* end) {
    const long chunk = here.team->taken[here.loops - 1].fetch_add(1, std::memory_order_relaxed);
    if (chunk >= here.chunks) return false;
    const long step = here.increment * here.chunk, last = here.start + (chunk + 1) * step;
    *start = here.start + chunk * step;
    *end = (here.increment > 0) == (last < here.end) ? last : here.end;
    return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long increment, long chunk, long* first, long* last) {
    if (here.loops++ == kLoops) __builtin_trap();
    here.start = start;
    here.end = end;
    here.increment = increment;
    here.chunk = chunk;
    const long count = (end - start + increment + (increment > 0 ? -1 : 1)) / increment;
    here.chunks = count > 0 ? (count + chunk - 1) / chunk : 0;
    return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}
}
