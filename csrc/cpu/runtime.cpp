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
#include <vector>

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

// The indices of a loop that threads take one by one, in rising order: the loop's number and, in the lower half, how many of
// its indices are taken. What belongs to an earlier loop is over, and none of this one's is taken then. A thread that is
// late never gets an index of a loop that has ended, for all of them were taken in its name.
class alignas(64) Share {
 public:
  // The next of so many indices of a loop; -1 where none is left.
  int64_t take(uint32_t loop, int64_t count) {
    uint64_t taken = taken_.load(std::memory_order_acquire);
    for (;;) {
      if (loop_of(taken) > loop) return -1;
      const uint64_t mine = loop_of(taken) == loop ? taken : uint64_t{loop} << 32;
      const int64_t index = static_cast<uint32_t>(mine);
      if (index >= count) return -1;
      if (taken_.compare_exchange_weak(taken, mine + 1, std::memory_order_acq_rel, std::memory_order_acquire)) return index;
    }
  }

 private:
  static uint32_t loop_of(uint64_t taken) { return static_cast<uint32_t>(taken >> 32); }

  std::atomic<uint64_t> taken_{0};
};

// The loops of a region of threads, one after the other, counted from 1.
class Team {
 public:
  explicit Team(int num_threads) : shares_(num_threads) {}

  // number: a thread's own, from 0 on, which all of them have in the order in which they come.
  int join() { return next_number_.fetch_add(1, std::memory_order_relaxed); }

  // loop: the calling thread's count of the loops that it has come to. The indices are divided into shares of neighbours; a
  // thread begins with one of its own where there are several, and helps with the others when that is done.
  void run(int number, uint32_t loop, int64_t count, int64_t shares, void (*body)(void*, int64_t), void* context) {
    while (loop_.load(std::memory_order_acquire) < loop) relax();
    int64_t done = 0;
    for (int64_t i = 0; i < shares && loop_.load(std::memory_order_acquire) == loop; ++i) {
      const int64_t share = (number + i) % shares, first = share * count / shares, end = (share + 1) * count / shares;
      for (int64_t index; (index = shares_[share].take(loop, end - first)) >= 0; ++done) {
        try {
          if (!error.there()) body(context, first + index);
        } catch (...) {
          error.keep();
        }
      }
    }
    if (done > 0 && done_.fetch_add(done, std::memory_order_acq_rel) + done == count) return begin(loop + 1);
    wait_for_the_end_of(loop);
  }

  int64_t num_threads() const { return static_cast<int64_t>(shares_.size()); }

  FirstError error{};

 private:
  // About 50 us: what a thread waits for another one that is at its last index. Sleep takes as long to end.
  static constexpr int kSpins = 4096;

  void begin(uint32_t loop) {
    done_.store(0, std::memory_order_relaxed);  // before the loop, without which nobody can have done any of its indices
    loop_.store(loop, std::memory_order_seq_cst);
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

  std::vector<Share> shares_;
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> loop_{1};  // that goes on; a word for the system to wait on
  std::atomic<int> asleep_{0};
  std::atomic<int> next_number_{0};
};

// Of the calling thread, while it is in a region and not at an index of one of its loops.
struct Membership {
  Team* team = nullptr;
  int number = 0;
  uint32_t loop = 1;  // the next one that it comes to
};

thread_local Membership membership;

struct Region {
  void (*const body)(void*);
  void* const context;
  Team team;
};

void take_part(void* data) {
  Region& region = *static_cast<Region*>(data);
  membership = {&region.team, region.team.join()};
  try {
    region.body(region.context);
  } catch (...) {
    region.team.error.keep();
  }
  membership = {};
}

// In a region: the loop that the calling thread comes to, in so many shares.
void run_in_region(int64_t count, int64_t shares, void (*body)(void*, int64_t), void* context) {
  if (count <= 0) return;
  Membership mine = membership;
  membership = {};  // a loop inside of this one is its thread's own
  mine.team->run(mine.number, mine.loop++, count, shares, body, context);
  membership = mine;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

void set_openmp_parallel(uintptr_t address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

void parallel_for(int64_t count, int num_threads, void (*body)(void*, int64_t), void* context) {
  if (membership.team != nullptr) return run_in_region(count, 1, body, context);
  Job job{{0}, count, body, context};
  // All of the threads or one: libgomp ends and creates threads when a team differs in size from the last one.
  if (gomp_parallel == nullptr || num_threads <= 1 || count <= 1) {
    work(&job);
  } else {
    gomp_parallel(work, &job, static_cast<unsigned>(num_threads), 0);
  }
  job.error.rethrow();
}

void parallel_shares(int64_t count, int num_threads, void (*body)(void*, int64_t), void* context) {
  if (membership.team == nullptr) return parallel_for(count, num_threads, body, context);
  run_in_region(count, membership.team->num_threads(), body, context);
}

void together(int num_threads, void (*body)(void*), void* context) {
  if (gomp_parallel == nullptr || num_threads <= 1 || membership.team != nullptr) return body(context);
  Region region{body, context, Team(num_threads)};
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
