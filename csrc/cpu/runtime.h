// Threads and scratch memory, compiled once for all instruction sets.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbert::cpu {

// Hands over the address of GOMP_parallel in the OpenMP runtime of the process, or 0 to work on one thread.
//
// It is what `#pragma omp parallel` compiles to, and libgomp, LLVM's libomp and Intel's libiomp5 all export it: called
// through a pointer it runs on the threads that torch already has, whichever runtime that is and whichever compiler built
// this file. A second runtime in the process would spin against the first.
void set_openmp_parallel(uintptr_t gomp_parallel);

// Calls body(context, index) for every index below count, each once, on at most num_threads threads, in rising order of the
// start. An exception that a body throws is thrown again here, once all threads are done.
void parallel_for(int64_t count, int num_threads, void (*body)(void* context, int64_t index), void* context);

// At least this many floats, aligned to 64 bytes, that belong to the calling thread until its next call. They are kept for
// the life of the thread: pages fresh from the system would cost more than many a kernel. Throws std::bad_alloc.
float* thread_scratch(size_t floats);

}  // namespace fastbert::cpu
