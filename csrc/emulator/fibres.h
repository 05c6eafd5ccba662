// Blocks of a kernel on the CPU: every thread of a block is a fibre, a stack of its own that is switched to and from
// where threads wait for each other. One block runs at a time, one thread at a time, in an order that differs at each
// meeting, so that a missing __syncthreads shows. Threads that wait for others that never come are an error, not a
// hang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
    unsigned x, y, z;
};

namespace gemmart::emulator {

// The running thread's place.
struct Place {
    uint3 thread, block;
    dim3 block_size{}, grid_size{};
};
extern Place* place;

void sync_threads();
unsigned char* shared_memory();

// All n_lanes (32 or 64) lanes of the running thread's group bring `bytes` bytes; when all are there, `combine` (may be
// null) runs once on what they brought, and each gets slots [n_lanes][kSlotBytes], valid until its next meeting.
// `kind` names the operation: lanes that meet in different ones are an error.
inline constexpr int kSlotBytes = 64;
const unsigned char* meet(int n_lanes, const char* kind, const void* mine, size_t bytes,
                          void (*combine)(unsigned char* slots) = nullptr);
int lane_of(int n_lanes);

// Ends the kernel with an error.
[[noreturn]] void fail(const std::string& reason);

// cp.async: done at once or when it is waited for, as the order of the block has it.
void copy_later(void* to, const void* from);
void commit_copies();
void wait_copies(int n_pending);
void wait_for_previous();

// Runs all blocks, one kernel of the process at a time; the reason why they could not end, or nothing.
std::string run_grid(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace gemmart::emulator
