#include "cpu/runtime.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

namespace fastbert::cpu {

namespace {

using GompParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

GompParallel gomp_parallel = nullptr;

class FirstError {
 public:
  void keep() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    there_ = true;
  }
  bool there() const { return there_.load(std::memory_order_relaxed); }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_{};
  std::exception_ptr error_{};
  std::atomic<bool> there_{false};
};

struct Job {
  std::atomic<int64_t> next{0};
  const int64_t count;
  void (*const body)(void*, int64_t);
  void* const context;
  FirstError error{};
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  try {
    for (int64_t index; (index = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
      job.body(job.context, index);
  } catch (...) {
    job.next = job.count;
    job.error.keep();
  }
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The loops of a region of threads, one after the other. A ticket is the number of the loop that goes on, and in its lower
// half the next of its indices: who asks for an index of a loop that is over never gets one of its successor.
class Team {
 public:
  // loop: the calling thread's count of the loops that it has come to.
  void run(uint32_t loop, int64_t count, void (*body)(void*, int64_t), void* context) {
    uint64_t ticket;
    while (loop_of(ticket = ticket_.load(std::memory_order_acquire)) < loop) relax();
    while (loop_of(ticket) == loop && index_of(ticket) < count) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      try {
        if (!error.there()) body(context, index_of(ticket));
      } catch (...) {
        error.keep();
      }
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) return begin(loop + 1);
      ticket = ticket_.load(std::memory_order_acquire);
    }
    wait_for_the_end_of(loop);
  }

  FirstError error{};

 private:
  // About 50 us: what a thread waits for another one that is at its last index. Sleep takes as long to end.
  static constexpr int kSpins = 4096;

  static uint32_t loop_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }
  static int64_t index_of(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

  void begin(uint32_t loop) {
    done_.store(0, std::memory_order_relaxed);
    loop_.store(loop, std::memory_order_seq_cst);  // before the ticket, without which nobody can come to the next one's end
    ticket_.store(uint64_t{loop} << 32, std::memory_order_release);
    if (asleep_.load(std::memory_order_seq_cst) > 0) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  void wait_for_the_end_of(uint32_t loop) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (loop_.load(std::memory_order_acquire) > loop) return;
      relax();
    }
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    for (uint32_t now; (now = loop_.load(std::memory_order_seq_cst)) <= loop;)
      futex(FUTEX_WAIT_PRIVATE, static_cast<int>(now));
    asleep_.fetch_sub(1, std::memory_order_relaxed);
  }

  void futex(int operation, int value) {
    static_assert(sizeof(loop_) == sizeof(int));
    syscall(SYS_futex, &loop_, operation, value, nullptr, nullptr, 0);
  }

  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<uint32_t> loop_{0};  // of the ticket; a word for the system to wait on
  std::atomic<int> asleep_{0};
};

// Of the calling thread, while it is in a region and not at an index of one of its loops.
struct Membership {
  Team* team = nullptr;
  uint32_t loops = 0;
};

thread_local Membership membership;

struct Region {
  void (*const body)(void*);
  void* const context;
  Team team{};
};

void take_part(void* data) {
  Region& region = *static_cast<Region*>(data);
  membership = {&region.team, 0};
  try {
    region.body(region.context);
  } catch (...) {
    region.team.error.keep();
  }
  membership = {};
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

void set_openmp_parallel(uintptr_t address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

void parallel_for(int64_t count, int num_threads, void (*body)(void*, int64_t), void* context) {
  if (membership.team != nullptr) {
    const Membership mine = membership;
    membership = {};  // a loop inside of this one is its thread's own
    if (count > 0) mine.team->run(mine.loops, count, body, context);
    membership = {mine.team, mine.loops + (count > 0)};
    return;
  }
  Job job{{0}, count, body, context};
  // All of the threads or one: libgomp ends and creates threads when a team differs in size from the last one.
  if (gomp_parallel == nullptr || num_threads <= 1 || count <= 1) {
    work(&job);
  } else {
    gomp_parallel(work, &job, static_cast<unsigned>(num_threads), 0);
  }
  job.error.rethrow();
}

void together(int num_threads, void (*body)(void*), void* context) {
  if (gomp_parallel == nullptr || num_threads <= 1 || membership.team != nullptr) return body(context);
  Region region{body, context};
  gomp_parallel(take_part, &region, static_cast<unsigned>(num_threads), 0);
  region.team.error.rethrow();
}

float* thread_scratch(size_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    const size_t rounded = (floats + 15) / 16 * 16;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float))));
    if (!memory) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}

}  // namespace fastbert::cpu
