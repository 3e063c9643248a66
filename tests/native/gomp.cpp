// What csrc/cpu uses of OpenMP's library, of threads that begin and end with their region, for the thread sanitizer: of
// libgomp, which it does not see into, it would report every region.
#include <thread>
#include <vector>

namespace {

struct Place {
    int index = 0, count = 1;
};
thread_local Place here;

void run(Place place, void (*work)(void*), void* data) {
    const Place before = here;
    here = place;
    work(data);
    here = before;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return here.index; }
int omp_get_num_threads() { return here.count; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
    const int count = threads > 0 ? int(threads) : 1;
    std::vector<std::thread> others;
    for (int i = 1; i < count; ++i) others.emplace_back(run, Place{i, count}, work, data);
    run({0, count}, work, data);
    for (std::thread& other : others) other.join();
}
}
