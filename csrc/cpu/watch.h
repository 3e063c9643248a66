// Whether the threads of regions have to wait for processors, which other processes have; one policy for the process.
#pragma once

#include <atomic>
#include <cstdint>

namespace igpt::cpu {

// The looking of one region: now and then each of its threads asks how long it was ready to run and did not.
class Watch {
  public:
    explicit Watch(int threads);  // it looks where there are several, and it is time to
    ~Watch();
    void look();  // by each thread of the team

  private:
    int64_t time_ = 0;  // 0: no look
    std::atomic<bool> contended_{false};
};

// `threads`, or fewer while other processes want the processors.
int after_giving_way(int threads);

// How often regions of this process have begun to give way.
int64_t times_given_way();

}  // namespace igpt::cpu
