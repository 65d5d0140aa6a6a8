#include "cpu/runtime.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

namespace fastbert::cpu {

namespace {

using GompParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

GompParallel gomp_parallel = nullptr;

struct Job {
  std::atomic<int64_t> next{0};
  const int64_t count;
  void (*const body)(void*, int64_t);
  void* const context;
  std::mutex error_mutex{};
  std::exception_ptr error{};
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  try {
    for (int64_t index; (index = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
      job.body(job.context, index);
  } catch (...) {
    job.next = job.count;
    const std::lock_guard<std::mutex> lock(job.error_mutex);
    job.error = std::current_exception();
  }
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

void set_openmp_parallel(uintptr_t address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

void parallel_for(int64_t count, int num_threads, void (*body)(void*, int64_t), void* context) {
  Job job{{0}, count, body, context};
  // All of the threads or one: libgomp ends and creates threads when a team differs in size from the last one.
  if (gomp_parallel == nullptr || num_threads <= 1 || count <= 1) {
    work(&job);
  } else {
    gomp_parallel(work, &job, static_cast<unsigned>(num_threads), 0);
  }
  if (job.error) std::rethrow_exception(job.error);
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
