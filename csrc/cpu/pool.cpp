// One pool a process, made by the first region that wants it and grown by those that want more. Its threads sleep until
// a region wants them, also while the process ends: nothing is taken from under a region of then. A forked child has
// none of them, and uses none (usable_threads).
#include "pool.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

namespace igpt::cpu {
namespace {

class Pool {
  public:
    void run(int wanted, void (*work)(void*, int, int), void* context) noexcept {
        const std::unique_lock<std::mutex> only(region_, std::try_to_lock);
        const int count = only.owns_lock() ? std::min(wanted, 1 + grow(wanted - 1)) : 1;
        if (count == 1) return work(context, 0, 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = work;
            context_ = context;
            count_ = count;
            left_ = count - 1;
            for (int i = 0; i < count - 1; ++i) others_[size_t(i)].called = true;
        }
        for (int i = 0; i < count - 1; ++i) others_[size_t(i)].calls.notify_one();
        work(context, 0, count);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return left_ == 0; });
    }

  private:
    struct Other {
        std::condition_variable calls;
        bool called = false;
    };

    // How many there are beside the caller, of `wanted` or from before.
    int grow(int wanted) {
        try {
            for (; made_ < wanted; ++made_) {
                if (int(others_.size()) == made_) others_.emplace_back();
                std::thread([this, index = made_ + 1, &own = others_.back()] { serve(index, own); }).detach();
            }
        } catch (const std::exception&) {  // no more threads, or no memory for one, to be had
        }
        return made_;
    }

    void serve(int index, Other& own) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            own.calls.wait(lock, [&] { return own.called; });
            own.called = false;
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
    std::deque<Other> others_;
    int made_ = 0;
    std::mutex mutex_;  // of what follows, and of who is called
    std::condition_variable done_;
    void (*work_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    int count_ = 0, left_ = 0;
};

}  // namespace

void in_pool(int wanted, void (*work)(void* context, int index, int count), void* context) {
    static Pool& pool = *new Pool;
    pool.run(wanted, work, context);
}

}  // namespace igpt::cpu
