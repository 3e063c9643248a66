// One pool a process, made by the first region that wants it and grown by those that want more. Between regions its
// threads sleep; they end, and are joined, with the process. A forked child has none of them, and uses none
// (usable_threads): the pool is left as it was.
#include "pool.h"

#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace igpt::cpu {
namespace {

class Pool {
  public:
    ~Pool() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
        }
        called_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    void run(int wanted, void (*work)(void*, int, int), void* context) {
        const std::unique_lock<std::mutex> only(region_, std::try_to_lock);
        const int count = only.owns_lock() ? grow(wanted) : 1;
        if (count > 1) {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = work;
            context_ = context;
            count_ = count;
            left_ = count - 1;
            ++regions_;
        }
        if (count > 1) called_.notify_all();
        work(context, 0, count);
        if (count == 1) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return left_ == 0; });
    }

  private:
    // How many there are of `wanted`, with the caller's.
    int grow(int wanted) {
        try {
            while (int(threads_.size()) + 1 < wanted)
                threads_.emplace_back(
                    [this, index = int(threads_.size()) + 1, seen = regions_] { serve(index, seen); });
        } catch (const std::system_error&) {  // no more to be had
        }
        return int(threads_.size()) + 1 < wanted ? int(threads_.size()) + 1 : wanted;
    }

    void serve(int index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            called_.wait(lock, [&] { return ends_ || regions_ != seen; });
            if (ends_) return;
            seen = regions_;
            if (index >= count_) continue;
            const auto work = work_;
            void* const context = context_;
            const int count = count_;
            lock.unlock();
            work(context, index, count);
            lock.lock();
            if (--left_ == 0) done_.notify_one();
        }
    }

    std::mutex region_;  // of who calls
    std::mutex mutex_;   // of what follows
    std::condition_variable called_, done_;
    void (*work_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    int count_ = 0, left_ = 0;
    uint64_t regions_ = 0;
    bool ends_ = false;
    std::vector<std::thread> threads_;  // whoever has region_ may add some
};

// Ends the pool with the process that made it; a child of that has its memory, and not its threads.
struct Owner {
    const pid_t process = getpid();
    Pool* const pool = new Pool;
    ~Owner() {
        if (getpid() == process) delete pool;
    }
};

}  // namespace

void in_pool(int wanted, void (*work)(void* context, int index, int count), void* context) {
    static const Owner owner;
    owner.pool->run(wanted, work, context);
}

}  // namespace igpt::cpu
