// A CUDA block on one thread of the CPU: each of its threads is a fiber, and what threads wait for is a loop that yields.
//
// Kernels are compiled by a C++ compiler against the headers of this folder. It is a model of what the programming guide
// promises, and nothing more than that: threads run one after the other, between waits, in an order that can be shuffled
// (so a missing barrier shows as a wrong result in some order), asynchronous copies and matrix products happen at the last
// moment that the guide allows (so a missing wait shows, too), dynamic shared memory starts as NaN, and threads that wait
// for what will never come are an error that says where they are. Static shared memory is what the block before has left: a
// kernel that reads what it has not written there is not shown, nor is an access behind the end of a tensor.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr int kWarp = 32;
using Location = std::source_location;

// --- launching ---------------------------------------------------------------------------------------------------------

// Runs kernel once per thread, block after block. Throws what a thread threw, and std::logic_error for a deadlock.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// In which order the threads of a block take turns from the next launch on: 0 ascending, 1 descending, others shuffled anew
// in every turn, with this seed, and one warp far ahead of the others. Blocks run in such an order, too, one after the
// other.
void set_order(uint64_t order);

// What the kernels are told of the GPU: its compute capability, 90 for 9.0.
void set_capability(int capability);
int capability();

// --- of the thread that runs -------------------------------------------------------------------------------------------

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
int flat_thread();  // x fastest
unsigned char* dynamic_shared_memory();
size_t dynamic_shared_bytes();

// Lets the others run until ready() holds; happened() says that somebody may have become ready.
void wait_until(const std::function<bool()>& ready, const char* what, const Location& where);
void happened();

// All threads of a group, numbered from 0, meet; each gives its bytes and sees those of all, valid until the next call but
// one of this group. Throws where they meet in different calls.
class Meeting {
 public:
  Meeting(int threads, size_t bytes);
  const unsigned char* exchange(int thread, const void* bytes, size_t size, const char* what, const Location& where);

 private:
  int threads_;
  std::vector<uint64_t> arrivals_;
  struct Turn {
    int arrived = 0;
    const char* what = nullptr;
    Location where;
    std::vector<unsigned char> bytes;
  };
  Turn turns_[2];
};

Meeting& warp();  // of this thread
int lane();

// What every lane of the warp gives, as an array of 32.
template <typename T>
const T* exchange(const T& mine, const char* what, const Location& where) {
  static_assert(sizeof(T) <= 256);
  return reinterpret_cast<const T*>(warp().exchange(lane(), &mine, sizeof(T), what, where));
}

// bar.arrive and bar.sync: the barrier of this name opens when so many threads are there.
uint64_t arrive(int name, int threads);
void sync(int name, int threads, const Location& where);

// --- asynchronous work of this thread ----------------------------------------------------------------------------------

// Work that runs when its group is waited for, groups in the order of their commits; one queue for each kind.
enum class Queue { copies, products, count };
void defer(Queue queue, std::function<void()> work);
void commit(Queue queue);
void wait_for_all_but(Queue queue, int groups);

// Work of the whole block that runs when somebody waits for the mbarrier at this address of shared memory.
void defer_to_barrier(const void* mbarrier, std::function<void()> work);
void run_deferred(const void* mbarrier);

}  // namespace simt
