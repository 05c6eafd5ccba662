// What the files of the emulated runtime share.
#pragma once

#include <string>

#include "emulator/runtime.h"

namespace gemmart::emulator {

cudaError_t keep(cudaError_t error);   // for cudaGetLastError()
void set_failure(std::string reason);  // what cudaGetErrorString() says of a failed launch
std::string setting(const char* name, const char* otherwise);
size_t device_memory();
cudaError_t find_device(int device);
int device_now();

bool is_pinned(const void* memory);
bool is_device(const void* memory);

bool is_capturing();
void run_all_streams();

inline constexpr size_t kMostShared = 227 * 1024;

}  // namespace gemmart::emulator
